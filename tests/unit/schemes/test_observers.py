"""What observers measure, against plain formulas; what they choose, against the engine's arithmetic."""

import math
import threading

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from quantcli.schemes.arithmetic import affine
from quantcli.schemes.arithmetic.observers import (
    ChannelAmax,
    ChannelSquare,
    Distribution,
    MinMax,
    MovingAverage,
    Observer,
    percentile,
)
from quantcli.schemes.w8a8_static import Int8Static, W8A8Static

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KINDS = ["minmax", "moving_average", "percentile", "mse"]
ALL = {
    "minmax": lambda: Observer(MinMax()),
    "moving_average": lambda: Observer(MovingAverage(0.9)),
    "distribution": lambda: Observer(Distribution()),
    "channels": lambda: Observer(ChannelAmax()),
    "squares": lambda: Observer(ChannelSquare()),
    **{f"static {k}": lambda k=k: W8A8Static(observer=k).observer(torch.bfloat16) for k in KINDS},
}


def inputs(dtype=torch.bfloat16, tokens=600, k=24, seed=0):
    """A shifted bell with a few outliers, not the same at both ends."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) * 0.7 + 0.4
    x[5, 3], x[9, -1] = 11.0, -4.0
    return x.to(dtype)


def same(a, b):
    a, b = a.stats(), b.stats()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# the same in any order and any batches


@pytest.mark.parametrize("name", [name for name in ALL if "moving" not in name])
@pytest.mark.parametrize("dtype", DTYPES)
def test_order_and_batches_do_not_matter(name, dtype):
    x = inputs(dtype)
    whole, pieces = ALL[name](), ALL[name]()
    whole.update(x, 0)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for number, rows in enumerate(order.split([1, 7, 0, 92, 200, 300])):
        pieces.update(x[rows], 5 - number)
    assert whole.tokens == pieces.tokens == 600
    assert same(whole, pieces)
    nothing = ALL[name]()
    assert not same(whole, nothing), "the test would not see a difference"


@pytest.mark.parametrize("name", ALL)
def test_batches_may_come_in_pieces_and_in_any_order(name):
    x = inputs()
    one, other = ALL[name](), ALL[name]()
    for batch in range(6):
        one.update(x[100 * batch : 100 * batch + 100], batch)
    for batch in (3, 1, 5, 0, 2, 4):
        for half in (50, 0):
            start = 100 * batch + half
            other.update(x[start : start + 50], batch)
    assert same(one, other)


@pytest.mark.parametrize("name", ALL)
def test_threads_may_share_an_observer(name):
    x = inputs(tokens=400)
    alone, shared = ALL[name](), ALL[name]()
    threads = []
    for batch in range(20):
        rows = x[20 * batch : 20 * batch + 20]
        alone.update(rows, batch)
        threads.append(threading.Thread(target=shared.update, args=(rows, batch)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared.tokens == 400
    assert same(alone, shared)


@pytest.mark.parametrize("name", ALL)
def test_an_observer_takes_over_what_others_saw(name):
    x = inputs()
    alone, first, second = ALL[name](), ALL[name](), ALL[name]()
    for batch in range(4):
        rows = x[150 * batch : 150 * batch + 150]
        alone.update(rows, batch)
        (first if batch % 2 else second).update(rows, batch)
    total = ALL[name]()
    for other in (second, ALL[name](), first):
        total.absorb(other)
    assert total.tokens == 600
    assert total.finite
    assert same(alone, total)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_nan_and_inf_do_not_vanish(name, dtype, value):
    x = inputs(dtype)
    sound, broken = ALL[name](), ALL[name]()
    sound.update(x, 0)
    broken.update(x, 0)
    assert sound.finite
    assert broken.finite
    x[7, 2] = value
    broken.update(x[:20], 1)
    assert not broken.finite
    assert broken.tokens == 620
    broken.update(inputs(dtype), 2)
    assert not broken.finite, "a sound batch does not heal it"
    taker = ALL[name]()
    taker.absorb(broken)
    assert not taker.finite
    assert all(bool(torch.isfinite(t).all()) for t in broken.stats().values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_finite_numbers_are_finite(dtype):
    top = torch.finfo(dtype).max
    for make in (MinMax, ChannelAmax, *([Distribution] if dtype != torch.float32 else [])):
        observer = Observer(make())
        observer.update(torch.tensor([[top, -top]], dtype=dtype), 0)
        assert observer.finite


# ranges


def test_extremes_include_zero():
    extremes = MinMax()
    observer = Observer(extremes)
    observer.update(torch.tensor([[2.0, 5.0]]), 0)
    assert extremes.range() == (0.0, 5.0)
    observer.update(torch.tensor([[-3.0, 1.0]]), 1)
    stats = observer.stats()
    assert (stats["input_min"].tolist(), stats["input_max"].tolist()) == ([-3.0], [5.0])
    assert stats["input_min"].dtype == torch.float32


def test_moving_average_by_hand():
    average = MovingAverage(0.75)
    observer = Observer(average)
    for batch, (low, high) in enumerate([(-4.0, 8.0), (-2.0, 1.0), (3.0, 16.0)]):
        observer.update(torch.tensor([[low, high]]), batch)
    low = 0.75 * (0.75 * -4 + 0.25 * -2) + 0.25 * 0  # the third batch is all above 0
    high = 0.75 * (0.75 * 8 + 0.25 * 1) + 0.25 * 16
    assert average.range() == (low, high)
    assert observer.stats()["input_max"].tolist() == [16.0], "stats are what was seen"
    last, first = MovingAverage(0.0), MovingAverage(1.0)
    for o in (last, first):
        for batch, value in enumerate([2.0, 7.0]):
            Observer(o).update(torch.tensor([[value]]), batch)
    assert (last.range(), first.range()) == ((0.0, 7.0), (0.0, 2.0))


# distributions


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_distribution_counts_every_value(dtype):
    x = inputs(dtype)
    x[0, :4] = torch.tensor([0.0, -0.0, torch.finfo(dtype).smallest_normal / 4, -1e-6]).to(dtype)
    distribution = Distribution()
    observer = Observer(distribution)
    observer.update(x.T, 0)  # not contiguous
    values, counts = distribution.values()
    counted = x.bfloat16() if dtype == torch.float32 else x
    expected, times = np.unique(counted.float().numpy(), return_counts=True)
    merged, index = np.unique(values.numpy(), return_inverse=True)  # 0 and -0 are counted apart
    assert np.array_equal(merged, expected)
    assert np.array_equal(np.bincount(index, counts.numpy()), times)
    assert bool((values.diff() >= 0).all())
    assert observer.stats()["input_min"].item() == float(counted.float().min())
    assert observer.stats()["input_max"].item() == float(counted.float().max())


@pytest.mark.parametrize("percent", [60.0, 90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_the_one_of_all_values(percent):
    x = inputs(tokens=301, k=7)  # no percentile falls on a value's very end
    distribution = Distribution()
    observer = Observer(distribution)
    observer.update(x, 0)
    low, high = percentile(*distribution.values(), percent)
    everything, outside = np.sort(x.float().numpy().ravel()), (1 - percent / 100) / 2
    upper = np.quantile(everything, 1 - outside, method="inverted_cdf")
    lower = -np.quantile(np.sort(-everything), 1 - outside, method="inverted_cdf")
    assert (low, high) == (min(0.0, lower), max(0.0, upper))
    # no more is left out at either end than there should be
    assert np.mean(everything < low) <= outside + 1e-12
    assert np.mean(everything > high) <= outside + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 24, 5000])
def test_channels(dtype, k):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(130, k, generator=generator).to(dtype)
    observer = Observer(ChannelAmax())
    observer.update(x, 0)
    amax = observer.stats()["channel_amax"]
    assert amax.dtype == torch.float32
    assert torch.equal(amax, x.float().abs().amax(0))


# scale and offset


def measured(x, engine_dtype=torch.bfloat16, **options):
    observer = W8A8Static(**options).observer(engine_dtype)
    observer.update(x, 0)
    return {key: float(tensor) for key, tensor in observer.stats().items()}


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["minmax", "moving_average"])
def test_scale_and_offset_of_a_range(held, kind):
    x = inputs(held)
    low, high = float(x.min()), float(x.max())
    found = measured(x, held, observer=kind)
    scale = nearest((high - low) / 255, held)
    assert found == {
        "input_scale": scale,
        "input_offset": round(-128 - low / scale),
        "input_min": low,
        "input_max": high,
    }
    symmetric = measured(x, held, observer=kind, symmetric=True)
    assert symmetric["input_offset"] == 0
    assert symmetric["input_scale"] == nearest(high / 127, held)


def nearest(value, held):
    """In `held`; in float32 of 16 bits, so that its products with whole numbers up to 255 are exact."""
    if held == torch.float32:
        fraction, exponent = math.frexp(value)
        return math.ldexp(round(fraction * 2**16), exponent - 16)
    return float(torch.tensor(value, dtype=torch.float64).to(held))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("held", DTYPES)
@pytest.mark.parametrize(
    "values",
    [[], [0.0], [0.0, -0.0, 0.0], [1e-30], [3.0], [-3.0, -1.0], [3e38, -3e38], [65504.0, -65504.0]],
)
def test_every_scale_can_be_used(kind, symmetric, held, values):
    observer = W8A8Static(observer=kind, symmetric=symmetric).observer(held)
    # inputs that no float16 holds come from models served in it after being measured in another dtype
    observer.update(torch.tensor(values, dtype=torch.float32).view(-1, 1), 0)
    stats = observer.stats()
    scale, offset = stats["input_scale"], stats["input_offset"]
    assert all(t.dtype == torch.float32 and t.shape == (1,) for t in stats.values())
    assert torch.equal(scale.to(held).float(), scale)
    for number in (scale.to(held), 1 / scale.to(held)):
        assert bool(torch.isfinite(number))
        assert float(number) >= torch.finfo(held).smallest_normal or held == torch.float16
    assert float(number) > 0
    assert -128 <= float(offset) <= 127
    assert float(offset) == round(float(offset))
    assert float(offset) == 0 or not symmetric
    if kind != "mse" and not symmetric and values and abs(sum(values)) == sum(map(abs, values)) > 1:
        assert float(offset) == (127 if min(values) < 0 else -128)  # 0 is at the end of the range


def test_percentile_leaves_out_the_tail():
    x = inputs()
    assert (
        measured(x, observer="percentile", percentile=100)["input_scale"]
        == (measured(x, observer="minmax")["input_scale"])
    )
    narrow = measured(x, observer="percentile", percentile=99)
    assert narrow["input_scale"] < 0.5 * measured(x, observer="minmax")["input_scale"]
    assert (narrow["input_min"], narrow["input_max"]) == (-4.0, 11.0)


def test_percentile_of_mostly_zeros_does_not_clip_everything():
    x = torch.zeros(5000, 10, dtype=torch.bfloat16)
    x[77, 3] = 2.0
    assert measured(x, observer="percentile") == measured(x, observer="minmax")


# the search for the least squared error


def rounded(value, dtype):
    return float(torch.tensor(value, dtype=torch.float64).float().to(dtype))


def f32(value):
    return rounded(value, torch.float32)


def engine_error(values, counts, scale, offset, held):
    """Value by value: both of the engine's ways to a code, and what is left of the value then."""
    r = rounded(f32(1 / scale), held)
    total = 0.0
    for value, count in zip(values, counts, strict=True):
        for scaled in (f32(value * r), f32(value / scale)):
            code = max(-128, min(127, round(f32(scaled + offset))))
            total += count * (value - (code - offset) / r) ** 2
    return total


