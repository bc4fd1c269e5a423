"""What the end-to-end tests share: small models, a recipe, the command line in this process, faults."""

from __future__ import annotations

import builtins
import hashlib
import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantcli.__main__ import main
from tests.builders import Tensor, make_model

RECIPE = """\
target: ascend
rules:
  - match: "*_proj"
    scheme: w8a8_dynamic
"""
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document of a command with --json; it has what every document has."""
        document = json.loads(self.out)
        error = document["error"]
        assert list(document)[:4] == ["ok", "schema_version", "error", "exit_code"]
        assert list(error) == ["what", "where", "fix"] if self.code else error is None
        assert (
            document
            | {
                "ok": self.code == 0,
                "schema_version": 1,
                "exit_code": self.code,
            }
            == document
        )
        return document

    @property
    def later(self) -> str:
        """Messages after the first line, which says what is planned or verified, if it is there."""
        first, _, rest = self.err.partition("\n")
        return rest if first.startswith(("planning ", "verifying ")) else self.err


def run_cli(*arguments: object) -> Result:
    """quantcli in this process: torch is imported once for all tests."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)
    return Result(int(caught.value.code or 0), out.getvalue(), err.getvalue())


def bf16(values: np.ndarray) -> bytes:
    """The upper halves of float32 numbers."""
    return (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def llama(layers: int = 1, side: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """A llama in miniature: embeddings, attention, an MLP and norms."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (2 * side, side)}
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (side, side)
        for name in ("gate", "up"):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = (2 * side, side)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (side, 2 * side)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (side,)
    return {
        name: ("BF16", shape, bf16(random.standard_normal(shape, "f4")))
        for name, shape in shapes.items()
    }


def make_llama(folder: Path, **options: int) -> Path:
    """A directory with config.json, a tokenizer and one weight file."""
    shards = {"model.safetensors": llama(**options)}
    return make_model(folder, shards, config=CONFIG, files={"tokenizer.json": '{"version": "1.0"}'})


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder with the hash of its bytes, or what else it is."""
    table = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            table[name] = f"-> {path.readlink()}"
        else:
            table[name] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return table


@dataclass
class Box:
    """One test's own place: a model, a recipe and where the output would go."""

    root: Path
    model: Path
    recipe: Path
    out: Path

    @property
    def partial(self) -> Path:
        return self.out.with_name(self.out.name + ".partial")

    def args(self, *more: object) -> list[object]:
        """The usual command."""
        return ["quantize", self.recipe, "--model", self.model, "--out", self.out, *more]

    def run(self, *more: object) -> Result:
        return run_cli(*self.args(*more))

    def edit_recipe(self, text: str) -> None:
        self.recipe.write_text(text)


def make_box(root: Path) -> Box:
    """A model and a recipe in a folder."""
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE)
    return Box(root, make_llama(root / "model"), recipe, root / "out")


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return make_box(tmp_path)


class Killed(BaseException):
    """The process is gone: nothing catches this, and nothing works afterwards."""


class Faults:
    """Makes the nth call to the disk below `root` fail; counts the calls."""

    def __init__(
        self, root: Path, nth: int, error: Callable[[], BaseException], *, sticky: bool
    ) -> None:
        self.root = str(root)
        self.nth = nth
        self.error = error
        self.sticky = sticky
        self.calls = 0
        self.fired: str | None = None
        self._mutex = threading.Lock()

    def _tick(self, name: str) -> None:
        with self._mutex:
            index = self.calls
            self.calls += 1
            hit = index >= self.nth if self.sticky else index == self.nth
            if hit and self.fired is None:
                self.fired = f"call {index}: {name}"
        if hit:
            raise self.error()

    def _by_fd(self, name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._tick(name)
            return real(*args, **kwargs)

        return call

    def _by_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            ours = "dir_fd" in kwargs or (not isinstance(path, int) and str(path).startswith(self.root))
            if ours and not (name == "mkdir" and Path(path).is_dir()):  # exist_ok forgives any error
                self._tick(name)
            return real(path, *args, **kwargs)

        return call

    @contextmanager
    def armed(self) -> Iterator[Faults]:
        """The faults are on; only one at a time."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("pwrite", "write", "fsync", "preadv", "ftruncate"):
                patch.setattr(os, name, self._by_fd(name))
            for name in ("open", "rename", "unlink", "rmdir", "mkdir"):
                patch.setattr(os, name, self._by_path(name, getattr(os, name)))
            patch.setattr(io, "open", self._by_path("io.open", io.open))
            patch.setattr(builtins, "open", self._by_path("io.open", builtins.open))
            yield self
