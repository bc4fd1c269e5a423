"""Laws of compiled kernels: the bits of the torch code, for every dtype, shape and nasty value."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantcli.core.codes import (
    code_values,
    fp8_values,
    pack_signed,
    scale_groups,
    unpack_nibbles,
    unpack_rows,
    unpack_signed,
)
from quantcli.core.kernels import machine
from quantcli.core.kernels import tensors as kernels
from quantcli.core.number_types import ELEMENTS
from quantcli.core.registry import discover
from quantcli.schemes.arithmetic import clipping, fp4, rounding, tiles, zero_points
from quantcli.schemes.base import Scheme
from tests.measured import constants
from tests.property.test_rounding import fitting, weights

F32 = torch.float32
SOURCES = [torch.bfloat16, torch.float16, torch.float32]
ENGINES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
SEARCHES = {
    "int4": clipping.INT4,
    "int4 in float64": replace(clipping.INT4, sums=torch.float64),
    "int8": clipping.INT8,
    "fp8": clipping.FP8,
}
LIMITS = {"int4": 7.0, "int4 in float64": 7.0, "int8": 127.25, "fp8": 448.0}


class Paths:
    """Computes by torch and by machine code, and checks that it was so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.ran: set[str] = set()
        lookup = machine.kernel

        def noted(*key: str) -> machine.Function | None:
            function = lookup(*key)
            if function is not None:
                self.ran.add(key[0])
            return function

        monkeypatch.setattr(kernels, "kernel", noted)

    def both(self, work: Callable[[], object], *names: str) -> tuple[object, object]:
        """The results of `work`. names: the kernels that must have run for the second, and no other."""
        self.ran.clear()
        self._patch.setenv(machine.SWITCH, "off")
        by_torch = work()
        assert self.ran == set()
        self._patch.setenv(machine.SWITCH, "on")
        compiled = work()
        assert machine.problem() is None
        assert self.ran == set(names)
        return by_torch, compiled

    def same(self, work: Callable[[], object], *names: str) -> None:
        """`work` gives the same bits both ways."""
        check(*self.both(work, *names))


def check(by_torch: object, compiled: object) -> None:
    if isinstance(by_torch, tuple):
        assert isinstance(compiled, tuple)
        for one, other in zip(by_torch, compiled, strict=True):
            check(one, other)
        return
    assert isinstance(by_torch, Tensor)
    assert isinstance(compiled, Tensor)
    assert (by_torch.dtype, by_torch.shape) == (compiled.dtype, compiled.shape)
    unlike = bits(by_torch) != bits(compiled)
    if by_torch.is_floating_point():
        unlike &= ~(torch.isnan(by_torch.float()) & torch.isnan(compiled.float()))
    if bool(unlike.any()):
        place = tuple(unlike.nonzero()[0].tolist())
        count = int(unlike.sum())
        raise AssertionError(f"{count} differ; {place}: {by_torch[place]} and {compiled[place]}")


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


@pytest.fixture
def paths(monkeypatch):
    return Paths(monkeypatch)