def distributions():
    generator = torch.Generator().manual_seed(4)
    normal = torch.randn(300, 20, generator=generator)
    yield "shifted", normal * 0.7 + 1.2
    yield "heavy tails", normal * torch.exp(normal.roll(1, 0))
    yield "one-sided", torch.nn.functional.silu(3 * normal)
    yield "positive", normal.abs()
    yield "negative", -normal.abs()
    yield "one outlier", torch.cat([normal, torch.full((1, 20), 60.0) * (torch.arange(20) == 3)])
    yield "two values", torch.tensor([[-1.0, 4.0]]).expand(50, 2)
    yield "one value", torch.full((4, 2), 0.37)


@pytest.mark.parametrize(("name", "x"), list(distributions()))
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_never_worse_than_the_whole_range(name, x, held, symmetric):
    distribution = Distribution()
    observer = Observer(distribution)
    observer.update(x.to(held), 0)
    values, counts = distribution.values()
    chosen = measured(x.to(held), held, observer="mse", symmetric=symmetric)
    whole = measured(x.to(held), held, observer="minmax", symmetric=symmetric)
    losses = [
        engine_error(values.tolist(), counts.tolist(), m["input_scale"], m["input_offset"], held)
        for m in (chosen, whole)
    ]
    assert losses[0] <= losses[1] * (1 + 1e-12)
    # the vectorised search sees the same errors
    fast = affine.squared_error(
        values.numpy(),
        counts.numpy().astype(np.float64),
        np.array([chosen["input_scale"]], np.float32),
        np.array([chosen["input_offset"]], np.float32),
        held,
    )
    assert fast[0] == pytest.approx(losses[0], rel=1e-12, abs=1e-30)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16])
