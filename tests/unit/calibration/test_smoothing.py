"""Smoothing: the function stays, in every family, and outliers move."""

import copy
import json

import pytest
import torch
from torch import nn

from quantcli.calibration.channels import (
    ChannelReader,
    LayerLayout,
    Producer,
    norm_offset,
    scale_norm,
)
from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.layer import LayerRun
from quantcli.calibration.loaded import CalibrationRun, LoadedLayer
from quantcli.calibration.methods.smoothing import Smoothing, scales
from quantcli.calibration.policy import Policy, Quantized
from quantcli.calibration.replay.skeleton import Segment
from quantcli.calibration.replay.taps import Matrices, Matrix, Tap
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.tensors import read_tensor
from quantcli.planning.siblings import Siblings
from quantcli.schemes.w8a8_dynamic import W8A8Dynamic
from tests.replaying import CPU, Memory, Replayed, make_batches
from tests.tiny_models import FAMILIES, make_multimodal, make_tiny

# Groups by the last parts of the producer's name, as the architectures have them. All else must not be
# scaled: norms whose output is added to something (Gemma, OLMo 2), and q and k, which are multiplied.
ATTENTION = {"input_layernorm", "v_proj"}
DENSE = ATTENTION | {"up_proj", "post_attention_layernorm"}
SANDWICH = ATTENTION | {"up_proj", "pre_feedforward_layernorm"}
EXPECTED = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "stablelm"), DENSE),
    **dict.fromkeys(("gemma2", "gemma3", "multimodal"), SANDWICH),
    "phi3": {"input_layernorm", "qkv_proj", "post_attention_layernorm", "gate_up_proj"},
    "olmo2": {"v_proj", "up_proj"},
    "qwen3_moe": {*ATTENTION, "post_attention_layernorm", "gate_up_proj"},
    "mixtral": {*ATTENTION, "post_attention_layernorm", "gate_up_proj"},
    "granitemoe": {*ATTENTION, "post_attention_layernorm", "gate_up_proj"},
    "aria_text": {*ATTENTION, "post_attention_layernorm", "gate_up_proj", "up_proj"},
    "granitemoe_swa": {*ATTENTION, "post_attention_layernorm", "gate_up_proj"},
    "llama4_text": {*ATTENTION, "post_attention_layernorm", "gate_up_proj", "up_proj"},
    "gemma4_text": {"input_layernorm", "pre_feedforward_layernorm", "pre_feedforward_layernorm_2",
                    "gate_up_proj", "up_proj"},
    "qwen3_vl_moe": {*ATTENTION, "post_attention_layernorm", "gate_up_proj"},
    "qwen3_5_moe": {*ATTENTION, "post_attention_layernorm", "gate_up_proj", "up_proj"},
    "step3p7": {*ATTENTION, "post_attention_layernorm"},  # gate and up are clamped
    "granitemoeshared": {*ATTENTION, "post_attention_layernorm", "gate_up_proj", "input_linear"},
    "granitemoehybrid": {*ATTENTION, "post_attention_layernorm", "gate_up_proj", "input_linear"},
    "deepseek_v3": {"input_layernorm", "q_a_layernorm", "kv_a_layernorm", "kv_b_proj",
                    "post_attention_layernorm", "gate_up_proj", "up_proj"},
}  # fmt: skip


PROBE = Batch(torch.arange(3, 15)[None], None)


def make(folder, family):
    if family == "multimodal":
        return make_multimodal(folder, dtype=torch.float32)
    return make_tiny(folder, family, dtype=torch.float32)


def everything(run, index):
    """A calibration that quantizes every matrix of a layer and smooths every group."""
    skeleton = run.skeleton
    names = {s.module for e in skeleton.segments(index).values() for p in e for s in p}
    entry = Quantized(W8A8Dynamic(), torch.bfloat16, torch.bfloat16, "here")
    policy = Policy(dict.fromkeys(names, entry), Siblings({}), "error", "float")
    return CalibrationRun(run.replay, policy, [Smoothing(within=1)])


