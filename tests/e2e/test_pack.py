"""A quantized checkpoint for another engine: the same numbers, and there and back the same bytes."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.core.numerics import multiplier
from tests.e2e.calibrating import RECIPE, Bench, Models, make_bench
from tests.e2e.conftest import Box, Faults, Killed, Result, run_cli, snapshot

MANIFEST = "quantcli_manifest.json"


def pack(source: Path, target: str, out: Path, *more: object) -> Result:
    return run_cli("pack", source, "--target", target, "--out", out, "--workers", 1, *more)


def refused(result: Result, *words: str) -> None:
    assert result.code == 2, (result.code, result.err)
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err, (word, result.err)


def quantized(box: Box, scheme: str, target: str = "ascend", *more: object) -> Path:
    """A checkpoint of several files; config.json is as transformers writes it."""
    config = json.loads((box.model / "config.json").read_text())
    (box.model / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    box.edit_recipe(f'target: {target}\nrules: [{{match: "*_proj", scheme: {scheme}}}]\n')
    result = box.run("--set", "max_shard=2500", *more)
    assert result.code == 0, result.err
    return box.out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def there_and_back(source: Path, target: str, home: str) -> Path:
    """Pack for `target` and back: only the manifest and the card differ. The checkpoint between."""
    there, back = source.with_name("there"), source.with_name("back")
    for first, name, out in ((source, target, there), (there, home, back)):
        result = pack(first, name, out)
        assert result.code == 0, result.err
        assert run_cli("verify", out, "--full").code == 0
        manifest = json.loads((out / MANIFEST).read_text())
        assert manifest["state"] == "lossless"
        assert manifest["target"] == name
        assert manifest["recipe"] == json.loads((source / MANIFEST).read_text())["recipe"]
    before, after = snapshot(source), snapshot(back)
    for name in (MANIFEST, "README.md"):  # they say how a checkpoint was made
        del before[name], after[name]
    # a recipe is for the format of which it speaks: what is packed has it under another name
    after["quantcli_recipe.yaml"] = after.pop("quantcli_source_recipe.yaml")
    assert after == before
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} < before.keys()
    return there


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "fp8_dynamic", "w8a16"])
def test_ascend_and_back(box: Box, scheme: str) -> None:
    source = quantized(box, scheme)
    there = there_and_back(source, "compressed-tensors", "ascend")
    before, after = tensors(source), tensors(there)
    config = json.loads((there / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not (there / "quant_model_description.json").exists()
    assert len(list(there.glob("*.safetensors"))) == len(list(source.glob("*.safetensors"))) > 2
    for name, tensor in before.items():
        if name.endswith("_proj.weight_scale"):
            assert torch.equal(after[name].float(), tensor)
        elif not name.endswith("_offset") and not (name.endswith("_proj.weight") and scheme == "w8a16"):
            assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))
    if scheme == "w8a16":
        name = "model.layers.0.mlp.down_proj"
        words = after[f"{name}.weight_packed"]
        rows = words.view(torch.uint8).view(words.shape[0], -1).int() - 128
        assert torch.equal(rows, before[f"{name}.weight"].int())


def test_int4_has_one_format(tmp_path: Path) -> None:
    from tests.e2e.conftest import make_llama

    recipe = tmp_path / "recipe.yaml"
    box = Box(tmp_path, make_llama(tmp_path / "model", side=128), recipe, tmp_path / "out")
    source = quantized(box, "{name: w4a16, group_size: 32}", "compressed-tensors")
    scales = [t for name, t in tensors(source).items() if name.endswith("_proj.weight_scale")]
    assert all(0.25 < float((scale < 0).float().mean()) < 0.75 for scale in scales)
    assert run_cli("verify", source, "--full").code == 0
    refused(pack(source, "ascend", tmp_path / "there"), "the engine has W4A16 for experts alone")


def test_mxfp8_and_back(tmp_path: Path) -> None:
    """The same bytes in both formats, apart from what describes them."""
    from tests.e2e.conftest import make_llama

    recipe = tmp_path / "recipe.yaml"
    box = Box(tmp_path, make_llama(tmp_path / "model", side=128), recipe, tmp_path / "out")
    source = quantized(box, "mxfp8", "ascend", "--set", "max_shard=100000")
    there = there_and_back(source, "compressed-tensors", "ascend")
    before, after = tensors(source), tensors(there)
    assert before.keys() == after.keys()
    assert sum(tensor.dtype == torch.uint8 for tensor in after.values()) >= 7
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_block"])
def test_fp8_formats(tmp_path: Path, scheme: str) -> None:
    from tests.e2e.conftest import make_llama

    recipe = tmp_path / "recipe.yaml"
    box = Box(tmp_path, make_llama(tmp_path / "model", side=128), recipe, tmp_path / "out")
    source = quantized(box, scheme, "fp8", "--set", "max_shard=100000")
    there = there_and_back(source, "compressed-tensors", "fp8")
    before, after = tensors(source), tensors(there)
    name = "model.layers.0.mlp.up_proj"
    suffix = "weight_scale_inv" if scheme == "fp8_block" else "weight_scale"
    assert torch.equal(before[f"{name}.{suffix}"], after[f"{name}.weight_scale"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_static_and_back(tmp_path: Path, symmetric: bool, dtype: str) -> None:
    """Steps of inputs are those of the multiplier; dynamic modules beside static ones."""
    bench = static_bench(tmp_path, dtype, symmetric)
    assert bench.run("--set", "max_shard=40000").code == 0
    there = there_and_back(bench.out, "compressed-tensors", "ascend")
    before, after = tensors(bench.out), tensors(there)
    config = json.loads((there / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    held = getattr(torch, dtype)
    checked = 0
    for name, scale in before.items():
        if not name.endswith(".input_scale"):
            continue
        module = name.removesuffix(".input_scale")
        r = multiplier(scale.to(held)).double()
        step = after[name].double()
        assert abs(float(step * r) - 1) < 2**-20
        exact = before[f"{module}.deq_scale"]
        deq = exact.view(torch.int32)[::2].view(torch.float32) if exact.dtype == torch.int64 else exact
        product = deq.double() * r
        assert torch.equal(after[f"{module}.weight_scale"].double().flatten(), product)
        assert torch.equal(after[f"{module}.weight"], before[f"{module}.weight"])
        offset = before[f"{module}.input_offset"].float()
        assert torch.equal(after[f"{module}.input_zero_point"].float(), offset)
        # as vLLM finds the offset again, from the ends of the range, in float32
        s = after[name]
        low, high = s * (-128 - offset), s * (127 - offset)
        assert int((-128 - low / ((high - low) / 255)).to(torch.int32)) == int(offset)
        checked += 1
    assert checked > 10
    assert any(name.endswith("q_proj.bias") for name in after)


def test_a_scale_that_its_multiplier_does_not_tell(tmp_path: Path) -> None:
    """Two numbers of 8 bits may have one multiplier: back comes that which is nearest to the step."""
    bench = static_bench(tmp_path, "bfloat16", True, "minmax")
    assert bench.run().code == 0
    assert pack(bench.out, "compressed-tensors", tmp_path / "there").code == 0
    assert pack(tmp_path / "there", "ascend", tmp_path / "back").code == 0
    before, after = tensors(bench.out), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    unlike = [name for name in before if not torch.equal(before[name], after[name])]
    assert unlike
    assert all(name.endswith(".input_scale") for name in unlike)
    for name in unlike:
        pair = before[name].bfloat16(), after[name].bfloat16()
        assert torch.equal(*map(multiplier, pair))
        step = 1 / multiplier(pair[0])
        assert (pair[1] - step).abs() <= (pair[0] - step).abs()


def static_bench(root: Path, dtype: str, symmetric: bool, observer: str = "mse") -> Bench:
    rules = (
        '  - {match: "*.down_proj", scheme: w8a8_dynamic}\n'
        '  - match: "*_proj"\n'
        f"    scheme: {{name: w8a8_static, observer: {observer}, "
        f"symmetric: {str(symmetric).lower()}}}\n"
    )
    recipe = RECIPE[: RECIPE.index("rules:")] + "rules:\n" + rules
    bench = make_bench(root, Models(root / "models")("qwen2"), recipe)
    model = bench.own_model()
    config = json.loads((model / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (model / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    found = {k: v.to(getattr(torch, dtype)) for k, v in load_file(model / "model.safetensors").items()}
    save_file(found, model / "model.safetensors", metadata={"format": "pt"})
    return bench


def test_quant_bias_without_its_bias_is_refused(tmp_path: Path) -> None:
    bench = static_bench(tmp_path, "bfloat16", True)
    assert bench.run().code == 0
    (file,) = bench.out.glob("*.safetensors")
    found = load_file(file)
    name = "model.layers.0.self_attn.q_proj"
    found[f"{name}.quant_bias"][3] += 1000
    save_file(found, file, metadata={"format": "pt"})
    refused(pack(bench.out, "compressed-tensors", bench.root / "x"), f"{name}.quant_bias`[3]")
    assert not (bench.root / "x").exists()


def test_scales_that_would_be_rounded_are_refused(box: Box) -> None:
    source = quantized(box, "w8a8_dynamic", "compressed-tensors")
    result = pack(source, "ascend", box.root / "x")
    refused(result, "would be rounded: ascend holds it in bfloat16", "weight_scale`[")
    assert not list(box.root.glob("x*")), "what can never be finished is in nobody's way"
    plan = pack(source, "ascend", box.root / "x", "--plan", "--json").json["plan"]
    said = "weight_scale must fit bfloat16 as it is, which is checked while writing"
    assert said in plan["notes"]
    # with scales that bfloat16 holds the same checkpoint is taken
    for file in source.glob("*.safetensors"):
        found = load_file(file)
        for name, tensor in found.items():
            if name.endswith("weight_scale"):
                found[name] = tensor.bfloat16().float()
        save_file(found, file, metadata={"format": "pt"})
    assert pack(source, "ascend", box.root / "x").code == 0
    assert run_cli("verify", box.root / "x").code == 0


def test_static_inputs_of_other_steps_are_refused(tmp_path: Path) -> None:
    recipe = RECIPE.replace("target: ascend", "target: compressed-tensors")
    bench = make_bench(tmp_path, Models(tmp_path / "models")("llama"), recipe)
    assert bench.run().code == 0
    refused(pack(bench.out, "ascend", tmp_path / "x"), "input_scale", "makes other steps")


@pytest.mark.parametrize(
    ("scheme", "source", "target", "words"),
    [
        ("w4a4_dynamic", "ascend", "compressed-tensors", "W4A4_DYNAMIC"),
        ("w8a8_dynamic", "ascend", "fp8", "stores fp8 alone"),
        ("fp8_dynamic", "ascend", "fp8", "a scale per channel"),
        ("fp8_tensor", "fp8", "ascend", "cannot store"),
        ("w8a8_dynamic", "ascend", "ascend", "an ascend checkpoint already"),
        ("w8a8_dynamic", "ascend", "ascent", "did you mean `ascend`?"),
    ],
)
def test_what_a_target_has_not(box: Box, scheme: str, source: str, target: str, words: str) -> None:
    found = quantized(box, scheme, source)
    for more in ((), ("--plan",)):
        refused(pack(found, target, box.root / "x", *more), words, "fix: ")
    assert not list(box.root.glob("x*"))


def test_bad_sources(box: Box) -> None:
    out = box.root / "x"
    refused(pack(box.model, "ascend", out), "float model", "quantcli quantize")
    refused(pack(box.root / "nowhere", "ascend", out), "no such model directory")
    source = quantized(box, "w8a8_dynamic")
    refused(pack(source, "compressed-tensors", source), "is the checkpoint directory")
    refused(pack(source, "compressed-tensors", box.model), "output directory exists")
    refused(run_cli("pack", source, "--out", out), "option --target is missing")
    refused(run_cli("pack", source, source, "--target", "fp8", "--out", out), "one checkpoint")
    refused(
        pack(source, "compressed-tensors", out, "--set", "speed=3"),
        "has no options",
        "unknown key `speed`",
    )
    refused(pack(source, "compressed-tensors", out, "--set", "speed"), "KEY=VALUE")
    for value in ("!!bool maybe", "!!int ''", "[" * 3000, "2024-99-99: !!timestamp 2024-99-99"):
        refused(
            pack(source, "compressed-tensors", out, "--set", f"speed={value}"), "YAML", "--set speed="
        )
    refused(
        run_cli("pack", "--merge", source, "--target", "fp8", "--out", out), "does not take --target"
    )
    description = source / "quant_model_description.json"
    table = json.loads(description.read_text())
    table["model.layers.0.mlp.up_proj.weight"] = "W4A4_FLATQUANT_DYNAMIC"
    description.write_text(json.dumps(table))
    refused(pack(source, "compressed-tensors", out), "quantcli verify")
    description.unlink()
    refused(pack(source, "compressed-tensors", out), "quant_model_description.json")
    assert not out.exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [(torch.nan, "NaN or Inf"), (-0.25, "weight_scale is -0.25"), (0.0, "weight_scale is 0")],
)
def test_damaged_scales_are_refused(box: Box, value: float, said: str) -> None:
    source = quantized(box, "w8a8_dynamic")
    name = "model.layers.0.mlp.down_proj.weight_scale"
    for file in source.glob("*.safetensors"):
        found = load_file(file)
        if name in found:
            found[name][5] = value
            save_file(found, file, metadata={"format": "pt"})
    refused(pack(source, "compressed-tensors", box.root / "x"), said, name)
    assert not list(box.root.glob("x*"))


def test_plan_writes_nothing_and_is_what_is_written(box: Box) -> None:
    source = quantized(box, "w8a8_dynamic")
    before = snapshot(box.root)
    out = box.root / "there"
    planned = pack(source, "compressed-tensors", out, "--plan", "--json").json["plan"]
    shown = pack(source, "compressed-tensors", out, "--plan")
    assert snapshot(box.root) == before
    assert planned["state"] == "lossless"
    assert [line["modules"] for line in planned["modules"]] == [7]
    assert "no number is rounded" in shown.out
    written = pack(source, "compressed-tensors", out, "--json").json
    assert written["plan"]["digest"] == planned["digest"]
    sizes = {entry["file"]: entry["bytes"] for entry in planned["shards"]}
    assert sizes == {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
    assert {*sizes, *planned["files"]} == written["files"].keys()


def test_same_bytes_for_any_workers(box: Box) -> None:
    source = quantized(box, "w8a16")
    found = []
    for workers in (1, 5):
        out = box.root / f"there{workers}"
        assert pack(source, "compressed-tensors", out, "--workers", workers).code == 0
        found.append(snapshot(out))
    assert found[0] == found[1]


def test_stopped_goes_on(box: Box) -> None:
    source = quantized(box, "w8a8_dynamic")
    wanted_at = box.root / "undisturbed"
    assert pack(source, "compressed-tensors", wanted_at).code == 0
    wanted, kept = snapshot(wanted_at), snapshot(source)
    reused = set()
    for nth in range(2, 1000, 9):
        out = box.root / f"out{nth}"
        faults = Faults(box.root, nth, Killed, sticky=True)
        with suppress(Killed), faults.armed():
            pack(source, "compressed-tensors", out)
        if not out.exists():
            again = pack(source, "compressed-tensors", out, "--json")
            assert again.code == 0, (faults.fired, again.err)
            reused.add(again.json["shards_reused"])
        assert snapshot(out) == wanted, faults.fired
        if faults.fired is None:
            break
    assert faults.fired is None
    assert len(reused) >= 3
    assert snapshot(source) == kept