def test_mse_clips_what_costs_more_than_it_is_worth(held, symmetric):
    x = (torch.randn(2000, 400, generator=torch.Generator().manual_seed(6)) * 0.7).to(held)
    distribution = Distribution()
    observer = Observer(distribution)
    observer.update(x, 0)
    values, counts = distribution.values()
    chosen = affine.of_distribution(values, counts, held, symmetric=symmetric)
    whole = affine.of_range(float(values[0]), float(values[-1]), held, symmetric=symmetric)
    assert 0.6 * whole[0] < chosen[0] < 0.9 * whole[0]
    scale, offset = np.array([chosen, whole], np.float32).T
    weights = counts.numpy().astype(np.float64)
    losses = affine.squared_error(values.numpy(), weights, scale, offset, held)
    assert losses[0] < 0.75 * losses[1]


def loss(values, counts, scale, offset, held):
    weights = counts.numpy().astype(np.float64)
    pairs = np.meshgrid(np.float32(scale), np.float32(offset))
    return affine.squared_error(values.numpy(), weights, *(p.ravel() for p in pairs), held).min()


def scales_between(low, high, held):
    bits = [int(torch.tensor(scale).to(held).view(torch.int16)) for scale in (low, high)]
    return torch.arange(*bits, dtype=torch.int16).view(held).float().numpy()


