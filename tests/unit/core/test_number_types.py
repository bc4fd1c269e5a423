"""The tables of types, and what their stored forms stand for."""

import math

import pytest
import torch

from quantcli.checkpoint.spec import DTYPES, torch_dtype
from quantcli.core.codes import code_values, scale_values, scales_to_store
from quantcli.core.number_types import ELEMENTS, SCALES
from quantcli.core.numerics import Operand
from tests.quantized import fp8_number


def numbers(element):
    """The number of each code, by the definition of its type."""
    if element.name == "fp8_e4m3":
        return [fp8_number(code) for code in range(256)]
    if element.name == "fp8_e5m2":  # two bits of a fraction; the highest exponent is Inf and NaN
        pairs = [(e, f) for e in range(31) for f in range(4)]
        positive = [(4 + f if e else f) * 2.0 ** (max(e, 1) - 17) for e, f in pairs]
        rest = [math.inf, math.nan, math.nan, math.nan]
        return [*positive, *rest, *(-value for value in [*positive, *rest])]
    if element.name == "fp4_e2m1":  # one bit of a fraction; the lowest exponent is subnormal
        halves = [(e, f) for e in range(4) for f in range(2)]
        positive = [(1 + f / 2) * 2.0 ** (e - 1) if e else f / 2 for e, f in halves]
        return [*positive, *(-value for value in positive)]
    return [float(n) for n in range(-(2 ** (element.bits - 1)), 2 ** (element.bits - 1))]


@pytest.mark.parametrize("name", sorted(ELEMENTS))
def test_an_element_type_has_the_numbers_of_its_codes(name):
    element = ELEMENTS[name]
    finite = [value for value in numbers(element) if math.isfinite(value)]
    assert (element.least, element.largest) == (min(finite), max(finite))
    assert element.step == min(value for value in finite if value > 0)
    assert len(numbers(element)) == 2**element.bits
    assert DTYPES[element.dtype][0] == 8
    assert element.per_byte * element.bits <= 8


def test_codes_of_four_bits_are_read_two_from_a_byte():
    """The even column is in the low four bits."""
    element = ELEMENTS["fp4_e2m1"]
    octets = torch.arange(256, dtype=torch.uint8).view(8, 32)
    found = code_values(octets, element)
    values = numbers(element)
    assert found.shape == (8, 64)
    assert found.flatten().tolist() == [values[n] for b in range(256) for n in (b & 15, b >> 4)]


def test_every_e5m2_code():
    element = ELEMENTS["fp8_e5m2"]
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)
    expected = torch.tensor(numbers(element))
    assert torch.equal(code_values(stored, element).nan_to_num(-1), expected.nan_to_num(-1))


def test_every_exponent():
    stored = torch.arange(256, dtype=torch.uint8).view(16, 16)
    found = scale_values(stored)
    expected = [2.0 ** (byte - 127) for byte in range(255)]
    assert found.flatten()[:255].tolist() == expected
    assert math.isnan(found[15, 15])
    assert torch.equal(scales_to_store(found.to(torch.float8_e8m0fnu)), stored)


@pytest.mark.parametrize("name", sorted(SCALES))
def test_the_least_scale_is_a_number_of_its_type(name):
    scale = SCALES[name]
    least = torch.tensor([scale.least]).to(torch_dtype(scale.dtype))
    assert float(least) == scale.least > 0
    assert scales_to_store(least).dtype == torch_dtype(scale.stored)
    assert float(scale_values(scales_to_store(least))) == scale.least


def test_operands_as_text():
    assert str(Operand("int8", "token", dynamic=True)) == "int8 per token dynamic"
    group = Operand("fp8_e4m3", "group", block=(1, 32), scale="e8m0")
    assert str(group) == "fp8_e4m3 per group of 1 x 32, e8m0 scales"
    assert (group.group_size, group.scale_rule) == (32, "exponent")
    both = Operand("fp4_e2m1", "group", block=(1, 16), scale="e4m3", global_scale=True)
    assert str(both) == "fp4_e2m1 per group of 1 x 16, e4m3 scales, a global scale"
    assert both.scale_rule == "positive"
    assert [Operand(name, "channel").scale_rule for name in ("int4", "fp8_e4m3")] == [
        "signed",
        "positive",
    ]
