"""Tiny random models of every family, saved as transformers saves them: a folder for each name.

    python -m tests.zoo.make OUT [names]

Weights are drawn by name: the same file whatever else is made.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import torch

from tests.zoo.dense import DENSE
from tests.zoo.encoders import ENCODERS
from tests.zoo.judge import class_of
from tests.zoo.mixtures import MIXTURES
from tests.zoo.multimodal import MULTIMODAL
from tests.zoo.parts import Family

FAMILIES: dict[str, Family] = DENSE | MIXTURES | MULTIMODAL | ENCODERS


def make(name: str, folder: Path) -> Path:
    """Save the family `name` of FAMILIES or the layout `name` of `published.LAYOUTS` in a folder."""
    from tests.zoo import published

    shutil.rmtree(folder, ignore_errors=True)
    if name in FAMILIES:
        save(build(FAMILIES[name]), folder)
    else:
        published.LAYOUTS[name](folder)
    return folder


def names() -> list[str]:
    """Every checkpoint of the zoo."""
    from tests.zoo import published

    return [*FAMILIES, *published.LAYOUTS]


def build(family: Family) -> Any:
    """A model in bfloat16 with drawn weights."""
    import transformers

    config = getattr(transformers, family.config)(**copy.deepcopy(family.table))
    config.dtype = torch.bfloat16
    if family.model is None:
        model = class_of(config)._from_config(config)
    elif family.model.startswith("Auto"):
        model = getattr(transformers, family.model).from_config(config)
    else:
        model = getattr(transformers, family.model)(config)
    model.to(torch.bfloat16)
    draw(model)
    return model


# Of what a unit of inputs becomes in a matrix. Layers then add little to the hidden states, as those of
# trained models do; with 1.0 random ones amplify any rounding fivefold in three layers.
GAIN = 0.5
_EMBEDDINGS = ("embed", "shared.weight", "wte", "wpe")
_UNSCALED = ("SelfAttention.q.", "EncDecAttention.q.")  # of T5, which does not divide by the root of 64


def draw(model: Any) -> None:
    """Embeddings get large values, matrices such that a layer adds little to the hidden states, with
    rows that differ in size; the rest keeps what the library sets."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if parameter.dim() == 2:
                large = any(part in name for part in _EMBEDDINGS)
                spread = 4.0 if large else GAIN * parameter.shape[-1] ** -0.5
                spread /= 8 if any(part in name for part in _UNSCALED) else 1
            elif parameter.dim() == 3 and "conv" not in name:
                spread = GAIN * max(parameter.shape[1:]) ** -0.5
            else:
                continue
            drawn = torch.randn(parameter.shape, generator=generator) * spread
            if parameter.dim() == 2:
                drawn *= 1 + 0.5 * torch.rand(parameter.shape[0], 1, generator=generator)
            parameter.copy_(drawn)


def save(model: Any, folder: Path) -> None:
    """In several files, next to a tokenizer."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size="1500KB")
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A token for each character of ASCII text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    special = ["<s>", "</s>", "<pad>", "<unk>"]
    letters = [chr(code) for code in (10, *range(32, 127))]
    table = {token: number for number, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **words}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def main() -> None:
    """Make what the command line names, or all; say what could not be made."""
    out, chosen = Path(sys.argv[1]), sys.argv[2:] or names()
    failed = []
    for name in chosen:
        try:
            make(name, out / name)
        except Exception as error:
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    if failed:
        raise SystemExit(f"not made: {', '.join(failed)}")


if __name__ == "__main__":
    main()