def nasty(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A weight [n, k] with rows of several kinds in turn, each of them finite."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator) * 0.02
    for row in range(n):
        kind = row % 9
        if kind == 1:
            rows[row] = torch.where(torch.arange(k) % 2 == 0, 0.0, -0.0)
        elif kind == 2:  # subnormal numbers of the dtype
            rows[row] = torch.randn(k, generator=generator) * torch.finfo(dtype).tiny / 4
        elif kind == 3:  # halves: ties of codes, if the scale is a power of two
            rows[row] = (torch.arange(k) % 31 - 15) / 2
        elif kind == 4:  # heavy tails
            normal = torch.randn(4, k, generator=generator)
            rows[row] = normal[0] / normal[1:].square().mean(0).sqrt() * 0.01
        elif kind == 5:  # large
            rows[row] = rows[row] * (torch.finfo(dtype).max / 4)
        elif kind == 6:  # all the same
            rows[row] = -0.125
        elif kind == 7:  # one outlier
            rows[row, row % k] = 3.0
    return rows.to(dtype)


SHAPES = [(1, 1), (9, 15), (18, 16), (11, 17), (5, 63), (9, 64), (20, 128), (9, 300), (130, 129)]


# --- the largest values ---


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_largest_values(paths, dtype, shape):
    rows = nasty(*shape, dtype)
    for block in ((1, 32), (1, 128), (1, 7), (128, 128), (3, 5)):
        paths.same(lambda block=block: tiles.absmax(rows, block), "absmax_tiles")
    paths.same(lambda: rounding.absmax(rows), "absmax_tiles")
    paths.same(lambda: rounding.absmax(rows, 0), "absmax_columns")
    paths.same(lambda: clipping.facing_down(rows), "extremes")


@pytest.mark.parametrize("dtype", SOURCES)
def test_largest_values_of_every_width(paths, dtype):
    for k in range(1, 301):
        rows = nasty(5, k, dtype, seed=k)
        paths.same(lambda rows=rows: rounding.absmax(rows), "absmax_tiles")
        paths.same(lambda rows=rows: rounding.absmax(rows, 0), "absmax_columns")
        paths.same(lambda rows=rows: clipping.facing_down(rows), "extremes")


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_show_in_the_largest_value(paths, dtype, value):
    for place in ((0, 0), (3, 40), (4, 299)):
        rows = nasty(5, 300, dtype)
        rows[place] = value
        paths.same(lambda rows=rows: tiles.absmax(rows, (128, 128)), "absmax_tiles")
        amax = rounding.absmax(rows)
        columns = rounding.absmax(rows, 0)
        assert not bool(torch.isfinite(amax[place[0]]))
        assert not bool(torch.isfinite(columns[0, place[1]]))
        paths.same(lambda rows=rows: rounding.absmax(rows, 0), "absmax_columns")
        rows[1, place[1]] = float("nan")  # on top of both
        paths.same(lambda rows=rows: rounding.absmax(rows, 0), "absmax_columns")


# --- codes ---


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every number of 16 bits that is not NaN."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return numbers[~torch.isnan(numbers)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "scale", [1.0, 2.0**-9, 0.0078125, 0.02, 1 / 3, 2.0**-126, 2.0**-140, 3e-45, 5e4, 3e38]
)
def test_codes_of_every_number(paths, dtype, scale):
    rows, one = all_numbers(dtype), torch.full((1,), scale)
    paths.same(lambda: rounding.to_fp8_e4m3(rows, one, clip=True), "encode")
    for codes in (clipping.INT8, clipping.INT4):
        paths.same(lambda codes=codes: codes.codes(rows, one), "encode")