@pytest.mark.parametrize("family", [*FAMILIES, "multimodal"])
def test_the_function_stays(tmp_path, family):
    """Float32 outputs of the last layer before and after, relative to their size: below 1e-5."""
    path, batches = make(tmp_path / "m", family), make_batches(padded=False)
    run = Replayed(path, [*batches, PROBE], dtype="F32")
    index = len(run.skeleton.layers) - 1
    for number in run.states:  # an outlier channel
        run.states[number][..., 5] *= 30
    states = Memory(run.states)
    layer_run = LayerRun(LoadedLayer(everything(run, index), index, states))
    before, after = Memory(), Memory()
    with run.skeleton.loaded(index, read_tensor, CPU) as layer:
        run.replay.run(index, layer, states, before.put)
    tensors = layer_run.measure(None)
    report = layer_run.report.document()
    kinds = {group["producer"].partition("[")[0].rpartition(".")[2] for group in report["smoothed"]}
    assert kinds == EXPECTED[family]

    def read(stored):
        tensor = read_tensor(stored)
        for kind, place in report["edits"].get(stored.spec.name, {}).items():
            vector = tensors[f"vector.{place}"]
            if kind == "value":
                tensor = vector
            elif kind == "rows":
                tensor = tensor * vector.view(-1, *[1] * (tensor.dim() - 1))
            else:
                tensor = tensor * vector
        return tensor

    edited = [s.spec.name for s in run.skeleton.checkpoint.tensors.values() if s.spec.name in
              report["edits"]]  # fmt: skip
    assert len(edited) == len(report["edits"]) >= 4
    with run.skeleton.loaded(index, read, CPU) as layer:
        run.replay.run(index, layer, states, after.put)
    for number in before:
        difference = (before[number] - after[number]).abs().max() / before[number].abs().max()
        assert 0 <= difference < 1e-5
    assert max(group["most"] for group in report["smoothed"]) >= 2


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_rows_are_multiplied_by_powers_of_two(tmp_path, family):
    """So that they are not rounded. Columns behind a norm are multiplied by what it was divided by."""
    path, batches = make_tiny(tmp_path / "m", family), make_batches(padded=False)
    run = Replayed(path, [*batches, PROBE])
    layer_run = LayerRun(LoadedLayer(everything(run, 1), 1, Memory(run.states)))
    tensors = layer_run.measure(None)
    rows = 0
    for edit in layer_run.report.edits.values():
        if "rows" in edit:
            vector = tensors[f"vector.{edit['rows']}"]
            assert torch.equal(vector, vector.log2().round().exp2())
            rows += 1
    assert rows


def test_norms_of_a_model_that_is_computed_in_another_dtype(tmp_path):
    """Stored in float32 and run in bfloat16: the new norms may replace the stored ones."""
    run = Replayed(
        make_tiny(tmp_path / "m", "llama", dtype=torch.float32), make_batches(), dtype="BF16"
    )
    layer_run = LayerRun(LoadedLayer(everything(run, 0), 0, Memory(run.states)))
    layer_run.measure(None)
    norms = [edit for edit in layer_run.work.edits.values() if edit.value is not None]
    assert norms
    assert all(edit.value.dtype == torch.float32 for edit in norms)


def test_grouped_query_heads_are_tied(tmp_path):
    """Two query heads read one value head: o_proj's columns get v_proj's scales, head by head."""
    path = make_tiny(tmp_path / "m", "llama", dtype=torch.float32)
    run = Replayed(path, make_batches(padded=False), dtype="F32")
    name = run.skeleton.layers[0][0]
    with run.skeleton.loaded(0, read_tensor, CPU) as layer:
        flow = Flow(Matrices(name, layer), None, 40)
        with norms_followed(name, layer):
            run.replay.run(0, layer, run.states, tap=lambda _: flow, only=[0])
    layout = LayerLayout(run.skeleton.segments(0), flow)
    values = next(p for p in layout.producers() if p.name.endswith("v_proj"))
    (reader,) = values.readers
    # 4 query heads of 16 over 2 value heads: 0 0 1 1
    heads = [torch.arange(16) + 16 * head for head in (0, 0, 1, 1)]
    assert torch.equal(reader.channels, torch.cat(heads))


class Reads(nn.Module):
    """A layer in which something else than a matrix reads the norm's output."""

    def __init__(self, use):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.use = use

    def forward(self, x):
        return self.use(self, self.norm(x))


