"""Files of quantcli's with other numbers in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from quantcli.checkpoint.header import encode_header, layout
from quantcli.checkpoint.spec import TensorSpec, safetensors_dtype
from quantcli.checkpoint.tensors import tensor_bytes


def rewrite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in quantcli's own order: with the same names and shapes only numbers change."""
    specs = layout(
        TensorSpec(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
    )
    data = b"".join(tensor_bytes(tensors[spec.name].contiguous()) for spec in specs)
    path.write_bytes(encode_header(specs) + data)
