"""A model in another basis, computed densely in float64: what a rotated checkpoint should hold."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import save_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import TensorSpec
from quantcli.checkpoint.tensors import read_tensor
from quantcli.sources.stacked import split_experts


@dataclass(frozen=True, slots=True)
class Held(StoredTensor):
    """A tensor in memory in the place of a stored one."""

    value: torch.Tensor = field(compare=False)

    @contextmanager
    def open(self):
        """A reader of its rows."""
        yield self

    def weight(self, start, count):
        """Some of its rows."""
        return self.value[start : start + count].clone()


def orthogonal(size, seed=0):
    """A random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def rotated(checkpoint, places, seed=0, dtype=torch.float32):
    """The checkpoint with every tensor of some places in the basis of a random matrix."""
    checkpoint = split_experts(checkpoint)
    new, turn = {}, orthogonal(places.hidden, seed)

    def value(name):
        if name not in new:
            new[name] = read_tensor(checkpoint.tensors[name]).double()
        return new[name]

    gammas = {norm.name: value(norm.name) + norm.offset for norm in places.norms}
    for pair in places.heads:
        width, share = pair.head_dim, pair.heads // len(pair.rows)
        for number, first in enumerate(pair.rows):
            own = orthogonal(width, seed + 1 + number)
            rows = slice(first, first + width)
            values = value(f"{pair.values}.weight")
            values[rows] = own.T @ values[rows]
            if f"{pair.values}.bias" in checkpoint.tensors:
                value(f"{pair.values}.bias")[rows] = own.T @ value(f"{pair.values}.bias")[rows]
            for head in range(number * share, (number + 1) * share):
                columns = slice(head * width, (head + 1) * width)
                output = value(f"{pair.output}.weight")
                output[:, columns] = output[:, columns] @ own
    for name, norm in places.readers.items():
        new[name] = value(name) * (1 if norm is None else gammas[norm.name]) @ turn
    for name in places.writers:
        new[name] = turn.T @ value(name)
    for name in (*places.embeddings, *places.biases):
        new[name] = value(name) @ turn
    for norm in places.norms:
        new[norm.name] = torch.full_like(value(norm.name), 1 - norm.offset)
    tensors = dict(checkpoint.tensors)
    for name, tensor in new.items():
        stored, tensor = tensors[name], tensor.to(dtype)
        spec = TensorSpec(
            name, {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype], stored.spec.shape
        )
        tensors[name] = Held(spec, stored.file, stored.offset, tensor)
    return replace(checkpoint, tensors=tensors)


def save_rotated(path, folder, places, change=lambda tensors, source: None, dtype=torch.bfloat16):
    """Write the rotated model of a folder into another one; `change` may damage its tensors first,
    which it is given by name, next to the source's."""
    folder.mkdir()
    source = open_checkpoint(path)
    turned = rotated(source, places, dtype=dtype)
    tensors = {name: read_tensor_of(stored) for name, stored in turned.tensors.items()}
    change(tensors, {name: read_tensor(stored) for name, stored in source.tensors.items()})
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    for name in ("config.json", "generation_config.json"):
        shutil.copy(path / name, folder)
    return folder


def read_tensor_of(stored):
    """The value of a tensor, held or stored."""
    return stored.value if isinstance(stored, Held) else read_tensor(stored)
