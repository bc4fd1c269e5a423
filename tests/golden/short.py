"""The reference producer's checkpoints with two layers: small enough to be kept whole in formats that
only verification knows.

`python -m tests.golden.short GOLDEN` made tests/golden/data/short from full ones. What is the same in
the float model is left out there, and put back by `assemble`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
SHORT = DATA / "short"
FULL = ("w4a8_dynamic", "w8a8_mxfp8", "w4a4_flatquant_dynamic")
LAYERS = 2
WEIGHTS = "quant_model_weights-00001-of-00001.safetensors"
DESCRIPTION = "quant_model_description.json"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that the weight files of a folder hold."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def kept(name: str) -> bool:
    """Whether a tensor belongs to the layers that stay."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    return match is None or int(match[1]) < LAYERS


def same(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    """Whether both are of one type, shape and value."""
    return b is not None and a.dtype == b.dtype and torch.equal(a, b)


def config() -> dict[str, Any]:
    """config.json of the shorter model."""
    table = json.loads((DATA / "model" / "config.json").read_text())
    return table | {"num_hidden_layers": LAYERS, "layer_types": table["layer_types"][:LAYERS]}


def short_model(folder: Path) -> Path:
    """The float model in `folder`, one weight file and no index."""
    shutil.copytree(DATA / "model", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    table = {name: tensor for name, tensor in tensors(DATA / "model").items() if kept(name)}
    save_file(table, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(), indent=2))
    return folder


def assemble(name: str, folder: Path) -> Path:
    """The reference producer's checkpoint in `folder`, without an index as engines ignore its name."""
    own = SHORT / name if name in FULL else DATA / name
    shutil.copytree(DATA / "model", folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    (folder / "config.json").write_text(json.dumps(config(), indent=2))
    described = json.loads((own / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps({k: v for k, v in described.items() if kept(k)}))
    table = tensors(DATA / "model") | tensors(own)
    table = {name: tensor for name, tensor in table.items() if kept(name)}
    save_file(table, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def main(golden: Path) -> None:
    """Cut the full checkpoints in `golden`."""
    source = tensors(DATA / "model")
    for name in FULL:
        (SHORT / name).mkdir(parents=True, exist_ok=True)
        table = {
            key: tensor
            for key, tensor in tensors(golden / name).items()
            if kept(key) and not same(tensor, source.get(key))
        }
        save_file(table, SHORT / name / WEIGHTS, metadata={"format": "pt"})
        described = json.loads((golden / name / DESCRIPTION).read_text())
        described = {key: value for key, value in described.items() if kept(key)}
        (SHORT / name / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
