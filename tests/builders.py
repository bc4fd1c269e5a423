"""Tiny checkpoints for tests, put together byte by byte without the code under test."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Tensor = tuple[str, tuple[int, ...], bytes]  # safetensors dtype, shape, data

INDEX = "model.safetensors.index.json"
BITS = {"F4": 4, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BF16": 16, "F16": 16}
BITS |= {"I16": 16, "U16": 16, "F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64, "C64": 64}


def tensor(dtype: str, *shape: int, fill: int = 0) -> Tensor:
    """A tensor whose bytes are all `fill`."""
    return dtype, shape, bytes([fill]) * (math.prod(shape) * BITS[dtype] // 8)


def pack(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of any header, good or bad: bytes as they are, all else as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A good safetensors file with `tensors` in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blob = b""
    for name, (dtype, shape, data) in tensors.items():
        span = [len(blob), len(blob) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        blob += data
    path.write_bytes(pack(header, blob))
    return path


def make_model(
    folder: Path,
    shards: Mapping[str, Mapping[str, Tensor]] | None = None,
    *,
    config: Any = None,
    index: bool | Any = False,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """A model directory; by default one float matrix in model.safetensors and a config.json.

    index: True for a right one, or what is to stand in it. files: anything else to put there.
    """
    if shards is None:
        shards = {"model.safetensors": {"model.embed.weight": tensor("BF16", 4, 2)}}
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        write_safetensors(folder / file, tensors)
    if index is True:
        index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    if index is not False:
        (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({} if config is None else config))
    for name, content in (files or {}).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder
