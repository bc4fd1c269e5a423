"""Several recipes in one calibration, and one recipe in the calibration of another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from quantcli.calibration import session as sessions
from quantcli.calibration.methods import smoothing
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.resources import Resources
from quantcli.calibration.sets.joint import Joint, joint_sessions
from quantcli.commands.job import open_both
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress
from quantcli.planning.plan import Plan
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import resolve
from quantcli.schemes.arithmetic.observers import ChannelSquare, Distribution
from tests.e2e.calibrating import LENGTH, TEXT, Bench, Models, make_bench
from tests.e2e.conftest import snapshot

LAYERS = 3
DATA = f"calibration: {{data: text.txt, samples: 3, length: {LENGTH}}}\n"
STATIC = DATA + 'rules: [{match: "*_proj", scheme: w8a8_static}]\n'
SMOOTH = "smooth: {alpha: 0.5}\n"
FP8 = DATA + 'rules: [{match: "*_proj", scheme: fp8_static}]\n'
INT4 = DATA + 'rules: [{match: "*_proj", scheme: {name: w4a16, group_size: 32, OPTIONS}}]\n'
RECIPES = {
    "ascend": "target: ascend\n" + SMOOTH + STATIC,
    "vllm": "target: compressed-tensors\n" + SMOOTH + STATIC,
    "milder": "target: ascend\nsmooth: {alpha: 0.25}\n" + STATIC,
    "few": "target: ascend\n" + STATIC.replace("*_proj", "re:.*layers\\\\.0\\\\..*_proj"),
    "fp8": "target: fp8\n" + FP8,
    "vllm_fp8": "target: compressed-tensors\n" + FP8,
    "cache": "target: compressed-tensors\nkv_cache: fp8\n" + FP8,
    "heads": "target: compressed-tensors\nkv_cache: fp8_per_head\n" + FP8,
    "gptq": "target: ascend\n" + STATIC.replace("w8a8_static", "{name: w8a16, weight_rounding: gptq}"),
    "quantized": "target: ascend\n" + STATIC.replace("data:", "inputs: quantized, data:"),
    "shorter": "target: fp8\n" + FP8.replace("samples: 3", "samples: 2"),
    "longer": "target: fp8\n" + FP8.replace("samples: 3", "samples: 9999"),
}  # fmt: skip
TOGETHER = ["ascend", "vllm", "milder", "few", "fp8", "vllm_fp8", "cache", "heads", "gptq"]


class Workshop:
    """A model, a text, and the plans of recipes. `alone`: the folder of a recipe's own calibration."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        (root / "text.txt").write_text(TEXT)
        self._plans: dict[str, Plan] = {}

    def plan(self, name: str) -> Plan:
        if name not in self._plans:
            path = self.root / f"{name}.yaml"
            path.write_text(RECIPES[name])
            opened = open_both(path, str(self.model), (), "quantize", SILENT)
            self._plans[name] = make_plan(resolve(opened.written), opened.checkpoint)
        return self._plans[name]

    def joint(self, names: Sequence[str], folder: str | Path) -> Joint:
        return joint_sessions([self.plan(name) for name in names], self.root / folder)

    def alone(self, name: str) -> Path:
        folder = self.root / "alone" / name
        if not folder.exists():
            alone = sessions.prepare_session(self.plan(name), folder)
            sessions.run(alone, Resources(workers=2), SILENT)
        return folder

    def files(self, folder: Path) -> dict[str, str]:
        """Those of a calibration, without further ones within it."""
        return {name: what for name, what in snapshot(folder).items() if "further-" not in name}

    def check(self, joint: Joint, names: Sequence[str]) -> None:
        """Each calibration has the bytes of the one that its recipe makes alone."""
        for name, session in zip(names, joint.sessions, strict=True):
            assert self.files(session.folder) == self.files(self.alone(name)), name
            found = sessions.load(sessions.prepare_session(self.plan(name), joint.folder))
            own = sessions.load(sessions.prepare_session(self.plan(name), self.alone(name)))
            assert found.stats.keys() == own.stats.keys()
            assert found.edits.keys() == own.edits.keys()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    root = tmp_path_factory.mktemp("workshop")
    return Workshop(root, Models(root / "models", num_hidden_layers=LAYERS)("qwen3"))