@pytest.mark.parametrize(("use", "readers"), [
    (lambda m, h: m.a(h) + m.b(h), 2),
    (lambda m, h: m.a(h[..., :]) + m.b(h.view(-1, 8)).view(h.shape), 2),
    (lambda m, h: m.a(h * 3) + m.b(h.float()), 2),
    (lambda m, h: m.a(h) + h, None),  # a residual
    (lambda m, h: m.a(h) * h.mean(), None),
    (lambda m, h: m.a(h) + (h @ m.b.weight), None),  # not as a linear
    (lambda m, h: m.a(torch.relu(h)), None),
    (lambda m, h: m.a(h.flip(-1)), None),  # not understood: left alone
    (lambda m, h: m.a(h.transpose(0, 1).contiguous().transpose(0, 1)), 1),
])  # fmt: skip
def test_what_counts_as_reading(use, readers):
    layer = Reads(use)
    matrices = Matrices("l", layer)
    flow = Flow(matrices, None, 6)
    with torch.no_grad(), norms_followed("l", layer), flow:
        layer(torch.randn(2, 3, 8))
    norm = flow.norms["l.norm"]
    if readers is None:
        assert bool(norm.escaped.any())
    else:
        assert not bool(norm.escaped.any())
        assert len(norm.readers) == readers
        assert all(torch.equal(c, torch.arange(8)) for c in norm.readers.values())


class Expert(nn.Module):
    """Two linears whose names differ in a number, and whose shapes do not."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h):
        return self.fc2(torch.relu(self.fc1(h)))


class Numbered(nn.Module):
    """An MLP like that of CTRL behind a norm, and experts of which the first gets all tokens."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.experts = nn.ModuleList([Expert(), Expert()])

    def forward(self, x):
        h = self.norm(x)
        return self.mlp(h) + self.experts[0](h)


def test_numbers_in_names_tell_experts_and_not_linears_apart():
    """`mlp.2` reads what `mlp.0` made, and is left alone; fc1 of the expert without tokens is not."""
    layer = Numbered()
    flow = Flow(Matrices("l", layer), None, 6)
    with torch.no_grad(), norms_followed("l", layer), flow:
        layer(torch.randn(2, 3, 8))
    modules = ["mlp.0", "mlp.2"]
    modules += [f"experts.{expert}.{name}" for expert in (0, 1) for name in ("fc1", "fc2")]
    segments = {f"l.{name}.weight": [[Segment(0, 8, f"l.{name}")]] for name in modules}
    (norm,) = LayerLayout(segments, flow).producers()
    assert [reader.matrix.parameter for reader in norm.readers] == [
        "l.mlp.0.weight", "l.experts.0.fc1.weight", "l.experts.1.fc1.weight"
    ]  # fmt: skip


class Gemma(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(k))

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight.float())


@pytest.mark.parametrize(("norm", "offset"), [
    (nn.LayerNorm(16), 0), (nn.RMSNorm(16), 0), (Gemma(16), 1), (nn.PReLU(16), None),
])  # fmt: skip
def test_how_a_norm_uses_its_weight(norm, offset):
    before = copy.deepcopy(norm.state_dict())
    assert norm_offset(norm) == offset
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "offset"), [(nn.LayerNorm(64), 0), (Gemma(64), 1)])
def test_readers_get_what_the_norm_was_really_divided_by(norm, offset, dtype):
    generator = torch.Generator().manual_seed(3)
    norm = copy.deepcopy(norm)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(64, generator=generator) * 0.4 + 0.3)
        norm.weight[7] = -offset  # a dead channel
    norm = norm.to(dtype)
    scale = torch.randint(-6, 7, (64,), generator=generator).float().exp2()
    made, real = scale_norm(norm, offset, scale)
    assert made["weight"].dtype == dtype
    before = norm.weight.double() + offset
    assert torch.allclose((made["weight"].double() + offset) * real.double(), before, rtol=1e-7)
    assert float(real[7]) == 1.0
    if offset == 0:
        assert torch.equal(real[:7], scale[:7])
    else:
        assert float((real / scale)[torch.arange(64) != 7].min()) > 0.4
    if "bias" in made:
        assert torch.allclose(made["bias"].double() * real.double(), norm.bias.double(), rtol=2**-8)