def test_ties_of_e4m3(paths):
    """Halfway between two numbers, also subnormal ones, and next to it; half to even."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    near = [torch.nextafter(halves, torch.full_like(halves, towards)) for towards in (0.0, 1e9)]
    rows = torch.cat([numbers, halves, *near, torch.tensor([0.0, 448.01, 463.9, 464.0, 1e30])])
    rows = torch.cat([rows, -rows])
    one = torch.ones(1)
    paths.same(lambda: rounding.to_fp8_e4m3(rows, one, clip=True), "encode")
    even = rounding.to_fp8_e4m3(halves, one).view(torch.uint8)
    assert bool((even % 2 == 0).all())


def test_every_e4m3_number_has_its_code(paths):
    octets = torch.arange(256).to(torch.uint8)
    finite = octets[(octets & 0x7F) != 0x7F]
    rows = finite.view(torch.float8_e4m3fn).float()
    by_torch, compiled = paths.both(lambda: rounding.to_fp8_e4m3(rows, torch.ones(1)), "encode")
    assert torch.equal(compiled.view(torch.uint8), finite)
    check(by_torch, compiled)


def test_ties_of_integers(paths):
    rows = torch.arange(-600, 601) / 4
    for codes in (clipping.INT8, clipping.INT4):
        for scale in (1.0, -1.0, 0.5, -2.0, 2.0**-130):
            one = torch.tensor([scale])
            scaled = rows * abs(scale)
            paths.same(lambda c=codes, r=scaled, s=one: c.codes(r, s), "encode")


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_of_rows(paths, dtype, engine, shape):
    rows = nasty(*shape, dtype)
    scale = rounding.int8_scale(rows, engine)
    paths.same(lambda: rounding.to_int8(rows, scale), "encode")
    scale = rounding.channel_scale(rows, 448.0, engine)
    paths.same(lambda: rounding.to_fp8_e4m3(rows, scale), "encode")
    paths.same(lambda: rounding.to_fp8_e4m3(rows, scale / 3, clip=True), "encode")
    paths.same(lambda: clipping.INT4.codes(rows, -scale * 50), "encode")
    groups = tiles.cut(rows, 16)
    scale = rounding.channel_scale(groups, 448.0, engine)
    paths.same(lambda: rounding.to_fp8_e4m3(groups, scale), "encode")


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("element", sorted(kernels.CODES))
def test_codes_of_tiles(paths, dtype, element):
    """Also of tiles that do not fill the weight, which torch has only with spread scales."""
    rows = nasty(70, 100, dtype)
    codes = {"int4": clipping.INT4, "int8": clipping.INT8, "fp8_e4m3": clipping.FP8}[element]
    for block in ((1, 32), (32, 32), (70, 100), (128, 128), (1, 100), (3, 7)):
        scale = (tiles.absmax(rows, block) / LIMITS["int4"]).clamp_min(2.0**-126)
        found = kernels.encode(rows, scale, element, *block)
        each = tiles.spread(scale, block, *rows.shape)
        expected = codes.nearest(rows.float() / each)
        assert found is not None
        check(expected.to(found.dtype), found)


# --- the search ---


def searched(rows: Tensor, engine: torch.dtype, name: str, importance: Tensor | None) -> Tensor:
    widest = rounding.channel_scale(rows, LIMITS[name], engine)
    return clipping.least_error(rows, widest, engine, SEARCHES[name], importance)


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_scales_with_the_least_error(paths, dtype, engine, name):
    generator = torch.Generator().manual_seed(7)
    for n, k in SHAPES:
        rows = nasty(n, k, dtype)
        each = torch.rand(k, generator=generator)
        several = torch.rand(3, k, generator=generator) ** 6
        for importance in (None, torch.ones(1), each, torch.zeros(k)):
            paths.same(
                lambda r=rows, i=importance: searched(r, engine, name, i),
                "absmax_tiles", "least_error",
            )  # fmt: skip
        stacked = torch.stack([rows, rows.flip(0), rows * 2], -2)  # [n, 3, k]
        paths.same(
            lambda r=stacked, i=several: searched(r, engine, name, i), "absmax_tiles", "least_error"
        )


@pytest.mark.parametrize("name", sorted(SEARCHES))
def test_scales_of_every_width(paths, name):
    for k in range(1, 301):
        rows = nasty(3 if k % 5 else 9, k, torch.bfloat16, seed=k)
        paths.same(
            lambda rows=rows: searched(rows, torch.bfloat16, name, None), "absmax_tiles", "least_error"
        )


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_rows_that_are_not_finite_have_no_finite_scale(paths, dtype, name):
    for value in (float("nan"), float("inf"), -float("inf")):
        rows = nasty(9, 100, dtype)
        rows[0, 99] = rows[4, 0] = value
        scale = searched(rows, torch.float32, name, None)
        assert not bool(torch.isfinite(scale[[0, 4]]).any())
        assert bool(torch.isfinite(scale[[1, 2, 3, 5]]).all())
        paths.same(
            lambda rows=rows: searched(rows, torch.float32, name, None), "absmax_tiles", "least_error"
        )


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("engine", ENGINES)
def test_int4_that_faces_down(paths, dtype, engine):
    for (n, k), columns in itertools.product(SHAPES, (32, 128)):
        rows = nasty(n, k, dtype)

        def scales_and_codes(rows=rows, columns=columns):
            groups = tiles.cut(rows, columns)
            sign, above = clipping.facing_down(groups)
            widest = clipping.widest_signed(rounding.absmax(groups), above, engine)
            amax = rounding.absmax(rows, 0).squeeze(0)
            importance = clipping.in_groups(clipping.by_columns(amax), columns)
            scale = clipping.least_error(groups, widest, engine, clipping.INT4, importance, sign)
            return sign, widest, scale, clipping.INT4.codes(groups, scale * sign)

        paths.same(
            scales_and_codes, "absmax_tiles", "absmax_columns", "extremes", "least_error", "encode"
        )


# --- four-bit floats ---


GRIDS = {"nvfp4": fp4.NVFP4, "mxfp4": fp4.MXFP4}


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("search", [True, False])
def test_four_bit_floats(paths, dtype, name, search):
    """Also with a global scale that is much too large, or so small that every group is cut off."""
    for shape in (*SHAPES, (64, 1000)):
        rows = nasty(*shape, dtype)
        amax = rows.float().abs().max().view(1)
        scales = [fp4.global_scale(amax * factor) for factor in (1.0, 3.0, 0.01, 1e30)]
        for whole in scales if name == "nvfp4" else [None]:
            paths.same(
                lambda rows=rows, whole=whole: fp4.quantize(rows, whole, GRIDS[name], search=search),
                "encode_groups",
            )
    stacked = torch.stack([rows, rows.flip(0)])
    paths.same(lambda: fp4.quantize(stacked, scales[0], GRIDS[name], search=search), "encode_groups")


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_four_bit_floats_of_every_width(paths, name):
    for k in range(1, 301):
        rows = nasty(3 if k % 5 else 9, k, torch.bfloat16, seed=k)
        whole = fp4.global_scale(rows.float().abs().max().view(1)) if name == "nvfp4" else None
        paths.same(
            lambda rows=rows, whole=whole: fp4.quantize(rows, whole, GRIDS[name], search=True),
            "encode_groups",
        )


@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("search", [True, False])
def test_four_bit_floats_of_every_magnitude(paths, name, search):
    """Around every scale, where one bit decides which are tried; and halfway numbers."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    rows = numbers[torch.isfinite(numbers)].view(-1, 1) * torch.tensor([1.0, 0.75, -0.5, 0.4375])
    rows = rows.bfloat16().repeat(1, 12)
    for amax in (3e38, 1.0, 1e-20) if name == "nvfp4" else (0.0,):
        whole = fp4.global_scale(torch.tensor([amax])) if name == "nvfp4" else None
        paths.same(
            lambda whole=whole: fp4.quantize(rows, whole, GRIDS[name], search=search), "encode_groups"
        )


