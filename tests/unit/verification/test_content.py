"""Who made a checkpoint, and the size of each type of weights."""

from types import SimpleNamespace

import pytest

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.spec import TensorSpec
from quantcli.verification.content import maker_of, sizes_of


def stored(**specs):
    return {
        n.replace("_", "."): SimpleNamespace(spec=s.named(n.replace("_", ".")))
        for n, s in specs.items()
    }


def module(label, n, k, tensors):
    return SimpleNamespace(layout=SimpleNamespace(label=label), shape=(n, k), tensors=tensors)


def test_each_type_of_weights_with_its_scales_and_the_rest():
    codes, scale = TensorSpec("", "I8", (8, 4)), TensorSpec("", "F32", (8,))
    first = stored(a_weight=codes, a_scale=scale)
    second = stored(b_weight=codes, b_scale=scale)
    odd = stored(c_weight=TensorSpec("", "I32", (10,)), c_scale=scale)
    rest = stored(norm_weight=TensorSpec("", "BF16", (4,)), ids=TensorSpec("", "I64", (2,)))
    checkpoint = SimpleNamespace(tensors=first | second | odd | rest)
    modules = {"a": module("W8A8", 8, 4, first), "b": module("W8A8", 8, 4, second)}
    model = SimpleNamespace(checkpoint=checkpoint, modules=modules, unchecked={"c": "W8A8S"})
    sizes = [(s.label, s.modules, s.weights, s.bytes) for s in sizes_of(model)]
    assert sizes == [("W8A8", 2, 64, 128), ("W8A8S", 1, None, 72), ("FLOAT", 2, 4, 8 + 16)]


def test_a_stack_counts_once():
    """Modules of a stack share its tensor: what is left is the difference, not the whole again."""
    stack = stored(experts=TensorSpec("", "I8", (2, 8, 4)), norm_weight=TensorSpec("", "BF16", (4,)))
    parts = [stored(**{f"e{i}_weight": TensorSpec("", "I8", (8, 4))}) for i in range(2)]
    modules = {f"e{i}": module("W8A8", 8, 4, part) for i, part in enumerate(parts)}
    model = SimpleNamespace(checkpoint=SimpleNamespace(tensors=stack), modules=modules, unchecked={})
    assert [(s.label, s.bytes) for s in sizes_of(model)] == [("W8A8", 64), ("FLOAT", 8)]


@pytest.mark.parametrize(
    ("manifest", "config", "tool", "recipe"),
    [
        ({"tool": {"name": "quantcli", "version": "1", "packages": {"toy": "2"}}, "recipe": "a: 1"}, {},
         "quantcli 1 with toy 2", "a: 1"),
        ({"recipe": 3}, {}, "quantcli None", None),
        (None, {"quantization_config": {"quant_method": "compressed-tensors", "version": "0.9"}},
         "compressed-tensors 0.9", None),
        (None, {"quantization_config": {"producer": {"name": "modelopt", "version": "1"}}},
         "modelopt 1", None),
        (None, {"quantization_config": {"quant_method": "fp8", "version": 3}}, "fp8", None),
    ],
)  # fmt: skip
def test_the_maker(manifest, config, tool, recipe):
    maker = maker_of(manifest, Settings(config))
    assert (maker.tool, maker.recipe) == (tool, recipe)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_maker_that_nothing_names(config):
    assert maker_of(None, Settings(config)) is None