@pytest.mark.parametrize(("family", "experts", "chosen"), [
    ("mixtral", "mlp.experts", 2), ("llama4_text", "feed_forward.experts", 1)
])  # fmt: skip
def test_a_tap_hears_of_each_expert(tmp_path, family, experts, chosen):
    """Of the tokens that the router gave it, also if all experts multiply all tokens."""
    path, batches = make_tiny(tmp_path / "m", family), make_batches(padded=False)
    run = Replayed(path, batches, workers=1)
    heard = {}

    class Listener:
        def linear(self, matrix, x, bias):
            assert bool(x.any(-1).all())
            heard[matrix] = heard.get(matrix, 0) + x.numel() // x.shape[-1]

    def taps(index, layer):
        return lambda _: Tap(Matrices(run.skeleton.layers[index][0], layer), Listener())

    run.layer(0, taps)
    path = f"model.layers.0.{experts}"
    for parameter in (f"{path}.gate_up_proj", f"{path}.down_proj"):
        counts = [n for matrix, n in heard.items() if matrix.parameter == parameter]
        assert len(counts) == run.skeleton.model.config.num_local_experts
        assert sum(counts) == chosen * (2 * 20 + 3 * 13)


def test_results_of_single_experts_are_taken(tmp_path):
    """What a listener computes for its tokens stands in the outputs; other experts' stay."""
    run = Replayed(make_tiny(tmp_path / "m", "llama4_text", dtype=torch.float32), [PROBE], dtype="F32")
    name, x = run.skeleton.layers[0][0], 10 * run.states[0]
    outputs = []
    with run.skeleton.loaded(0, run.read, CPU) as layer:
        matrices = Matrices(name, layer, run.skeleton.transposed(0))
        assert run.skeleton.transposed(0) == {
            f"{name}.feed_forward.experts.{part}" for part in ("gate_up_proj", "down_proj")
        }
        for factor in (None, 1, 3):

            class Listener:
                def linear(self, matrix, x, bias, factor=factor):
                    if factor is None or "experts.down_proj" not in matrix.parameter:
                        return None
                    return factor * torch.nn.functional.linear(x, matrices.weight(matrix))

            with torch.no_grad(), Tap(matrices, Listener()):
                experts, _ = layer.feed_forward(x)
                outputs.append(experts - layer.feed_forward.shared_expert(x.reshape(-1, 64)))
    alone, same, thrice = outputs
    assert float(alone.abs().mean()) > 0.001
    torch.testing.assert_close(same, alone, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(thrice, 3 * alone, rtol=1e-3, atol=1e-5)


def test_channels_near_the_median_are_left_alone():
    """rms(x) is 3 in all channels but three, weights are 1: s = sqrt(rms / 3) over the median."""
    matrix = Matrix("m.weight")
    square = torch.full((9,), 9.0)
    square[:3] = torch.tensor([9 * 3.0**2, 9 * 100.0**2, 9 / 100.0**2])
    producer = Producer((ChannelReader(matrix, torch.arange(9)),), torch.ones(9, dtype=torch.bool), "n")
    given = producer, {matrix: square}, {matrix: torch.ones(4, 9)}, 0.5
    found = scales(*given, 2.0, powers=False).tolist()
    assert found[1:3] == [pytest.approx(10, rel=2**-8), pytest.approx(0.1, rel=2**-8)]
    assert found[0] == 1
    assert found[3:] == [1] * 6
    every = scales(*given, 1.0, powers=False)
    assert every[3].item() == pytest.approx(3**0.5, rel=2**-8)
    assert every[0].item() == pytest.approx(3, rel=2**-8)


def test_reports_are_json(tmp_path):
    path, batches = make_tiny(tmp_path / "m", "llama"), make_batches(padded=False)
    run = Replayed(path, [*batches, PROBE])
    layer_run = LayerRun(LoadedLayer(everything(run, 0), 0, Memory(run.states)))
    layer_run.measure(None)
    text = json.dumps(layer_run.report.document())
    assert '"tokens": 79' in text


def test_later_layers_are_given_what_the_layer_gives_before_it_is_edited(tmp_path):
    run = Replayed(make_tiny(tmp_path / "m", "llama"), [*make_batches(padded=False), PROBE])
    layer_run = LayerRun(LoadedLayer(everything(run, 0), 0, Memory(run.states)))
    outputs = Memory()
    layer_run.measure(outputs.put)
    assert layer_run.report.edits
    run.layer(0)
    assert outputs.keys() == run.states.keys()
    assert all(torch.equal(outputs[number], run.states[number]) for number in outputs)
