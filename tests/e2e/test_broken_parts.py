"""Schemes and targets that do on real rows what they did not do for the plan: nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.compressed_tensors.target import CompressedTensors
from tests.e2e.conftest import Box

SCHEME = "w8a8_dynamic"
RECIPE = f'target: compressed-tensors\nrules: [{{match: "*_proj", scheme: {SCHEME}}}]\n'
Change = Callable[[dict[str, Any]], Mapping[str, Any]]


def without_scale(packed: dict[str, Any]) -> dict[str, Any]:
    return {"weight": packed["weight"]}


def with_another(packed: dict[str, Any]) -> dict[str, Any]:
    return packed | {"more": packed["weight"]}


def another_dtype(packed: dict[str, Any]) -> dict[str, Any]:
    return packed | {"weight": packed["weight"].view(torch.uint8)}


def transposed(packed: dict[str, Any]) -> dict[str, Any]:
    return packed | {"weight": packed["weight"].t()}


def as_many_bytes(packed: dict[str, Any]) -> dict[str, Any]:
    return packed | {"weight_scale": packed["weight_scale"][::2].double()}


def no_tensor(packed: dict[str, Any]) -> dict[str, Any]:
    return packed | {"weight": packed["weight"].numpy()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_scale, "it gives weight, not I8 [16, 32]"),
        (with_another, "it gives weight, weight_scale, more, not I8 [16, 32]"),
        (another_dtype, "it gives U8 [16, 32], not I8 [16, 32]"),
        (transposed, "it gives I8 [32, 16], not I8 [16, 32]"),
        (as_many_bytes, "it gives F64 [8, 1], not F32 [16, 1]"),
        (no_tensor, "not I8 [16, 32]"),
    ],
)
def test_other_tensors_than_planned(
    box: Box, monkeypatch: pytest.MonkeyPatch, change: Change, says: str
) -> None:
    pack = CompressedTensors.pack

    def packed(self: CompressedTensors, numerics: Any, parts: Any, shape: Any) -> Any:
        found = pack(self, numerics, parts, shape)
        return change(found) if len(parts["weight"]) >= 16 else found

    monkeypatch.setattr(CompressedTensors, "pack", packed)
    box.edit_recipe(RECIPE)
    assert box.run("--plan").code == 0
    done = box.run()
    assert done.code == 2, done.err
    assert "packs other tensors than it did for the plan" in done.err
    assert says in done.err
    assert not box.out.exists()


def test_another_order_of_tensors(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are written by name."""
    box.edit_recipe(RECIPE)
    assert box.run().code == 0
    (file,) = box.out.glob("*.safetensors")
    expected, pack = file.read_bytes(), CompressedTensors.pack

    def packed(self: CompressedTensors, numerics: Any, parts: Any, shape: Any) -> dict[str, Tensor]:
        found = pack(self, numerics, parts, shape)
        return dict(reversed(found.items())) if len(parts["weight"]) >= 16 else found

    monkeypatch.setattr(CompressedTensors, "pack", packed)
    assert box.run("--force").code == 0
    assert file.read_bytes() == expected


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_a_scheme_without_a_part(box: Box, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    cls = discover(Scheme)[SCHEME]
    quantize = cls.quantize
    monkeypatch.setattr(cls, "quantize", lambda *args: {**quantize(*args), part: None})
    box.edit_recipe(RECIPE)
    done = box.run("--plan")
    assert done.code == 2, done.err
    assert f"scheme `{SCHEME}` gives no tensor `{part}`" in done.err


@pytest.mark.parametrize(
    "bias", [torch.zeros(15).bfloat16(), torch.zeros(16, dtype=torch.int32), torch.zeros(16, 1)]
)
def test_a_bias_that_does_not_fit_a_scheme_without_data(box: Box, bias: Tensor) -> None:
    file = box.model / "model.safetensors"
    name = "model.layers.0.self_attn.o_proj.bias"
    save_file({**load_file(file), name: bias}, file, metadata={"format": "pt"})
    done = box.run()
    assert done.code == 2, done.err
    assert "it must be float, one value for each of 16 rows" in done.err
    assert name in done.err
