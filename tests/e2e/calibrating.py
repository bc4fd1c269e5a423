"""What the end-to-end tests of calibration share: tiny models with a tokenizer, a text, a recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.calibration import session
from quantcli.calibration.methods import hessians, rounding
from quantcli.calibration.store import layer_file, seal_of
from quantcli.schemes.arithmetic import gptq
from tests.e2e.conftest import Box, Result, run_cli
from tests.tiny_models import make_multimodal, make_tiny

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TEXT = (ROOT / "examples" / "calibration.txt").read_text()[:1500]
SAMPLES, LENGTH = 4, 16
TOKENS = SAMPLES * LENGTH
# `minmax` here, for speed; the default observer is in the recipes that come with the tool
RECIPE = f"""\
target: ascend
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}}}
rules:
  - match: "*_proj"
    scheme: {{name: w8a8_static, observer: minmax}}
"""
SMOOTH = RECIPE + "smooth: {alpha: 0.5, within: 1}\n"
DYNAMIC = 'target: ascend\nrules:\n  - match: "*_proj"\n    scheme: w8a8_dynamic\n'
# for recipes that come with the tool
FEW = (
    *("--set", f"calibration.data={ROOT / 'examples' / 'calibration.txt'}"),
    *("--set", f"calibration.samples={SAMPLES}"),
    *("--set", f"calibration.length={LENGTH}"),
)


class Models:
    """Tiny models, each made once. Tests must not change them: see `Bench.own_model`."""

    def __init__(self, root: Path, **sizes: int) -> None:
        """sizes: others than those of tiny models, and four layers."""
        self._root = root
        self._sizes = {"num_hidden_layers": 4, **sizes}

    def __call__(self, family: str) -> Path:
        folder = self._root / family
        if not folder.exists():
            if family == "multimodal":
                make_multimodal(folder)
            else:
                make_tiny(folder, family, **self._sizes)
            write_tokenizer(folder)
        return folder


def write_tokenizer(folder: Path) -> None:
    """A token for each character of ASCII text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    special = ["<s>", "</s>", "<pad>", "<unk>"]
    letters = [chr(code) for code in (10, *range(32, 127))]
    table = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def change_tensors(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a model's one weight file."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def seal_again(store: Path, layer: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the report of a layer, and seal it as the tool does: a seal keeps no attacker out."""
    path = store / f"layer-{layer:05d}.json"
    report = json.loads(path.read_text())
    change(report)
    report["sha256"] = seal_of(store / layer_file(layer), report)
    path.write_text(json.dumps(report))


class Bench(Box):
    """A box with a text beside the recipe and a place for the calibration."""

    @property
    def store(self) -> Path:
        return self.out.with_name(self.out.name + ".calibration")

    def calibrate(self, *more: object) -> Result:
        return run_cli("calibrate", self.recipe, "--model", self.model, "--out", self.store, *more)

    def at(self, name: str) -> Bench:
        """The same with another place for the output."""
        return Bench(self.root, self.model, self.recipe, self.root / name)

    def own_model(self) -> Path:
        """A copy of the model that a test may change."""
        copy = self.root / "own"
        shutil.copytree(self.model, copy)
        self.model = copy
        return copy

    def described(self, module: str) -> str:
        """What the description says of a module's weight."""
        table = json.loads((self.out / "quant_model_description.json").read_text())
        return str(table[f"{module}.weight"])


def make_bench(root: Path, model: Path, recipe: str) -> Bench:
    (root / "text.txt").write_text(TEXT)
    (root / "recipe.yaml").write_text(recipe)
    return Bench(root, model, root / "recipe.yaml", root / "out")


def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, and several jobs even for tiny matrices."""
    monkeypatch.setattr(session, "BATCH_TOKENS", LENGTH)
    monkeypatch.setattr(hessians, "_TILE", 24)
    monkeypatch.setattr(gptq, "_TILE", 24)
    monkeypatch.setattr(gptq, "BLOCK", 16)
    monkeypatch.setattr(rounding, "_ROWS", 20)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Those of all files of a checkpoint."""
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}
