"""`calibration.all_tokens`: experts are shown all tokens, and a layer's outputs stay its own."""

import pytest
import torch
from torch import nn

from quantcli.calibration.channels import LayerLayout
from quantcli.calibration.flow import Flow, norms_followed
from quantcli.calibration.loaded import CalibrationRun, LoadedLayer
from quantcli.calibration.policy import Policy
from quantcli.calibration.replay.experts import before_experts, experts_of
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.skeleton import Segment, Skeleton
from quantcli.calibration.replay.taps import Matrices, Matrix
from quantcli.calibration.text.dataset import Batch
from quantcli.calibration.watch import Watch, layer_watched, watched
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.core.errors import InputError
from quantcli.planning.siblings import Siblings
from quantcli.sources.decode import decoded
from quantcli.targets.vllm_family import EXPERT
from tests.replaying import CPU, Memory, make_batches
from tests.tiny_models import make_tiny

FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "granitemoe", "granitemoehybrid", "llama4_text",
            "gemma4_text", "qwen3_vl_moe", "qwen3_5_moe", "step3p7", "aria_text"]  # fmt: skip


class Seen:
    """All inputs of a matrix, in the order of the data."""

    def __init__(self):
        self.by_batch = {}

    def update(self, x, batch):
        self.by_batch.setdefault(batch, []).append(x.clone())

    @property
    def rows(self):
        return torch.cat([x for batch in sorted(self.by_batch) for x in self.by_batch[batch]])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {}

    def make(family):
        if family not in made:
            made[family] = make_tiny(root / family, family)
        return made[family]

    return make


def all_layers(path, all_tokens):
    """Per layer: what all matrices have seen, the counts, and the outputs."""
    batches = make_batches()
    skeleton = Skeleton(decoded(open_checkpoint(path)), "F32", trust_remote_code=False)
    probe = Batch(batches[0].input_ids[:1, :8], None)
    replay = Replay(skeleton, [*batches, probe], device=CPU, workers=2)
    states = Memory()
    replay.begin(states.put)
    policy = Policy({}, Siblings({}), "error", "float", all_tokens=all_tokens)
    run = CalibrationRun(replay, policy, (), workers=2)
    for index in range(len(skeleton.layers)):
        layer = LoadedLayer(run, index, states)
        after = Memory()
        with layer.loaded({}):
            seen = {
                Matrix(parameter, expert): Seen()
                for parameter, experts in layer.segments.items()
                for expert in range(len(experts))
            }
            watch = Watch({matrix: [one] for matrix, one in seen.items()}, counts=True)
            layer.watch(watch, after.put)
        experts = {
            Matrix(parameter, expert)
            for parameter, parts in layer.segments.items()
            for expert, segments in enumerate(parts)
            if any(EXPERT.fullmatch(segment.module) for segment in segments)
        }
        yield seen, watch, after, experts
        states = after


EXACT = "donot_use_mm_for_euclid_dist"
TOKENS = 2 * 20 + 3 * 13 + (9 + 17 + 4)  # of `make_batches`, without padding


def nearest(rows, others):
    """How far each row is from the nearest of the others, at most, over the size of the rows."""
    return float(torch.cdist(rows, others, compute_mode=EXACT).amin(1).max() / rows.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tokens_reach_all_experts_and_outputs_stay(models, family):
    layers = zip(all_layers(models(family), False), all_layers(models(family), True), strict=True)
    with_experts = 0
    for (seen, watch, after, experts), (seen_all, watch_all, after_all, _) in layers:
        assert after.keys() == after_all.keys() == {0, 1, 2, 3}  # the last one is the probe
        for number, hidden in after.items():
            assert torch.equal(hidden, after_all[number])
        with_experts += bool(experts)
        assert not experts or len({watch.tokens[matrix] for matrix in experts}) > 1
        for matrix in seen:
            if matrix in experts:
                assert watch_all.tokens[matrix] == TOKENS
                assert watch_all.routed[matrix] == watch.tokens[matrix]
                if seen[matrix].by_batch:  # products of more rows may differ in their last bits
                    assert nearest(seen[matrix].rows, seen_all[matrix].rows) < 1e-4
            elif seen[matrix].by_batch:
                assert torch.equal(seen[matrix].rows, seen_all[matrix].rows)
                assert watch_all.tokens[matrix] == watch.tokens[matrix]
    assert with_experts


class Listed(nn.Module):
    """A list of experts behind a router, as code that comes with models has it."""

    def __init__(self, experts=3, k=8):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def linear(n):
            module = nn.Linear(k, n, bias=False)
            module.weight = nn.Parameter(torch.randn(n, k, generator=generator), requires_grad=False)
            return module

        self.gate = linear(experts)
        self.experts = nn.ModuleList(linear(k) for _ in range(experts))

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                out[rows] = expert(flat[rows])
        return out.reshape(hidden.shape)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.mlp = Listed()

    def forward(self, hidden):
        return hidden + self.mlp(self.norm(hidden))


def everywhere(layer, segments, batches, lookers, *, counts=True):
    """Run a layer over batches of hidden states as a calibration does."""
    experts = experts_of("layer", layer, segments)
    names = frozenset(name for block in experts for name in block.parameters)
    watch = Watch({matrix: [one] for matrix, one in lookers.items()}, counts=counts)
    outputs = []
    plain = [Batch(torch.zeros(x.shape[:2], dtype=torch.long), None) for x in batches]
    with torch.no_grad(), layer_watched("layer", layer, plain, experts):
        for number, x in enumerate(batches):
            with watched(watch, Matrices("layer", layer), number, plain[number], names):
                outputs.append(layer(x))
    return watch, outputs


def listed():
    layer = Block()
    segments = {
        f"layer.mlp.experts.{e}.weight": [[Segment(0, 8, f"model.layers.0.mlp.experts.{e}.up_proj")]]
        for e in range(3)
    }
    segments["layer.mlp.gate.weight"] = [[Segment(0, 3, "model.layers.0.mlp.gate")]]
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 5, 8, generator=generator), torch.randn(1, 7, 8, generator=generator)]
    return layer, segments, batches


