"""Schemes that need data, from plan to files: constants, biases, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.convert.execute import RunOptions, execute
from quantcli.convert.folder import LocalFolder
from quantcli.core.errors import InputError
from quantcli.planning import block as streaming
from quantcli.planning.plan import Quantize
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
from tests.measured import store, weight_dtype

A = "model.layers.0.self_attn"
PROJECTIONS = [f"{A}.{name}_proj" for name in "qkvo"]


def weights(dtype, seed=0):
    """q and k with biases, v without, and an o_proj of one row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(8, 16), "lm_head.weight": normal(8, 16)}
    tensors |= {f"{A}.{name}_proj.weight": normal(24, 16) for name in "qkv"}
    tensors |= {f"{A}.{name}_proj.bias": normal(24) * 9 for name in "qk"}
    tensors[f"{A}.o_proj.weight"] = normal(1, 24)
    return tensors


def make_model(folder, tensors, dtype=torch.bfloat16):
    """Biases stand in another file than their weights."""
    folder.mkdir()
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("bias")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in biases}
    save_file(rest, folder / "model-00001-of-00002.safetensors")
    save_file(biases, folder / "model-00002-of-00002.safetensors")
    config = {"model_type": "qwen2", "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text("target: ascend\n" + text)
    return load_recipe(path)


def rule(scheme="w8a8_static", more=""):
    return f"{more}rules: [{{match: '*_proj', scheme: {scheme}}}]\n"


def measure(scheme, dtype, seed=1):
    """Stats of every module; q, k and v have the same input."""
    generator = torch.Generator().manual_seed(seed)
    table = {}
    for names, k, shift in ((PROJECTIONS[:3], 16, 0.3), (PROJECTIONS[3:], 24, -1.0)):
        observer = scheme.observer(dtype)
        observer.update((torch.randn(200, k, generator=generator) + shift).to(dtype), 0)
        square = {"input_square": torch.linspace(0.1, 3, k)}
        table |= {name: dict(observer.stats()) | square for name in names}
    return table


@pytest.fixture
def setting(tmp_path):
    """A recipe, a checkpoint and what was measured for it."""
    recipe = load(tmp_path, rule())
    checkpoint = open_checkpoint(make_model(tmp_path / "model", weights(torch.bfloat16)))
    return recipe, checkpoint, measure(recipe.rules[0].scheme, torch.bfloat16)


@pytest.mark.parametrize("name", ["w8a8_static", "w8a8_mix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", ["false", "true"])
def test_what_is_written(tmp_path, monkeypatch, name, dtype, symmetric):
    source = weights(dtype)
    recipe = load(tmp_path, rule(f"{{name: {name}, symmetric: {symmetric}}}"))
    scheme, target = recipe.rules[0].scheme, recipe.target
    stats = measure(scheme, dtype)
    checkpoint = open_checkpoint(make_model(tmp_path / "model", source, dtype))
    plan = make_plan(recipe, checkpoint, store(tmp_path / "stats.safetensors", stats))
    assert plan.needs_data == ()
    outs = []
    for number, (workers, block, job) in enumerate([(1, 2**19, 2**24), (2, 16 * 5, 7 * 32), (3, 1, 1)]):
        monkeypatch.setattr(streaming, "JOB_BYTES", job)
        execute(plan, LocalFolder(tmp_path / f"{number}"), RunOptions(workers, block_elements=block))
        outs.append({f.name: f.read_bytes() for f in (tmp_path / f"{number}").iterdir()})
    assert outs[0] == outs[1] == outs[2]
    written = load_file(tmp_path / "0" / "model-00001-of-00001.safetensors")
    for module in PROJECTIONS:
        found = scheme.constants(stats[module], dtype)
        held = weight_dtype(scheme, dtype)
        weight, bias = source[f"{module}.weight"], source.get(f"{module}.bias")
        parts = scheme.quantize(weight, held, found, bias)
        expected = target.pack(scheme.numerics, parts, tuple(parts["weight"].shape))
        for suffix, tensor in expected.items():
            mine = written.pop(f"{module}.{suffix}")
            assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), suffix
            assert torch.equal(mine, tensor), suffix
        assert ("weight_scale" in expected) == (name == "w8a8_mix")
        if bias is not None:
            plain = scheme.quantize(weight, held, found)
            assert not torch.equal(plain["quant_bias"], parts["quant_bias"])
    assert written.keys() == source.keys() - {f"{module}.weight" for module in PROJECTIONS}
    assert all(torch.equal(tensor, source[key]) for key, tensor in written.items())
    table = json.loads((tmp_path / "0" / "quant_model_description.json").read_text())
    assert table[f"{A}.q_proj.bias"] == "FLOAT"
    assert table[f"{A}.q_proj.deq_scale"] == {"w8a8_static": "W8A8", "w8a8_mix": "W8A8_MIX"}[name]


def test_items_know_what_they_are_made_from(setting, tmp_path):
    recipe, checkpoint, stats = setting
    plan = make_plan(recipe, checkpoint, store(tmp_path / "s.safetensors", stats))
    items = {i.module: i for s in plan.shards for i in s.items if isinstance(i, Quantize)}
    q, v = items[f"{A}.q_proj"], items[f"{A}.v_proj"]
    assert q.engine_dtypes == ("F32", "BF16")
    assert q.bias == checkpoint.tensors[f"{A}.q_proj.bias"]
    assert v.bias is None
    constants = {output.spec.name for output in q.outputs if not output.rows}
    assert constants == {f"{A}.q_proj.input_scale", f"{A}.q_proj.input_offset"}
    assert q.stats.keys() == {"input_scale", "input_offset", "input_min", "input_max", "input_square"}
    dynamic = make_plan(load(tmp_path, rule("w8a8_dynamic")), checkpoint)
    for item in (i for s in dynamic.shards for i in s.items if isinstance(i, Quantize)):
        assert (item.bias, dict(item.stats)) == (None, {})


def test_without_data_there_is_a_plan_and_no_run(setting, tmp_path):
    recipe, checkpoint, stats = setting
    plan = make_plan(recipe, checkpoint)
    assert set(plan.needs_data) == set(PROJECTIONS)
    whole = make_plan(recipe, checkpoint, store(tmp_path / "s.safetensors", stats))
    assert [shard.header for shard in plan.shards] == [shard.header for shard in whole.shards]
    assert plan.sidecars == whole.sidecars
    del stats[f"{A}.o_proj"]
    most = make_plan(recipe, checkpoint, store(tmp_path / "t.safetensors", stats))
    assert most.needs_data == (f"{A}.o_proj",)
    for incomplete, count in ((plan, 4), (most, 1)):
        with pytest.raises(InputError, match=f"{count} modules have not been measured") as caught:
            execute(incomplete, LocalFolder(tmp_path / "out"), RunOptions(1))
        assert "quantcli calibrate" in caught.value.fix
    assert not list(tmp_path.glob("out*"))


def test_the_digest_covers_what_was_measured(setting, tmp_path):
    recipe, checkpoint, stats = setting

    def digest(number):
        return make_plan(recipe, checkpoint, store(tmp_path / f"{number}.safetensors", stats)).digest

    first = digest(0)
    assert digest(1) == first, "the same values from another file"
    assert make_plan(recipe, checkpoint).digest != first
    stats[f"{A}.o_proj"]["input_offset"] += 1
    assert digest(2) != first


def test_siblings_that_were_measured_differently_are_refused(setting, tmp_path):
    recipe, checkpoint, stats = setting
    stats[f"{A}.v_proj"]["input_scale"] = stats[f"{A}.v_proj"]["input_scale"] * 2
    with pytest.raises(InputError, match="share what is measured of their inputs") as caught:
        make_plan(recipe, checkpoint, store(tmp_path / "s.safetensors", stats))
    assert "v_proj" in caught.value.where


def test_siblings_under_rules_that_measure_differently_are_refused(setting, tmp_path):
    _, checkpoint, _ = setting
    rules = "[{match: '*.v_proj', scheme: {name: w8a8_static, observer: minmax}}, "
    recipe = load(tmp_path, f"rules: {rules}{{match: '*_proj', scheme: w8a8_static}}]\n")
    with pytest.raises(InputError, match=r"fuses these siblings.*observer: minmax"):
        make_plan(recipe, checkpoint)


def test_incomplete_stats_are_refused(setting, tmp_path):
    recipe, checkpoint, stats = setting
    del stats[f"{A}.q_proj"]["input_offset"]
    with pytest.raises(InputError, match="lack input_offset") as caught:
        make_plan(recipe, checkpoint, store(tmp_path / "s.safetensors", stats))
    assert "q_proj" in caught.value.where


def test_stats_that_make_no_sense_stop_the_run(setting, tmp_path):
    recipe, checkpoint, stats = setting
    stats[f"{A}.o_proj"]["input_scale"] = torch.zeros(1)
    plan = make_plan(recipe, checkpoint, store(tmp_path / "s.safetensors", stats))
    with pytest.raises(InputError, match=r"input_scale 0\.0 is not a scale") as caught:
        execute(plan, LocalFolder(tmp_path / "out"), RunOptions(2))
    assert f"{A}.o_proj" in caught.value.where
    assert "s.safetensors" in caught.value.where


@pytest.mark.parametrize(
    ("tensor", "row", "place"),
    [("bias", 19, "[19]"), ("weight", 21, "[21, 0]")],
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_and_inf_are_found_where_they_are(tmp_path, tensor, row, place, value):
    source = weights(torch.bfloat16)
    source[f"{A}.k_proj.{tensor}"][row] = value
    recipe = load(tmp_path, rule())
    stats = store(tmp_path / "s.safetensors", measure(recipe.rules[0].scheme, torch.bfloat16))
    plan = make_plan(recipe, open_checkpoint(make_model(tmp_path / "model", source)), stats)
    with pytest.raises(InputError, match=f"^{tensor} is {value}") as caught:
        execute(plan, LocalFolder(tmp_path / "out"), RunOptions(1, block_elements=16 * 7))
    assert f"`{A}.k_proj.{tensor}`{place}" in caught.value.where


@pytest.mark.parametrize("bias", [torch.zeros(23), torch.zeros(24, dtype=torch.int32)])
def test_a_bias_that_is_none_is_refused(tmp_path, bias):
    source = weights(torch.bfloat16)
    source[f"{A}.q_proj.bias"] = bias
    checkpoint = open_checkpoint(make_model(tmp_path / "model", source))
    for text in (rule(), rule("w8a8_dynamic")):  # which only copies it, and no engine would load it
        with pytest.raises(InputError, match="one value for each of 24 rows") as caught:
            make_plan(load(tmp_path, text), checkpoint)
        assert f"{A}.q_proj.bias" in caught.value.where


@pytest.mark.parametrize(
    ("scheme", "said"), [("w8a8_static", False), ("w8a8_mix", False), ("w8a8_dynamic", True)]
)
def test_the_calibration_block_has_an_effect_where_data_is_needed(setting, tmp_path, scheme, said):
    recipe = load(tmp_path, rule(scheme, "calibration: {samples: 3}\n"))
    notes = make_plan(recipe, setting[1]).notes
    assert any("`calibration` block has no effect" in note for note in notes) == said
