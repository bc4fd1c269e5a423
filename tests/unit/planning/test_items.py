"""What a target packs is what its layout declares, or the plan says what is not."""

from dataclasses import replace

import pytest
import torch

from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import InputError
from quantcli.core.registry import discover
from quantcli.planning.items import dry_run
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target
from quantcli.targets.compressed_tensors.target import CompressedTensors
from quantcli.targets.layouts import Output

SCHEME = discover(Scheme)["w8a8_dynamic"]()
WEIGHT = TensorSpec("model.layers.0.mlp.up_proj.weight", "BF16", (96, 64))


class Odd(CompressedTensors):
    """compressed-tensors, but for what a test changes of its layout and of what it packs."""

    model_config = {"extra": "allow", "frozen": False}  # noqa: RUF012

    def layout(self, numerics):
        layout = super().layout(numerics)
        return replace(layout, params=tuple(map(self.declare, layout.params)))

    def pack(self, numerics, parts, shape):
        return self.change(super().pack(numerics, parts, shape))


def odd(declare=lambda param: param, change=lambda packed: packed):
    target = Odd()
    target.declare, target.change = declare, change
    return target


def outputs(target):
    return dry_run(SCHEME, target, WEIGHT, "BF16").outputs


def test_a_target_that_keeps_its_word():
    assert outputs(odd()) == (
        Output(TensorSpec("weight", "I8", (96, 64))),
        Output(TensorSpec("weight_scale", "F32", (96, 1))),
    )


def transposed(packed):
    return packed | {"weight": packed["weight"].t()}


def in_columns(param):
    if param.suffix != "weight":
        return param
    return replace(param, axis=1, shape=lambda n, k: (k, n))


def test_rows_may_lie_in_columns():
    codes, scale = outputs(odd(in_columns, transposed))
    assert codes == Output(TensorSpec("weight", "I8", (64, 96)), axis=1)
    assert (scale.axis, scale.rows) == (0, 1)
    assert codes.first(24) == 24


@pytest.mark.parametrize(
    ("declare", "change", "words"),
    [
        (lambda p: p, transposed, "`weight` is declared [0, 64], an element along dimension 0"),
        (in_columns, lambda p: p, "`weight` is declared [64, 0], an element along dimension 1"),
        (lambda p: p, lambda p: p | {"extra": p["weight"]}, "no `extra` is declared"),
        (lambda p: p, lambda p: {"weight": p["weight"]}, "`weight_scale` is declared, and pack"),
        (lambda p: p, lambda p: p | {"weight_scale": p["weight_scale"].long()}, "declared F32 or BF16"),
        (lambda p: p, lambda p: p | {"weight_scale": torch.ones(3, 1)}, "[3, 1]"),
        (lambda p: p, lambda p: p | {"weight": p["weight"].repeat(1, 2)}, "[0, 128] for 0 rows"),
        (lambda p: replace(p, rows=2), lambda p: p, "for 2 rows"),
        (lambda p: replace(p, axis=2), lambda p: p, "rows along dimension 2"),
        (
            lambda p: p if p.suffix == "weight" else replace(p, rows=0),
            lambda p: p,
            "`weight_scale` is declared [96, 1]; pack gives F32 [0, 1]",
        ),
    ],
    ids=["other dimension", "declared other", "not declared", "left out", "dtype", "constant", "width",
         "two rows", "no dimension", "declared constant"],
)  # fmt: skip
def test_a_target_that_does_not(declare, change, words):
    with pytest.raises(InputError) as caught:
        outputs(odd(declare, change))
    assert words in caught.value.what, caught.value.what
    assert (
        "target `compressed-tensors` packs other tensors than its layout declares" in caught.value.what
    )
    assert caught.value.where == f"`{WEIGHT.name}`"


@pytest.mark.parametrize("name", sorted(discover(Target)))
def test_elements_of_outputs_follow_rows(name):
    """For all that targets write: the last row of a weight is in the last element."""
    target, seen = discover(Target)[name](), 0
    for cls in discover(Scheme).values():
        scheme = cls()
        try:
            outcome = dry_run(scheme, target, TensorSpec("weight", "BF16", (256, 384)), "BF16")
        except InputError:
            continue
        for output in outcome.outputs:
            if output.rows:
                seen += 1
                last = 256 - outcome.row_multiple
                elements = outcome.row_multiple // output.rows
                assert output.first(last) + elements == output.spec.shape[output.axis]
            else:
                assert output.first(128) == 0
    assert seen
