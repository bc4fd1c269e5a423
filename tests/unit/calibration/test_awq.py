"""AWQ: the function stays, scales protect what large inputs multiply, what has no tokens is named."""

import re

import pytest
import torch
from pydantic import ValidationError

from quantcli.calibration.layer import LayerRun
from quantcli.calibration.loaded import CalibrationRun, LoadedLayer
from quantcli.calibration.methods import awq
from quantcli.calibration.methods.awq import Awq, AwqRule
from quantcli.calibration.methods.smoothing import Smoothing
from quantcli.calibration.policy import Policy, Quantized
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.tensors import read_tensor
from quantcli.planning.measured import EditFactors
from quantcli.planning.siblings import Siblings
from quantcli.recipe.methods import recipe_methods
from quantcli.schemes.fp8_static import Fp8Static
from quantcli.schemes.nvfp4 import NvFp4
from quantcli.schemes.w4a4_flatquant import W4A4FlatQuant
from quantcli.schemes.w4a16 import W4A16
from quantcli.schemes.w8a8_dynamic import W8A8Dynamic
from tests.replaying import CPU, Memory, Replayed, make_batches
from tests.tiny_models import make_tiny

PROBE = Batch(torch.arange(3, 15)[None], None)
INT4 = W4A16(group_size=32, clip="inputs")


def replayed(folder, family="llama"):
    """The last layer of a model, some of whose inputs are large."""
    run = Replayed(make_tiny(folder / family, family, dtype=torch.float32),
                   [*make_batches(), PROBE], dtype="F32")  # fmt: skip
    for number in run.states:
        run.states[number][..., 5] *= 40
    return run, len(run.skeleton.layers) - 1


def measured(run, index, scheme, *methods, workers=1):
    """A layer of which every matrix is quantized: its run, and what is stored."""
    names = {s.module for e in run.skeleton.segments(index).values() for p in e for s in p}
    policy = Policy(
        dict.fromkeys(names, Quantized(scheme, torch.bfloat16, torch.bfloat16, "here")),
        Siblings({}), "dynamic", "float",
    )  # fmt: skip
    made = CalibrationRun(run.replay, policy, methods, workers)
    layer_run = LayerRun(LoadedLayer(made, index, Memory(run.states)))
    return layer_run, layer_run.measure(None)


def outputs(run, index, layer_run=None):
    """Of the layer, with its edits."""

    def read(stored):
        tensor = read_tensor(stored)
        edits = layer_run.work.edits if layer_run else {}
        return edits.get(stored.spec.name, EditFactors()).apply(tensor).to(tensor.dtype)

    found = Memory()
    with run.skeleton.loaded(index, read, CPU) as layer:
        run.replay.run(index, layer, Memory(run.states), found.put)
    return torch.cat([found[number].flatten() for number in sorted(found)])


@pytest.mark.parametrize(
    "methods", [[Awq(ratios=4)], [Smoothing(within=1), Awq(ratios=4)]], ids=["alone", "smoothed"]
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "deepseek_v3"])
def test_the_function_stays(tmp_path, family, methods):
    """Float32 outputs of the layer before and after, relative to their size: below 1e-5."""
    run, index = replayed(tmp_path, family)
    layer_run, _ = measured(run, index, INT4, *methods)
    groups = layer_run.report.results["scaled"]
    assert any(group.most > group.least for group in groups)
    assert all(group.error <= 1 for group in groups)
    before, after = outputs(run, index), outputs(run, index, layer_run)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5


@pytest.mark.parametrize(
    "scheme", [INT4, W4A16(group_size=32, symmetric=False), W8A8Dynamic(), Fp8Static(), NvFp4()]
)
def test_every_scheme_is_judged(tmp_path, scheme):
    """Zero points, int8 and fp8 inputs, scales of whole weights: some scales leave less error."""
    run, index = replayed(tmp_path)
    layer_run, _ = measured(run, index, scheme, Awq(ratios=3))
    group = min(layer_run.report.results["scaled"], key=lambda group: group.error)
    assert 0 < group.error < 0.99