@pytest.mark.parametrize("dtype", SOURCES)
@pytest.mark.parametrize("name", sorted(GRIDS))
@pytest.mark.parametrize("search", [True, False])
def test_groups_that_are_not_finite_have_no_finite_scale(paths, dtype, name, search):
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        rows = nasty(9, 100, dtype)
        whole = fp4.global_scale(rows.float().abs().max().view(1)) if name == "nvfp4" else None
        rows[0, 99] = rows[4, 0] = value
        paths.same(
            lambda rows=rows, whole=whole: fp4.quantize(rows, whole, GRIDS[name], search=search)[1],
            "encode_groups",
        )
        scale = fp4.quantize(rows, whole, GRIDS[name], search=search)[1]
        assert int((~torch.isfinite(scale)).sum()) == 2
        assert not bool(torch.isfinite(scale[[0, 4], [-1, 0]]).any())


# --- stored codes ---


@pytest.mark.parametrize("k", [2, 8, 30, 64, 128, 200, 256])
def test_numbers_of_fp8_codes(paths, k):
    """All 256 codes, alone and times the scales of groups: subnormal, large, and ones that are not."""
    codes = torch.arange(256).to(torch.uint8).repeat(k).view(256, k)
    paths.same(lambda: fp8_values(codes), "decode")
    paths.same(lambda: fp8_values(codes.view(torch.float8_e4m3fn)), "decode")
    generator = torch.Generator().manual_seed(k)
    special = torch.tensor([1e-40, 3e38, float("nan"), float("inf"), 0.0, -0.5, 1e-45, 2.0**-126])
    for columns in (1, 7, 32, 128, 256):
        scale = torch.randn(256, -(-k // columns), generator=generator)
        scale[: len(special), 0] = special
        paths.same(lambda s=scale, c=columns: fp8_values(codes, s, c), "decode")
    finite = (codes & 0x7F) != 0x7F
    expected = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(fp8_values(codes)[finite], expected[finite])
    assert bool(torch.isnan(fp8_values(codes)[~finite]).all())


def test_numbers_of_every_encoder(paths):
    """What a type of codes is in compiled code agrees with its entry in core/number_types.py."""
    octets = torch.arange(256).to(torch.uint8)
    paths.same(lambda: code_values(octets, ELEMENTS["fp4_e2m1"]), "decode")
    paths.same(lambda: code_values(octets.view(2, 128), ELEMENTS["fp4_e2m1"]), "decode")
    for name in ("int8", "int4"):
        signed = torch.arange(-128, 128).to(torch.int8).view(4, 64)
        scale = torch.tensor([[0.1, 3.0], [1e-40, 1e38], [-1.0, 0.0], [0.3, 7e-3]])
        found = kernels.decode(signed, name, scale, 32)
        assert found is not None
        check(scale_groups(signed.float(), scale, 32), found)
    pairs = octets.view(4, 64)
    found = kernels.decode(pairs, "fp4_e2m1", scale.repeat(1, 2), 32)
    assert found is not None
    check(scale_groups(code_values(pairs, ELEMENTS["fp4_e2m1"]), scale.repeat(1, 2), 32), found)


@pytest.mark.parametrize("k", [8, 24, 64, 1000])
def test_packed_codes(paths, k):
    generator = torch.Generator().manual_seed(k)
    codes = torch.randint(-8, 8, (17, k), generator=generator).to(torch.int8)
    paths.same(lambda: pack_signed(codes, 4), "pack_nibbles")
    packed = pack_signed(codes, 4)
    for width in (k, k - 3):
        paths.same(lambda width=width: unpack_signed(packed, 4, width), "unpack_nibbles")
        assert torch.equal(unpack_signed(packed, 4, width), codes[:, :width])
    paths.same(lambda: unpack_rows(packed, 4), "unpack_nibbles")
    octets = torch.arange(256).to(torch.uint8)
    paths.same(lambda: unpack_nibbles(octets), "unpack_nibbles")
    paths.same(lambda: unpack_nibbles(octets[::2]))
    paths.same(lambda: pack_signed(codes.T.contiguous().T, 4))
    paths.same(lambda: pack_signed(codes[:0], 4))
    paths.same(lambda: unpack_signed(packed[:0], 4, k))


# --- whole schemes ---


@settings(derandomize=True, max_examples=300, deadline=None)
@given(weights(), st.sampled_from(ENGINES), st.sampled_from(sorted(discover(Scheme))), st.booleans())
def test_schemes(weight, held, name, stacked):
    scheme = discover(Scheme)[name]()
    weight = fitting(scheme, weight)
    with pytest.MonkeyPatch.context() as patch:
        found = constants(scheme, torch.bfloat16, weight[:, :3], weight)
        if stacked and not scheme.row_stats & found.keys():
            weight = torch.stack([weight, weight.flip(0)])

        def parts():
            made = scheme.quantize(weight, held, found)
            return tuple(made[name] for name in sorted(made))

        patch.setenv(machine.SWITCH, "off")
        by_torch = parts()
        patch.setenv(machine.SWITCH, "on")
        check(by_torch, parts())


# --- who serves ---


def test_torch_serves_what_kernels_do_not_take(paths):
    rows = nasty(18, 64, torch.bfloat16)
    for other in (rows.T, rows[:, ::2], rows[:, 3:40]):
        paths.same(lambda other=other: rounding.absmax(other))
        paths.same(lambda other=other: rounding.absmax(other, 0))
        scale = rounding.int8_scale(other, F32)
        paths.same(lambda other=other, scale=scale: rounding.to_int8(other, scale))
        paths.same(
            lambda o=other, s=scale: clipping.least_error(o, s, F32, clipping.INT8, None)
        )  # fmt: skip
    learned = rows.float().requires_grad_()
    assert kernels.absmax_tiles(learned, 1, 64) is None
    assert kernels.absmax_tiles(rows.double(), 1, 64) is None


@pytest.mark.parametrize("dtype", SOURCES)
def test_empty_weights(paths, dtype):
    for shape in ((0, 64), (3, 0, 64), (0, 0, 64)):
        rows = torch.empty(shape, dtype=dtype)
        paths.same(lambda rows=rows: rounding.absmax(rows))
        paths.same(lambda rows=rows: clipping.facing_down(rows))
        scale = torch.empty((*shape[:-1], 1))
        paths.same(lambda rows=rows, scale=scale: rounding.to_int8(rows, scale))
        paths.same(
            lambda rows=rows, scale=scale: clipping.least_error(rows, scale, F32, clipping.INT4, None)
        )
    flat = torch.empty((0, 64), dtype=dtype)
    paths.same(lambda: tiles.absmax(flat, (128, 128)))


def test_switched_off(monkeypatch):
    rows = nasty(3, 16, torch.bfloat16)
    assert kernels.absmax_tiles(rows, 1, 16) is not None
    monkeypatch.setenv(machine.SWITCH, "off")
    assert kernels.absmax_tiles(rows, 1, 16) is None
    assert machine.kernel("absmax_tiles", "bfloat16") is None


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("weighed", ["whole range", "alike", "by columns", "in groups"])
def test_zero_points(paths, source, engine, weighed):
    """Scales, zero points, codes of groups, some of them of zeros, of one sign, of huge values."""
    generator = torch.Generator().manual_seed(5)
    for columns in (7, 32, 65):
        groups = nasty(27, 3 * columns, source, columns).view(27, 3, columns)
        importance = {
            "whole range": None,
            "alike": torch.ones(1),
            "by columns": torch.rand(columns, generator=generator),
            "in groups": torch.rand(3, columns, generator=generator),
        }[weighed]

        def work(groups=groups, importance=importance):
            scale, zero = zero_points.search(groups, engine, importance)
            return scale, zero, zero_points.codes(groups, scale, zero)

        paths.same(work, "extremes", "least_error_shifted", "encode_shifted")