@pytest.mark.parametrize(("name", "x"), [d for d in distributions() if "outlier" not in d[0]])
def test_the_search_finds_what_trying_everything_finds(name, x):
    held = torch.bfloat16
    distribution = Distribution()
    observer = Observer(distribution)
    observer.update(x[::5].to(held), 0)
    seen = distribution.values()
    scale, offset = affine.of_distribution(*seen, held, symmetric=False)
    low, high = min(0.0, float(seen[0][0])), max(0.0, float(seen[0][-1]))
    widest, _ = affine.of_range(low, high, held, symmetric=False)
    everything = scales_between(widest / 4, widest * 1.1, held), np.arange(-128, 128)
    assert loss(*seen, scale, offset, held) <= loss(*seen, *everything, held) * 1.02 + 1e-12


def test_the_search_is_fine_enough_for_float16():
    held = torch.float16
    distribution = Distribution()
    observer = Observer(distribution)
    generator = torch.Generator().manual_seed(8)
    observer.update(torch.randn(1000, 300, generator=generator).to(held), 0)
    seen = distribution.values()
    scale, _ = affine.of_distribution(*seen, held, symmetric=True)
    widest = float(seen[0].abs().max()) / 127
    everything = scales_between(widest / 4, widest * 1.01, held)
    assert loss(*seen, scale, 0, held) <= loss(*seen, everything, 0, held) * 1.0005


