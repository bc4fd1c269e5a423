"""What the end-to-end tests of calibration share: tiny models with a tokenizer, a text, a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.e2e.conftest import Box, Result, run_cli, snapshot
from tests.tiny_models import COMMON, FAMILIES, save

TEXT = Path(__file__).parents[2] / "examples" / "calibration.txt"
RECIPES = Path(__file__).parents[2] / "recipes"
SAMPLES, LENGTH = 3, 16
RECIPE = f"""\
target: ascend
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}}}
rules:
  - match: "*_proj"
    scheme: w8a8_static
"""
SMOOTH = RECIPE + "smooth: {alpha: 0.5}\n"


def write_tokenizer(folder: Path, first: int = 3) -> None:
    """A token for each character of ASCII text, from id `first` on."""
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


def make_family(folder: Path, family: str, **changes: Any) -> Path:
    """A tiny model of a family with a tokenizer; `changes` are of its config."""
    import transformers

    model_class, config_class, usual = FAMILIES[family]
    config = getattr(transformers, config_class)(**COMMON | usual | changes)
    save(folder, getattr(transformers, model_class)(config), config.dtype or "bfloat16", 0)
    write_tokenizer(folder)
    return folder


def change_tensors(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a model's one weight file."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


class Bench(Box):
    """A box with a text beside the recipe and a place for the calibration."""

    @property
    def store(self) -> Path:
        return self.out.with_name(self.out.name + ".calibration")

    def calibrate(self, *more: object, store: Path | None = None) -> Result:
        where = store or self.store
        return run_cli("calibrate", self.recipe, "--model", self.model, "--out", where, *more)

    @property
    def description(self) -> dict[str, str]:
        return json.loads((self.out / "quant_model_description.json").read_text())


def make_bench(root: Path, model: Path, recipe: str = RECIPE) -> Bench:
    (root / "text.txt").write_text(TEXT.read_text()[:2000])
    (root / "recipe.yaml").write_text(recipe)
    return Bench(root, model, root / "recipe.yaml", root / "out")


__all__ = ["snapshot"]