def test_together_as_alone(workshop: Workshop) -> None:
    """Recipes with one replay, and those with other inputs, have the bytes of separate runs."""
    names = [*TOGETHER, "quantized", "shorter"]
    joint = workshop.joint(names, "all")
    assert [len(group) for group in joint.groups] == [8, 1, 1]
    fp8, vllm_fp8 = (joint.sessions[names.index(name)] for name in ("fp8", "vllm_fp8"))
    assert fp8.folder == vllm_fp8.folder, "they ask for the same"
    lines = list(joint.explain())
    assert lines[0].startswith("one replay of the layers for ascend; vllm; milder; few; fp8, vllm_fp8;")
    assert len(lines) == 3
    joint.run(Resources(workers=2), SILENT)
    workshop.check(joint, names)
    again = workshop.joint(names[::-1], "all")
    assert all(session.complete for session in again.sessions)
    assert {s.folder for s in again.sessions} == {s.folder for s in joint.sessions}


def test_all_texts_are_read_before_anything_runs(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a later replay is too short: no layer has run by then."""
    ran: list[int] = []
    monkeypatch.setattr(Replay, "run", lambda self, index, *rest, **options: ran.append(index))
    with pytest.raises(InputError, match="9999 are asked for") as error:
        workshop.joint(["fp8", "longer"], "texts").run(Resources(), SILENT)
    assert "longer.yaml" in (error.value.where or "")
    assert ran == []
    assert not (workshop.root / "texts").exists()


class Stops(Progress):
    """Interrupts after a layer."""

    def __init__(self, after: int) -> None:
        self.left = after

    def layer(self, name: str, index: int, note: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_it_goes_on_after_the_last_layer_for_all(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each layer, and once while a layer's results are saved one by one."""
    names = ["ascend", "fp8", "gptq"]
    ran: list[int] = []
    run = Replay.run

    def spied(self: Replay, index: int, *rest: Any, **options: Any) -> None:
        ran.append(index)
        run(self, index, *rest, **options)

    monkeypatch.setattr(Replay, "run", spied)
    with pytest.raises(KeyboardInterrupt):
        workshop.joint(names, "stopped").run(Resources(), Stops(1))
    assert [s.layers_done for s in workshop.joint(names, "stopped").sessions] == [1, 1, 1]
    with monkeypatch.context() as patch:
        patch.setattr(smoothing.Smoothing, "edit", interrupted)
        ran.clear()
        with pytest.raises(KeyboardInterrupt):  # recipes that edit nothing have saved the layer
            workshop.joint(names, "stopped").run(Resources(), SILENT)
    assert set(ran) == {1}
    joint = workshop.joint(names, "stopped")
    assert [session.layers_done for session in joint.sessions] == [1, 2, 2]
    ran.clear()
    joint.run(Resources(), SILENT)
    assert set(ran) == {1, 2}, "the layers that are done are not run again"
    workshop.check(joint, names)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_states_that_are_gone_cost_a_forward_alone(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that joins a calibration does not measure the others' again."""
    folder = workshop.root / "joined"
    workshop.joint(["fp8"], folder).run(Resources(), SILENT)
    before = snapshot(folder)
    joint = workshop.joint(["ascend", "fp8"], folder)
    assert [session.complete for session in joint.sessions] == [False, True]
    joint.run(Resources(), SILENT)
    assert before.items() <= snapshot(folder).items()
    workshop.check(joint, ["ascend", "fp8"])


def test_passes_and_summaries_are_shared(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three static recipes two are smoothed alike: two passes a layer, as one of them takes alone;
    and inputs are counted once for both."""
    calls: Counter[str] = Counter()
    run, of, square = Replay.run, Distribution.of, ChannelSquare.of

    def count(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            calls[what] += 1
            return real(*arguments, **options)

        return counting

    monkeypatch.setattr(Replay, "run", count("pass", run))
    monkeypatch.setattr(Distribution, "of", count("distribution", of))
    monkeypatch.setattr(ChannelSquare, "of", count("squares", square))
    figures = {}
    for names in (["ascend"], ["fp8"], ["ascend", "vllm", "fp8"]):
        workshop.joint(names, "_".join([*names, "counted"])).run(Resources(), SILENT)
        figures[len(names), names[0]] = dict(calls)
        calls.clear()
    one, fp8, three = figures.values()
    assert three["pass"] == one["pass"]
    assert three["distribution"] == one["distribution"] + fp8["distribution"]
    assert three["squares"] == one["squares"]


# one recipe in the calibration of another


def names_layers(bench: Bench, *more: object) -> bool:
    result = bench.run(*more)
    assert result.code == 0, result.err
    return "layer 1/" in result.err


@pytest.fixture
def bench(tmp_path: Path, workshop: Workshop) -> Bench:
    return make_bench(tmp_path, workshop.model, RECIPES["fp8"])


def test_a_recipe_uses_what_another_has_measured(bench: Bench) -> None:
    """For another engine, and for fewer modules: nothing runs, and the bytes are its own run's."""
    assert bench.calibrate().code == 0
    before = snapshot(bench.store)
    part = RECIPES["fp8"].replace("target: fp8", "target: modelopt").replace("*_proj", "*.mlp.*_proj")
    for number, recipe in enumerate((RECIPES["vllm_fp8"], part)):
        bench.edit_recipe(recipe)
        own, other = bench.at(f"own{number}"), bench.at(f"other{number}")
        assert names_layers(own)
        assert not names_layers(other, "--calibration", bench.store)
        assert snapshot(other.out) == snapshot(own.out)
    assert snapshot(bench.store) == before


def test_what_a_recipe_lacks_is_added(bench: Bench) -> None:
    assert bench.calibrate().code == 0
    before = snapshot(bench.store)
    bench.edit_recipe(RECIPES["cache"])
    own, other = bench.at("own"), bench.at("other")
    assert names_layers(own)
    result = other.run("-v", "--calibration", bench.store)
    assert result.code == 0
    lacks = "the calibration there lacks kv_cache of `model.layers.0.self_attn` and 2 other modules"
    assert lacks in " ".join(result.err.split())
    assert f"runs first, as {lacks}: " in " ".join(result.out.split())
    assert snapshot(other.out) == snapshot(own.out)
    assert before.items() <= snapshot(bench.store).items(), "what was there stays"
    assert not names_layers(bench.at("again"), "--calibration", bench.store)


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("ascend", "other edits: made without `smooth`; this recipe has it (smooth.alpha 0.5)"),
        ("shorter", "other inputs: calibration.samples was 3, is 2"),
        ("quantized", "other inputs: calibration.inputs was float, is quantized"),
    ],
)
def test_what_differs_is_named(workshop: Workshop, name: str, difference: str) -> None:
    folder = workshop.alone("fp8")
    with pytest.raises(InputError) as error:
        sessions.prepare_session(workshop.plan(name), folder)
    assert error.value.what == f"the calibration there is of {difference}"
    assert (error.value.fix or "").startswith("give another folder; or delete ")


def test_a_calibration_is_found_in_that_of_a_release(workshop: Workshop) -> None:
    """Of any edits: `load_for` and `prepare_session` find each, and no other recipe may add to it."""
    names = ["ascend", "fp8"]
    joint = workshop.joint(names, "found")
    joint.run(Resources(), SILENT)
    for name in names:
        (own,) = sessions.load_for(workshop.plan(name), joint.folder)
        assert sessions.prepare_session(workshop.plan(name), joint.folder).complete
        assert (
            own.stats.keys()
            == sessions.load_for(workshop.plan(name), workshop.alone(name))[0].stats.keys()
        )
    with pytest.raises(InputError, match=r"other edits: smooth\.alpha was 0\.5, is 0\.25"):
        sessions.prepare_session(workshop.plan("milder"), joint.folder)