def test_ties_go_to_the_wider_range():
    # -1, 0 and 1 are exact with every scale whose reciprocal is a whole number of steps
    held = torch.bfloat16
    values, counts = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([5, 5, 5])
    scale, offset = affine.of_distribution(values, counts, held, symmetric=True)
    whole = torch.tensor([1 / 127]).to(held).view(torch.int16)
    scales = torch.arange(int(whole) - 256, int(whole) + 9, dtype=torch.int16).view(held).float()
    losses = affine.squared_error(
        values.numpy(), np.full(3, 5.0), scales.numpy(), np.zeros(len(scales), np.float32), held
    )
    exact = scales[torch.from_numpy(losses == 0)]
    assert len(exact) > 3
    assert (scale, offset) == (float(exact.max()), 0.0)


# mean squares


def test_mean_squares_by_hand():
    """Of n tokens and of 32 more, at which all channels are as the mean of them all."""
    observer = Observer(ChannelSquare())
    observer.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), 0)  # sums of squares: 10 and 4
    mean = 7 / 2
    expected = torch.tensor([(10 + 32 * mean) / 34, (4 + 32 * mean) / 34]).bfloat16().float()
    assert observer.stats()["input_square"].tolist() == expected.tolist()
    assert expected.tolist() == [3.59375, 3.40625]


def test_many_tokens_outweigh_the_mean_of_all_channels():
    x = inputs(tokens=20_000)
    observer = Observer(ChannelSquare())
    observer.update(x, 0)
    square = observer.stats()["input_square"]
    assert torch.allclose(square.double(), x.double().square().mean(0), rtol=0.01)
    assert torch.equal(square, square.bfloat16().float())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_squares_that_are_not_finite_show(value):
    observer = Observer(ChannelSquare())
    x = inputs(torch.float32)
    x[7, 2] = value
    observer.update(x, 0)
    assert not observer.finite
    assert observer.tokens == 600


# options


def test_options():
    scheme = W8A8Static()
    assert scheme.model_dump() == {
        "symmetric": False, "observer": "mse", "percentile": 99.99, "momentum": 0.9,
        "weight_rounding": "nearest", "clip": "none",
    }  # fmt: skip
    assert W8A8Static.model_validate(scheme.model_dump()) == scheme
    full = W8A8Static(symmetric=True, observer="percentile", percentile=99)
    assert W8A8Static.model_validate(full.model_dump(mode="json")) == full
    assert full.numerics != scheme.numerics
    assert "name" not in Int8Static.__dict__


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"observer": "max"}, "minmax"),
        ({"observer": "percentile", "percentile": 50.0}, "greater than 50"),
        ({"observer": "percentile", "percentile": 100.5}, "less than or equal to 100"),
        ({"observer": "moving_average", "momentum": 1.5}, "less than or equal to 1"),
        ({"observer": "moving_average", "momentum": -0.1}, "greater than or equal to 0"),
        ({"percentile": 99.0}, "no effect without `observer: percentile`"),
        ({"observer": "minmax", "momentum": 0.5}, "no effect without `observer: moving_average`"),
        ({"symmetric": 1}, "boolean"),
        ({"chosen_by": "mse"}, "[Ee]xtra"),
    ],
)
def test_options_that_make_no_sense(options, word):
    with pytest.raises(ValidationError, match=word):
        W8A8Static.model_validate(options)
