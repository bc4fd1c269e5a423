"""The replay against the ordinary forward: no bit may differ, whatever the family."""

import pytest
import torch

from quantcli.calibration.replay.calls import Outline
from quantcli.calibration.replay.skeleton import Segment, Skeleton
from quantcli.calibration.replay.taps import Matrices, Matrix
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError
from tests.replaying import CPU, Replayed, make_batches, ordinary_logits
from tests.tiny_models import FAMILIES, make_multimodal, make_tiny

ALL = [*FAMILIES, "multimodal"]


def make(folder, family, **options):
    if family == "multimodal":
        return make_multimodal(folder, **options)
    return make_tiny(folder, family, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of a family, made when it is first asked for."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = make(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return get


@pytest.mark.parametrize("family", ALL)
def test_bit_for_bit(models, family):
    path, batches = models(family), make_batches()
    run = Replayed(path, batches)
    run.layers()
    expected = ordinary_logits(run.skeleton, path, batches, torch.bfloat16)
    for ours, theirs in zip(run.logits(), expected, strict=True):
        assert theirs.float().std() > 0.01
        assert torch.equal(ours, theirs)
    assert all(p.device.type == "meta" for p in run.skeleton.model.parameters())


@pytest.mark.parametrize(("stored", "dtype", "name"), [
    (torch.float32, torch.float32, "F32"), (torch.float16, torch.float16, "F16"),
    (torch.bfloat16, torch.float32, "F32"),
])  # fmt: skip
def test_other_dtypes(tmp_path, stored, dtype, name):
    path, batches = make(tmp_path / "m", "deepseek_v3", dtype=stored), make_batches(padded=False)
    run = Replayed(path, batches, dtype=name)
    run.layers()
    expected = ordinary_logits(run.skeleton, path, batches, dtype)
    assert all(torch.equal(a, b) for a, b in zip(run.logits(), expected, strict=True))


def test_workers_change_nothing(models):
    batches = make_batches()
    results = []
    for workers in (1, 2, 5):
        run = Replayed(models("qwen3_moe"), batches, workers=workers)
        run.layers()
        results.append(run.states)
    for other in results[1:]:
        assert all(torch.equal(results[0][number], other[number]) for number in results[0])


def test_one_layer_at_a_time_is_in_memory(models):
    run = Replayed(models("llama"), make_batches())
    with run.skeleton.loaded(1, run.read, CPU):
        real = {n for n, p in run.skeleton.model.named_parameters() if p.device.type != "meta"}
    assert real
    assert all(name.startswith("model.layers.1.") for name in real)


def test_the_language_model_is_found_beside_a_larger_tower(models):
    skeleton = Skeleton(open_checkpoint(models("multimodal")), "BF16", trust_remote_code=False)
    assert [name for name, _ in skeleton.layers] == [
        f"model.language_model.layers.{index}" for index in range(4)
    ]


def test_whose_rows_fused_experts_have(models):
    skeleton = Skeleton(open_checkpoint(models("qwen3_moe")), "BF16", trust_remote_code=False)
    found = skeleton.segments(2)
    path = "model.layers.2.mlp.experts"
    assert found[f"{path}.gate_up_proj"][5] == [
        Segment(0, 32, f"{path}.5.gate_proj"), Segment(32, 64, f"{path}.5.up_proj")
    ]  # fmt: skip
    assert found[f"{path}.down_proj"][7] == [Segment(0, 64, f"{path}.7.down_proj")]
    assert found["model.layers.2.self_attn.k_proj.weight"] == [
        [Segment(0, 32, "model.layers.2.self_attn.k_proj")]
    ]


@pytest.mark.parametrize(("family", "path", "transposed"), [
    ("granitemoe", "model.layers.2.block_sparse_moe.experts", False),
    ("granitemoe_swa", "model.layers.2.block_sparse_moe.experts", False),
    ("aria_text", "model.layers.2.mlp.experts", True),
])  # fmt: skip
def test_whose_rows_split_stacks_have(models, family, path, transposed):
    """Those of single experts, with the sides of a matrix that multiplies, however it is loaded."""
    run = Replayed(models(family), make_batches())
    skeleton, (name, _) = run.skeleton, run.skeleton.layers[2]
    gated, down = f"{path}.gate_up_proj", f"{path}.down_proj"
    assert skeleton.segments(2)[gated][5] == [
        Segment(0, 96, f"{path}.5.gate_proj"), Segment(96, 192, f"{path}.5.up_proj")
    ]  # fmt: skip
    assert skeleton.segments(2)[down][7] == [Segment(0, 64, f"{path}.7.down_proj")]
    assert skeleton.transposed(2) == (frozenset({gated, down}) if transposed else frozenset())
    assert skeleton.converts(2)
    assert skeleton.source(gated) is None
    with skeleton.loaded(2, run.read, CPU) as layer:
        matrices = Matrices(name, layer, skeleton.transposed(2))
        assert matrices.shapes[gated] == (8, 192, 64)
        stored = skeleton.checkpoint.tensors[f"{path}.5.up_proj.weight"]
        assert torch.equal(matrices.weight(Matrix(gated, 5))[96:], read_tensor(stored))


def test_draft_layers_are_told_as_unused(models, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    path = tmp_path / "m"
    shutil.copytree(models("llama"), path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    skeleton = Skeleton(open_checkpoint(path), "BF16", trust_remote_code=False)
    assert skeleton.unused == ["model.layers.3.eh_proj.weight"]


def test_a_missing_tensor_is_named(models, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    path = tmp_path / "m"
    shutil.copytree(models("llama"), path)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no tensor for parameter `model\.layers\.1\.mlp\.up"):
        Skeleton(open_checkpoint(path), "BF16", trust_remote_code=False)


@pytest.mark.parametrize(("config", "what"), [
    ({"model_type": "nonsense"}, "cannot build this model"),
    ({"model_type": "nonsense", "auto_map": {"AutoConfig": "own.Own"}}, "comes with code of its own"),
    ({"model_type": "llama", "hidden_size": "wide"}, "`hidden_size` should be a whole number"),
])  # fmt: skip
def test_models_that_cannot_be_built(models, tmp_path, config, what):
    import json
    import shutil

    path = tmp_path / "m"
    shutil.copytree(models("llama"), path)
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text("raise SystemExit('ran code that came with the model')")
    with pytest.raises(InputError) as caught:
        Skeleton(open_checkpoint(path), "BF16", trust_remote_code=False)
    assert what in caught.value.what
    assert caught.value.where == str(path / "config.json")


def test_nan_names_layer_and_sample(models, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    path = tmp_path / "m"
    shutil.copytree(models("llama"), path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = float("inf")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    batches = make_batches(padded=False)
    batches[0].input_ids[batches[0].input_ids == 7] = 8
    batches[1].input_ids[batches[1].input_ids == 7] = 8
    batches[1].input_ids[2, 5] = 7
    run = Replayed(path, batches)
    with pytest.raises(InputError, match=r"`model.layers.0` yields NaN or Inf for sample 4"):
        run.layers()


class Older(torch.nn.Module):
    """Layers whose outputs come in tuples, with arguments of each one's own."""

    def __init__(self, *, skip=False):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.skip = skip

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            if not (self.skip and index == 1):
                x = layer(x)[0]
        return x


def test_layers_that_return_tuples():
    model = Older()
    x = torch.randn(2, 3, 4)
    noted = Outline(list(model.layers)).note(lambda: model(x))
    assert noted is not None
    hidden, calls = noted
    assert torch.equal(hidden, x)
    assert [call.place for call in calls] == [0, 0, 0]


def test_layers_out_of_order_are_refused():
    model = Older(skip=True)
    assert Outline(list(model.layers)).note(lambda: model(torch.randn(2, 3, 4))) is None
    assert all("forward" not in vars(layer) for layer in model.layers)
