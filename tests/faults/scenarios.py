"""The commands into which faults are injected, each with what is there before it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.e2e.conftest import make_llama, run_cli

_RECIPE = """\
target: {target}
rules:
  - match: "*_proj"
    scheme: {scheme}
"""
_STATIC = (
    _RECIPE.format(target="ascend", scheme="{name: w8a8_static, observer: minmax}")
    + "calibration: {data: text.txt, samples: 4, length: 16}\n"
)
NOTES = "notes.txt"  # a file of the user's in a checkpoint


@dataclass(frozen=True)
class Scenario:
    """A command, and the folder `run` in which it writes.

    words:  the command line.
    before: what is in `run` before: name -> the folder that it is a copy of.
    after:  the names there after success.
    whole:  whether OUT is there whole or not at all.
    writes: whether the command writes anything.
    """

    words: Sequence[str]
    before: Mapping[str, Path]
    after: tuple[str, ...] = ("out",)
    whole: bool = True
    writes: bool = True


class Place:
    """A folder with a model, recipes, and checkpoints of all kinds, each made when it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "run"
        self.out = self.run / "out"
        self.model = make_llama(root / "model", layers=2, side=64)
        (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
        self._write("dynamic", _RECIPE.format(target="ascend", scheme="w8a8_dynamic"))
        self._write("other", _RECIPE.format(target="ascend", scheme="w8a16"))
        self._write("static", _STATIC)

    @cached_property
    def trained(self) -> Path:
        """A model that a text can run through."""
        from tests.e2e.calibrating import Models  # imports transformers

        return Models(self.root / "models", num_hidden_layers=2, vocab_size=128)("qwen3")

    def _write(self, name: str, text: str) -> None:
        (self.root / f"{name}.yaml").write_text(text)

    def _quantize(self, recipe: str, out: Path, *more: str, model: Path | None = None) -> list[str]:
        words = [
            "quantize",
            f"{self.root / recipe}.yaml",
            "--model",
            f"{self.model}",
            "--out",
            f"{out}",
        ]
        return [*words, "--workers", "2", "--set", "max_shard=30KB", *more]

    def _made(self, name: str, words: Callable[[Path], list[str]]) -> Path:
        folder = self.root / name
        if not folder.exists():
            result = run_cli(*words(folder))
            assert result.code == 0, result.err
        return folder

    def _old(self) -> Path:
        """A checkpoint by another recipe."""
        return self._made("old", lambda out: self._quantize("other", out))

    def _statistics(self) -> Path:
        recipe, model = f"{self.root / 'static'}.yaml", f"{self.trained}"
        return self._made("statistics", lambda out: self._calibrate(recipe, model, out))

    @staticmethod
    def _calibrate(recipe: str, model: str, out: Path) -> list[str]:
        return ["calibrate", recipe, "--model", model, "--out", f"{out}", "--workers", "2"]

    def _part(self, number: int) -> Path:
        folder = self.root / f"parts.part-{number}-of-2"
        if not folder.exists():
            words = self._quantize("dynamic", self.root / "parts", "--part", f"{number}/2")
            assert run_cli(*words).code == 0
        return folder

    def _dynamic(self) -> Path:
        return self._made("packable", lambda out: self._quantize("dynamic", out))

    def _with_notes(self) -> Path:
        folder = self.root / "with_notes"
        if not folder.exists():
            shutil.copytree(self._old(), folder)
            (folder / NOTES).write_text("mine")
        return folder

    def _half(self) -> Path:
        """What a run leaves that is stopped after some shards."""
        folder = self.root / "half.partial"
        if not folder.exists():
            from quantcli.core.events import Events
            from tests.e2e.conftest import Killed

            def stop(events: Events, *_: object) -> None:
                raise Killed

            real, Events.shard = Events.shard, stop  # type: ignore[method-assign]
            try:
                run_cli(*self._quantize("dynamic", self.root / "half"))
            except Killed:
                pass
            finally:
                Events.shard = real  # type: ignore[method-assign]
        return folder

    def scenario(self, name: str) -> Scenario:
        """A scenario of `SCENARIOS`; what it needs is made first."""
        return SCENARIOS[name](self)


def _quantize(place: Place) -> Scenario:
    return Scenario(place._quantize("dynamic", place.out), {})


def _resume(place: Place) -> Scenario:
    return Scenario(place._quantize("dynamic", place.out), {"out.partial": place._half()})


def _force(place: Place) -> Scenario:
    return Scenario(place._quantize("dynamic", place.out, "--force"), {"out": place._old()})


def _keep(place: Place) -> Scenario:
    words = place._quantize("dynamic", place.out, "--force")
    return Scenario(words, {"out": place._with_notes()}, ("out", "out.replaced"))


def _calibrate(place: Place) -> Scenario:
    words = place._calibrate(f"{place.root / 'static'}.yaml", f"{place.trained}", place.out)
    return Scenario(words, {}, whole=False)


def _calibrated(place: Place) -> Scenario:
    statistics = f"{place._statistics()}"
    words = place._quantize("static", place.out, "--calibration", statistics, model=place.trained)
    return Scenario(words, {})


def _pack(place: Place) -> Scenario:
    words = ["pack", f"{place._dynamic()}", "--target", "compressed-tensors", "--out", f"{place.out}"]
    return Scenario([*words, "--workers", "2"], {})


def _merge(place: Place) -> Scenario:
    parts = {f"part{number}": place._part(number) for number in (1, 2)}
    names = [f"{place.run / name}" for name in parts]
    words = ["pack", "--merge", *names, "--out", f"{place.out}", "--workers", "2"]
    return Scenario(words, parts, ("out", *parts))


def _verify(place: Place) -> Scenario:
    words = ["verify", f"{place.out}", "--full", "--against", f"{place.model}", "--workers", "2"]
    return Scenario(words, {"out": place._old()}, writes=False)


def _inspect(place: Place) -> Scenario:
    return Scenario(["inspect", f"{place.out}"], {"out": place._old()}, writes=False)


SCENARIOS: dict[str, Callable[[Place], Scenario]] = {
    "quantize": _quantize,
    "quantize, resumed": _resume,
    "quantize --force": _force,
    "quantize --force, a file kept": _keep,
    "calibrate": _calibrate,
    "quantize, calibrated": _calibrated,
    "pack": _pack,
    "pack --merge": _merge,
    "verify": _verify,
    "inspect": _inspect,
}
