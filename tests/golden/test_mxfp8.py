"""MXFP8 for vLLM-Ascend against the reference producer's checkpoint: the same form, less error."""

import json

import pytest
import torch

from quantcli.commands import quantize as commands
from tests.golden.short import DESCRIPTION, assemble, short_model, tensors
from tests.golden.test_ascend import RECIPES


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """Source, reference and ours, as folders."""
    folder = tmp_path_factory.mktemp("mxfp8")
    source, out = short_model(folder / "model"), folder / "out"
    commands.quantize(commands.plan(RECIPES / "mxfp8.yaml", model=str(source), out=out))
    return source, assemble("w8a8_mxfp8", folder / "reference"), out


def test_same_tensors(trio):
    theirs, ours = tensors(trio[1]), tensors(trio[2])
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
    assert sum(tensor.dtype == torch.uint8 for tensor in ours.values()) == 14


def test_same_description(trio):
    table, expected = (json.loads((folder / DESCRIPTION).read_text()) for folder in trio[2:0:-1])
    assert table == expected
    assert table["group_size"] == 32
    assert table["model_quant_type"] == "W8A8_MXFP8"


def test_exponents_are_those_of_the_reference_or_one_more(trio):
    """One more where the largest weight of a group would be clipped: a mantissa over 1.75."""
    source, theirs, ours = map(tensors, trio)
    equal = total = 0
    for name in (name for name in ours if f"{name}_scale" in ours):
        amax = source[name].float().view(len(source[name]), -1, 32).abs().amax(-1)
        mantissa = 2 * torch.frexp(amax).mantissa
        step = ours[f"{name}_scale"].int() - theirs[f"{name}_scale"].int()
        # the reference takes logarithms in bfloat16, and is off by one near powers of two
        sound = (mantissa > 1.02) & (mantissa < 1.98)
        assert torch.equal(step[sound], (mantissa > 1.75).int()[sound]), name
        equal += int((step == (mantissa > 1.75)).sum())
        total += step.numel()
    assert equal / total > 0.98


def test_less_error_than_the_reference(trio):
    source, theirs, ours = map(tensors, trio)

    def error(table):
        lost = signal = 0.0
        for name in (name for name in ours if f"{name}_scale" in ours):
            power = torch.ldexp(torch.ones(()), table[f"{name}_scale"].float() - 127)
            weight = table[name].float() * power.repeat_interleave(32, 1)
            lost += float((weight - source[name].float()).double().square().sum())
            signal += float(source[name].double().square().sum())
        return (lost / signal) ** 0.5

    assert error(ours) < 0.0268
    assert error(ours) / error(theirs) < 0.9
