"""Rounding by data: the arithmetic against its textbook form, and the sums that it takes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcli.calibration.methods import hessians
from quantcli.calibration.replay.taps import Matrix
from quantcli.core.number_types import ELEMENTS
from quantcli.schemes.arithmetic import elements, fp4
from quantcli.schemes.arithmetic import gptq as module
from quantcli.schemes.arithmetic.gptq import Descent, Feedback, factorize, gptq

CPU = torch.device("cpu")
INT4, FP4 = ELEMENTS["int4"], ELEMENTS["fp4_e2m1"]
LEAST, LARGEST = INT4.least, INT4.largest


def textbook(w: Tensor, h: Tensor, step: Tensor, *, act_order: bool = True) -> np.ndarray:
    """As the paper has it: columns that are left are kept up to date by U, the factor of H^-1."""
    weight, hessian = w.double().numpy().copy(), h.double().numpy().copy()
    steps = np.broadcast_to(step.double().numpy(), weight.shape)
    diagonal = np.diag(hessian).copy()
    dead = diagonal == 0
    damping = 0.01 * diagonal[~dead].mean()
    hessian[np.diag_indices(len(hessian))] += np.where(dead, 1.0, damping)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
    hessian, weight, steps = hessian[order][:, order], weight[:, order], steps[:, order]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    codes = np.zeros_like(weight)
    for i in range(weight.shape[1]):
        codes[:, i] = np.clip(np.rint(weight[:, i] / steps[:, i]), LEAST, LARGEST)
        error = (weight[:, i] - codes[:, i] * steps[:, i]) / upper[i, i]
        weight[:, i + 1 :] -= np.outer(error, upper[i, i + 1 :])
    found = np.zeros_like(codes)
    found[:, order] = codes
    return found


def case(n: int, k: int, *, dead: int | None = None, groups: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.rand(k, generator=generator)
    x = torch.randn(3 * k, k, generator=generator) @ mix
    if dead is not None:
        x[:, dead] = 0
    w = torch.randn(n, k, generator=generator)
    step = w.view(n, groups, -1).abs().amax(2) / 7
    step = step.repeat_interleave(k // groups, 1) if groups > 1 else step
    return w, x.T @ x, step


def nearest(w: Tensor, step: Tensor) -> Tensor:
    return (w / step).round().clamp(LEAST, LARGEST).to(torch.int8)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("k", "groups"), [(96, 1), (300, 1), (256, 4)])
def test_codes_are_those_of_the_textbook(k, groups, act_order):
    w, h, step = case(16, k, dead=5, groups=groups)
    feedback = Feedback.of(h, act_order=act_order)
    codes = feedback.round(w, step, INT4)
    expected = textbook(w, h, step, act_order=act_order)
    assert np.array_equal(codes.numpy(), expected)
    assert not np.array_equal(expected, nearest(w, step).numpy())
    assert torch.equal(codes[:, 5], nearest(w, step)[:, 5])  # not lost: inputs may come yet


def test_a_small_case_by_hand():
    """H = [[2, 1], [1, 2]]: column 1 takes over half of what column 0 has lost."""
    h = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    feedback = Feedback.of(h, damping=0.0, act_order=False)
    assert torch.allclose(feedback.shares, torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
    # 0.4 -> 0, 0.4 lost; 0.4 + 0.2 -> 1: error 2 * .16 - 2 * .24 + 2 * .36 = 0.56, nearest 0.96
    w, step = torch.tensor([[0.4, 0.4]]), torch.ones(1, 1)
    found = gptq(w, h, step, nearest(w, step), INT4, feedback)
    assert found.codes.tolist() == [[0, 1]]
    assert float(found.error) == pytest.approx(0.56)
    assert float(found.nearest) == pytest.approx(0.96)
    assert float(found.signal) == pytest.approx(0.96)


def test_independent_inputs_leave_nothing_to_make_up_for():
    w, _, step = case(8, 64)
    feedback = Feedback.of(torch.eye(64) * 3)
    assert torch.equal(feedback.round(w, step, INT4), nearest(w, step))


def test_inputs_that_were_all_zero():
    w, _, step = case(8, 64)
    feedback = Feedback.of(torch.zeros(64, 64))
    assert torch.equal(feedback.round(w, step, INT4), nearest(w, step))


def test_damping_grows_until_it_factorizes(monkeypatch):
    tried = []

    def fail(matrix, each):
        tried.append(float(matrix.diagonal().mean()))
        return factorize(matrix, each) if len(tried) == 3 else False

    monkeypatch.setattr(module, "factorize", fail)
    assert Feedback.of(torch.eye(8)) is not None
    assert tried == pytest.approx([1.01, 1.1, 2.0])


def test_what_is_no_sum_of_squares_is_rounded_to_nearest():
    h = torch.ones(8, 8) * 100 - 99 * torch.eye(8)
    assert Feedback.of(h) is None
    w, _, step = case(4, 8)
    found = gptq(w, h.abs(), step, nearest(w, step), INT4, None)
    assert torch.equal(found.codes, nearest(w, step))
    assert torch.equal(found.error, found.nearest)


@pytest.mark.parametrize("tile", [7, 64, 1000])
def test_factorization_by_tiles(monkeypatch, tile):
    monkeypatch.setattr(module, "_TILE", tile)
    _, h, _ = case(1, 100)
    work = h.double() + torch.eye(100).double()
    matrix = work.clone()
    assert factorize(matrix)
    lower = matrix.tril()
    assert torch.allclose(lower @ lower.T, work, rtol=1e-10)


# descent


def best_alone(w, h, numbers, scale, columns, element, damping, to_scale):
    """One sweep by trying: each scale by its formula on the whole matrix, then each code."""
    hessian = h.double() + damping * torch.eye(len(h)).double()
    w, numbers, scale = w.double(), numbers.double().clone(), scale.double().clone()
    k = w.shape[1]
    values = torch.tensor(element.values or range(int(element.least), int(element.largest) + 1))

    def error(numbers, scale):
        lost = w - numbers * scale.repeat_interleave(columns, 1)[:, :k]
        return ((lost @ hessian) * lost).sum(1)

    width = max(128 // columns * columns, 1) if columns <= 128 else k
    for start in range(0, k, width):
        for place in range(start // columns, -(-min(start + width, k) // columns)):
            part = slice(place * columns, (place + 1) * columns)
            lost = w - numbers * scale.repeat_interleave(columns, 1)[:, :k]
            slope = ((lost @ hessian)[:, part] * numbers[:, part]).sum(1)
            curve = ((numbers[:, part] @ hessian[part, part]) * numbers[:, part]).sum(1)
            tried = scale.clone()
            tried[:, place] = to_scale((scale[:, place] + slope / curve).abs().float()).double()
            tried[:, place] = tried[:, place].copysign(scale[:, place])
            better = error(numbers, tried) < error(numbers, scale)
            scale = torch.where(better[:, None], tried, scale)
        for column in range(start, min(start + width, k)):
            errors = []
            for value in values:
                tried = numbers.clone()
                tried[:, column] = value
                errors.append(error(tried, scale))
            numbers[:, column] = values.double()[torch.stack(errors).argmin(0)]
    return numbers, scale


def to_bfloat16(scale):
    return scale.bfloat16().float()


@pytest.mark.parametrize(
    ("k", "columns", "element"),
    [(96, 32, INT4), (40, 40, INT4), (160, 32, FP4), (150, 150, INT4), (320, 160, INT4)],
)
def test_a_sweep_finds_what_trying_finds(k, columns, element):
    w, h, step = case(8, k, groups=k // columns)
    scale = to_bfloat16(step[:, ::columns]).contiguous() if columns < k else to_bfloat16(step)
    scale = scale.view(8, -1)
    scale[:4] *= -1
    descent = Descent(1, columns, scale, None, to_bfloat16)
    first = elements.decode(Feedback.of(h).round(w, descent.step(scale, k), element), element, k)
    numbers, found, before, after = descent.mended(w, h, first, element, 0.1)
    wanted, scales = best_alone(w, h, first, scale, columns, element, 0.1, to_bfloat16)
    assert torch.equal(numbers.double(), wanted)
    assert torch.equal(found.double(), scales)
    assert not torch.equal(numbers, first)
    assert not torch.equal(found, scale)
    assert torch.equal(found.sign(), scale.sign())
    for error, codes, its in ((before, first, scale), (after, numbers, found)):
        lost = (w - codes * descent.step(its, k)).double()
        assert torch.allclose((lost @ h.double() * lost).sum(1), error, rtol=1e-4)


@pytest.mark.parametrize("columns", [32, 160])
def test_two_sweeps_are_one_and_one_more(columns):
    w, h, step = case(8, 320, groups=320 // columns)
    scale = to_bfloat16(step[:, ::columns]).contiguous()
    first = elements.decode(nearest(w, step), INT4, 320)
    once = Descent(1, columns, scale, None, to_bfloat16).mended(w, h, first, INT4, 0.1)
    again = Descent(1, columns, once.scale, None, to_bfloat16)
    again = again.mended(w, h, once.numbers, INT4, 0.1)
    twice = Descent(2, columns, scale, None, to_bfloat16).mended(w, h, first, INT4, 0.1)
    assert torch.equal(twice.numbers, again.numbers)
    assert torch.equal(twice.scale, again.scale)
    assert torch.allclose(twice.after, again.after, rtol=1e-4)
    assert bool((twice.after < once.after).any())


@pytest.mark.parametrize("k", [5, 96, 300])
def test_squares_of_outputs_by_half_of_the_products(monkeypatch, k):
    monkeypatch.setattr(module, "_TILE", 64)
    w, h, _ = case(6, k)
    exact = ((w.double() @ h.double()) * w.double()).sum(1)
    assert torch.allclose(module.squares(w, h), exact, rtol=1e-5)


def test_sweeps_lower_the_error_and_leave_scales_that_are_kept():
    w, h, step = case(16, 256, dead=7, groups=4)
    near = nearest(w, step)
    feedback = Feedback.of(h)
    errors = []
    for sweeps in (0, 1, 4):
        kept = Descent(sweeps, 64, step[:, ::64].contiguous())
        found = gptq(w, h, step, near, INT4, feedback, kept)
        assert torch.equal(found.scale, kept.scale)
        fitted = gptq(
            w, h, step, near, INT4, feedback, Descent(sweeps, 64, kept.scale, None, to_bfloat16)
        )
        errors.append((float(found.error.sum()), float(fitted.error.sum())))
        lost = (w - fitted.codes * fitted.scale.repeat_interleave(64, 1)).double()
        assert torch.allclose((lost @ h.double() * lost).sum(1), fitted.error, rtol=1e-3)
    (none, same), (one, one_fitted), (four, four_fitted) = errors
    assert none == same
    assert four < one < none
    assert four_fitted < one_fitted < one


# sums


class Backwards:
    """Jobs in the opposite order."""

    def __call__(self, job, numbers):
        for number in reversed(numbers):
            job(number)


def collect(batches, order, each, tile=16):
    matrix = Matrix("m")
    sums = {matrix: hessians.Hessian(batches[0].shape[1], CPU)}
    seen = {matrix: hessians.Inputs()}
    threads = [
        threading.Thread(target=seen[matrix].update, args=(batches[number], number)) for number in order
    ]
    for thread in threads:
        thread.start()
        thread.join()
    hessians.add(sums, seen, each)
    sums[matrix].complete()
    return sums[matrix]


def test_sums_do_not_depend_on_who_comes_first(monkeypatch):
    monkeypatch.setattr(hessians, "_TILE", 16)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(20 + i, 40, generator=generator).bfloat16() * 10**i for i in range(5)]
    first = collect(batches, range(5), hessians.in_turn)
    second = collect(batches, [4, 2, 0, 3, 1], Backwards())
    x = torch.cat(batches).double()
    assert first.tokens == len(x) == 110
    assert torch.equal(first.sum, second.sum)
    assert torch.equal(first.sum, first.sum.T)
    assert torch.allclose(
        first.sum.double(), x.T @ x, rtol=1e-5, atol=1e-5 * float(x.square().sum(0).max())
    )


def test_a_batch_more_is_the_same_in_one_go_or_two():
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(30, 8, generator=generator) for _ in range(4)]
    matrix = Matrix("m")
    whole = collect(batches, range(4), hessians.in_turn)
    sums, seen = {matrix: hessians.Hessian(8, CPU)}, {matrix: hessians.Inputs()}
    for number, batch in enumerate(batches):
        seen[matrix].update(batch, number)
        hessians.add(sums, seen, hessians.in_turn)
    sums[matrix].complete()
    assert torch.equal(sums[matrix].sum, whole.sum)


def test_inputs_are_kept_as_they_were_seen():
    x = torch.ones(4, 3)
    seen = hessians.Inputs()
    seen.update(x, 0)
    seen.update(torch.empty(0, 3), 1)
    x.mul_(5)
    assert [part.tolist() for part in seen.take()] == [torch.ones(4, 3).tolist()]
    assert seen.take() == []


def test_weights_are_corrected_for_rounded_inputs():
    """Least squares by numpy on the very inputs: rounded ones are to give what W made of the others."""
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(200, 24, generator=generator), torch.randn(90, 24, generator=generator)]
    weight = torch.randn(7, 24, generator=generator)

    def rounded(x):
        return x, (2 * x).round() / 2

    hessian, seen = hessians.Hessian(24, CPU, rounded), hessians.Inputs()
    for batch, x in enumerate(inputs):
        seen.update(x, batch)
    matrix = Matrix("w")
    hessians.add({matrix: hessian}, {matrix: seen}, module.in_turn)
    hessian.complete()
    toward = hessian.toward(0.0)
    x = torch.cat(inputs).double().numpy()
    q = np.rint(2 * x) / 2
    wanted, *_ = np.linalg.lstsq(q, x @ weight.double().numpy().T, rcond=None)
    assert np.abs((weight @ toward).numpy() - wanted.T).max() < 1e-4
    assert np.abs(hessian.sum.numpy() - q.T @ q).max() < 1e-2
    lost = [float(((x @ weight.numpy().T - q @ w.T) ** 2).sum()) for w in (weight.numpy(), wanted.T)]
    assert lost[1] < 0.99 * lost[0]


def test_nothing_is_corrected_where_inputs_are_not_rounded_or_say_nothing():
    assert hessians.Hessian(8, CPU).toward(0.01) is None
    assert hessians.Hessian(8, CPU, lambda x: (x, x)).toward(0.01) is None  # no token: singular


# four-bit floats


def textbook_fp4(w: Tensor, h: Tensor, step: Tensor) -> np.ndarray:
    """As `textbook`, on the numbers of e2m1 by comparison with each of them."""
    numbers = np.array([*FP4.values])
    evens = np.abs(numbers)[:8:2]
    weight, hessian, steps = w.double().numpy().copy(), h.double().numpy(), step.double().numpy()
    diagonal = np.diag(hessian)
    hessian = hessian + 0.01 * diagonal.mean() * np.eye(len(hessian))
    order = np.argsort(-diagonal, kind="stable")
    hessian, weight, steps = hessian[order][:, order], weight[:, order], steps[:, order]
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    found = np.zeros_like(weight)
    for i in range(weight.shape[1]):
        quotients = weight[:, i] / steps[:, i]
        far = np.abs(quotients[:, None] - numbers) - 1e-9 * np.isin(np.abs(numbers), evens)
        found[:, order[i]] = numbers[far.argmin(1)]
        error = (weight[:, i] - found[:, order[i]] * steps[:, i]) / upper[i, i]
        weight[:, i + 1 :] -= np.outer(error, upper[i, i + 1 :])
    return found


@pytest.mark.parametrize(("k", "columns"), [(96, 32), (304, 16)])
def test_four_bit_floats_are_those_of_the_textbook(k, columns):
    w, h, step = case(16, k, groups=k // columns)
    step = step * 7 / 6
    codes = Feedback.of(h).round(w, step, FP4)
    assert codes.dtype == torch.uint8
    assert codes.shape == (16, k // 2)
    expected = textbook_fp4(w, h, step)
    assert np.array_equal(elements.decode(codes, FP4, k).numpy(), expected)
    plain = fp4.nearest(w / step)
    assert not np.array_equal(expected, plain.numpy())
    found = gptq(w, h, step, elements.encode(plain, FP4), FP4, Feedback.of(h))
    lost = (w - elements.decode(found.codes, FP4, k) * step).double()
    assert torch.allclose((lost @ h.double() * lost).sum(1), found.error, rtol=1e-3)
    assert float(found.error.sum()) < 0.7 * float(found.nearest.sum())


@pytest.mark.parametrize("name", ["fp4_e2m1", "int4", "int8"])
@pytest.mark.parametrize("k", [1, 6, 7])
def test_numbers_as_codes_and_back(name, k):
    element = ELEMENTS[name]
    numbers = elements.nearest(torch.linspace(1.3 * element.least, 1.3 * element.largest, k), element)
    codes = elements.encode(numbers.view(1, k), element)
    assert torch.equal(elements.decode(codes, element, k)[0], numbers)
    assert float(numbers[0]) == element.least