def test_a_list_of_experts():
    layer, segments, batches = listed()
    with torch.no_grad():
        expected = [layer(x) for x in batches]
    matrices = [Matrix(f"layer.mlp.experts.{e}.weight") for e in range(3)]
    seen = {matrix: Seen() for matrix in matrices}
    watch, outputs = everywhere(layer, segments, batches, seen)
    assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))
    tokens = torch.cat([layer.norm(x).reshape(-1, 8) for x in batches])
    assert all(torch.equal(one.rows, tokens) for one in seen.values())
    assert [watch.tokens[matrix] for matrix in matrices] == [17] * 3
    assert sum(watch.routed[matrix] for matrix in matrices) == 17
    assert watch.tokens[Matrix("layer.mlp.gate.weight")] == 17


def test_only_experts_that_are_looked_at_run():
    layer, segments, batches = listed()
    one = Matrix("layer.mlp.experts.1.weight")
    watch, _ = everywhere(layer, segments, batches, {one: Seen()}, counts=False)
    assert watch.tokens[one] == 17
    assert watch.tokens[Matrix("layer.mlp.experts.0.weight")] == 0


def test_experts_that_read_the_same_tokens_have_one_leader():
    layer, segments, batches = listed()
    flow = Flow(Matrices("layer", layer), None, batches[0][0].numel() // 8)
    with torch.no_grad(), norms_followed("layer", layer), flow:
        layer(batches[0][:1])
    (experts,) = experts_of("layer", layer, segments)
    matrices = [Matrix(f"layer.mlp.experts.{e}.weight") for e in range(3)]
    alone = LayerLayout(segments, flow).leaders()
    together = LayerLayout(segments, flow, [experts.parameters]).leaders()
    assert {together[matrix] for matrix in matrices} == {matrices[0]}
    assert all(alone.get(matrix, matrix) == matrix for matrix in matrices)
    gate = Matrix("layer.mlp.gate.weight")
    assert together[gate] == gate


def test_experts_that_read_other_values_are_refused():
    layer, segments, batches = listed()
    usual = layer.mlp.forward
    layer.mlp.forward = lambda hidden: usual(2 * hidden)  # experts do not read what the block is given
    with pytest.raises(InputError) as caught:
        everywhere(layer, segments, batches, {})
    assert "reads other values" in caught.value.what


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 8, 8), requires_grad=False)

    def forward(self, tokens, sizes):
        return tokens


def test_experts_of_another_interface_are_refused():
    layer = nn.Module()
    layer.experts = Strange()
    parts = [[Segment(0, 8, f"model.layers.0.experts.{e}.up_proj")] for e in range(3)]
    with pytest.raises(InputError) as caught:
        experts_of("layer", layer, {"layer.experts.w": parts})
    assert "has the arguments tokens, sizes" in caught.value.what
    assert "calibration.all_tokens" in caught.value.fix


def test_no_hook_is_left():
    layer, segments, batches = listed()
    everywhere(layer, segments, batches, {})
    assert not any(module._forward_pre_hooks for module in layer.modules())

    def nothing(block, tokens):
        """Look at no tokens."""

    with before_experts(experts_of("layer", layer, segments), nothing, nothing):
        assert any(module._forward_pre_hooks for module in layer.modules())