def test_large_inputs_are_protected(tmp_path):
    """A channel with inputs 40 times as large: its columns are multiplied, and int4 loses less."""
    run, index = replayed(tmp_path)
    layer_run, _ = measured(run, index, INT4, Awq())
    group = next(g for g in layer_run.report.results["scaled"] if "input_layernorm" in g.producer)
    (reader,) = [name for name in group.readers if "q_proj" in name]
    columns = layer_run.work.edits[reader].columns
    assert int(columns.argmax()) == 5
    assert group.error < 0.9


def test_small_gains_are_left(tmp_path):
    """Channels stay if the best scales take too little of the error away, and all do if none can."""
    run, index = replayed(tmp_path)
    errors = [
        [g.error for g in measured(run, index, INT4, Awq(ratios=4, least_gain=least))[0]
         .report.results["scaled"]]
        for least in (0.0, 0.02, 0.999)
    ]  # fmt: skip
    assert any(error > 0.98 for error in errors[0])
    assert errors[1] == [error for error in errors[0] if error <= 0.98]
    assert errors[2] == []


def test_workers_change_nothing(tmp_path):
    run, index = replayed(tmp_path)
    (_, one), (_, three) = (measured(run, index, INT4, Awq(ratios=4), workers=n) for n in (1, 3))
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_rows_and_what_float_matrices_read_get_powers_of_two(tmp_path):
    run, index = replayed(tmp_path)
    layer_run, _ = measured(run, index, INT4, Awq(ratios=4))
    rows = [edit.rows for edit in layer_run.work.edits.values() if edit.rows is not None]
    assert all(torch.equal(vector, vector.log2().round().exp2()) for vector in rows)


def test_rules(tmp_path):
    run, index = replayed(tmp_path)
    rules = [AwqRule(match=["*.down_proj"], skip=True), AwqRule(match=["*.q_proj"], ratio=0.5)]
    layer_run, _ = measured(run, index, INT4, Awq(rules=rules, ratios=4, least_gain=0.999))
    groups = {g.producer.rpartition(".")[2]: g for g in layer_run.report.results["scaled"]}
    assert "up_proj" not in groups
    assert (groups["input_layernorm"].ratio, groups["input_layernorm"].duo) == (0.5, False)
    assert groups["input_layernorm"].error != 1  # next to no scales
    for wrong in ({"ratio": 0.5, "skip": True}, {}):
        with pytest.raises(ValidationError, match="give either `ratio` or `skip: true`"):
            AwqRule(match=["*"], **wrong)


def test_learned_transforms_and_experts_without_tokens_are_left(tmp_path):
    """Transforms learn scales of their own; what no token reaches is named."""
    run, index = replayed(tmp_path, "qwen3_moe")
    names = {s.module for e in run.skeleton.segments(index).values() for p in e for s in p}
    learned = Quantized(W4A4FlatQuant(), torch.bfloat16, torch.bfloat16, "here")
    policy = Policy(dict.fromkeys(names, learned), Siblings({}), "error", "float")
    assert not Awq().has_work(sorted(names), policy)
    for number in run.states:  # one token alone, so that few experts have any
        run.states[number][:] = run.states[number][:1, :1]
    layer_run, _ = measured(run, index, INT4, Awq(ratios=2))
    (message,) = [text for text in layer_run.report.messages if "not scaled" in text]
    assert re.search(r"as no token reached what reads it: `.*experts.*`", message)


def test_memory_is_bounded():
    weights = [(INT4, 4096), (INT4, 14336)]
    outputs = 4 * awq.TOKENS * awq.ALL_ROWS
    assert Awq().nbytes(weights) == 4 * awq.TOKENS * (4096 + 14336) + outputs
    assert Awq().nbytes(weights * 1000) == awq.TOKENS_NBYTES + outputs
    assert Awq().worker_nbytes(weights) > Awq().worker_nbytes(weights[:1]) > 0
    assert "awq" in recipe_methods()


@pytest.mark.parametrize(("n", "multiple"), [(1, 1), (300, 1), (1000, 128), (130, 128), (5000, 1)])
def test_rows_that_are_judged(n, multiple):
    """Whole runs, each row once, few of many."""
    rows = awq._some(n, multiple, 256)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert 0 <= int(rows.min()) <= int(rows.max()) < n
    assert len(rows) <= max(256, multiple)
    assert len(rows) >= min(n, 128)
