"""Fp8 with scales of whole weights and of blocks, end to end, and checkpoints of other producers."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.schemes.fp8_block import Fp8Block
from tests.builders import make_model
from tests.e2e.calibrating import FEW, write_tokenizer
from tests.e2e.conftest import bf16, llama, make_llama, run_cli, snapshot
from tests.families import FAMILIES, make_family, shapes
from tests.tiny_models import make_tiny

L = "model.layers.0"
QKV = [f"{L}.self_attn.{name}_proj" for name in "qkv"]


def recipe(folder, scheme, target="fp8"):
    path = folder / f"{scheme}-{target}.yaml"
    path.write_text(f'target: {target}\nrules: [{{match: "*_proj", scheme: {scheme}}}]\n')
    return path


def convert(folder, scheme, model, *words, target="fp8"):
    out = folder / f"{scheme}-{target}"
    done = run_cli("quantize", recipe(folder, scheme, target), "--model", model, "--out", out, *words)
    assert done.code == 0, done.err
    return out


def loaded(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Weights of 256 x 256 and 512 x 256, those of k three times as large."""
    tensors = llama(side=256)
    name = f"{QKV[1]}.weight"
    _, shape, data = tensors[name]
    large = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).float().numpy() * 3
    tensors[name] = ("BF16", shape, bf16(large.reshape(shape).astype(np.float32)))
    words = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    folder = tmp_path_factory.mktemp("fp8") / "model"
    return make_model(
        folder,
        {"model.safetensors": tensors},
        config=words,
        files={"tokenizer.json": '{"version": "1.0"}'},
    )


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_block"])
@pytest.mark.parametrize("target", ["fp8", "compressed-tensors"])
def test_converted_and_found_sound(tmp_path, model, scheme, target):
    out = convert(tmp_path, scheme, model, target=target)
    found = run_cli("verify", out, "--full", "--against", model, "--tp", "1,2")
    assert found.code == 0, found.out
    source, made = loaded(model), loaded(out)
    name = "weight_scale_inv" if (scheme, target) == ("fp8_block", "fp8") else "weight_scale"
    if scheme == "fp8_tensor":  # one scale for all that the engine merges, of the largest
        largest = max(float(source[f"{m}.weight"].abs().max()) for m in QKV)
        scales = {float(made[f"{m}.{name}"]) for m in QKV}
        assert scales == {float(torch.tensor(largest) / 448)}
        alone = float(source[f"{L}.self_attn.o_proj.weight"].abs().max())
        assert float(made[f"{L}.self_attn.o_proj.{name}"]) == float(torch.tensor(alone) / 448)
    else:
        for module in QKV:
            whole = Fp8Block().quantize(source[f"{module}.weight"], torch.float32)
            assert torch.equal(made[f"{module}.{name}"], whole["weight_scale"])
            assert torch.equal(made[f"{module}.weight"].float(), whole["weight"].float())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_false_alarm_for_any_family(tmp_path, family):
    model, out, path = make_family(tmp_path / "model", family), tmp_path / "out", tmp_path / "r.yaml"
    path.write_text(
        'target: fp8\nrules:\n  - {match: ["*visual.*", "*.eh_proj"], scheme: keep, optional: true}\n'
        '  - {match: ["*_proj", "*.kv_a_proj_with_mqa", "*.experts.*"], scheme: fp8_tensor}\n'
    )
    done = run_cli("quantize", path, "--model", model, "--out", out, "--set", "max_shard=20000")
    assert done.code == 0, done.err
    found = run_cli("verify", out, "--full", "--against", model, "--json")
    assert found.code == 0, found.json["findings"]
    assert found.json["findings"] == []
    kept = {m.removesuffix(".weight") for m, s in shapes(family).items() if len(s) == 2}
    kept -= {module["module"] for module in found.json["modules"]}
    tied = {"lm_head"} if family == "qwen2_tied" else set()
    listed = {name for name in kept if not name.endswith("embed_tokens")} | tied
    if family == "vlm":  # names that engines move: test_transformers.py has all of them
        listed |= {"language_model.lm_head", "model.visual", "visual"}
    assert set(config(out)["modules_to_not_convert"]) == listed


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_block"])
def test_same_bytes_whatever_cuts_the_work(tmp_path, model, scheme, monkeypatch):
    first = snapshot(convert(tmp_path, scheme, model, "--workers", "1"))
    for folder, elements, job in (("a", 300 * 256, 2**16), ("b", 1000, 2**16)):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr("quantcli.planning.block.BLOCK_ELEMENTS", elements)
        monkeypatch.setattr("quantcli.planning.block.JOB_BYTES", job)
        assert snapshot(convert(tmp_path / folder, scheme, model, "--workers", "3")) == first


def test_a_nan_in_a_sibling_is_named(tmp_path, model):
    bad = shutil.copytree(model, tmp_path / "bad")
    (file,) = bad.glob("*.safetensors")
    tensors = load_file(file)
    tensors[f"{QKV[2]}.weight"][200, 17] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    path = recipe(tmp_path, "fp8_tensor")
    done = run_cli("quantize", path, "--model", bad, "--out", tmp_path / "out", "--workers", "1")
    assert done.code == 2
    assert f"weight is nan\n  --> `{QKV[2]}.weight`[200, 17] in model.safetensors" in done.err
    assert not (tmp_path / "out").exists()


def test_blocks_that_siblings_would_share_are_refused(tmp_path):
    path = recipe(tmp_path, "fp8_block")
    done = run_cli("quantize", path, "--model", make_llama(tmp_path / "m"), "--out", tmp_path / "out")
    assert done.code == 2
    assert "its 16 rows are not a multiple of 128" in done.err


def test_scales_per_channel_are_refused(tmp_path, model):
    path = recipe(tmp_path, "fp8_dynamic")
    done = run_cli("quantize", path, "--model", model, "--out", tmp_path / "out", "--plan")
    assert done.code == 2
    assert "cannot store a scale per channel" in done.err
    assert "use `target: ascend` or `target: compressed-tensors`" in done.err
    assert f"{path}:" in done.err
    assert "scheme `fp8_dynamic`" in done.err


@pytest.mark.parametrize("target", ["fp8", "compressed-tensors"])
def test_static_inputs_are_measured(tmp_path, target):
    model = make_tiny(tmp_path / "model", "qwen2")
    write_tokenizer(model)
    out = convert(tmp_path, "fp8_static", model, *FEW, target=target)
    made = loaded(out)
    for names in (("q", "k", "v"), ("gate", "up")):
        part = "self_attn" if "q" in names else "mlp"
        scales = {float(made[f"{L}.{part}.{n}_proj.input_scale"]) for n in names}
        assert len(scales) == 1
        assert 1e-4 < scales.pop() < 1
    found = run_cli("verify", out, "--full", "--against", model)
    assert found.code == 0, found.out


# -- by other producers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(model, tmp_path_factory):
    """As DeepSeek stores it: bfloat16 arithmetic, scales in another file than codes, no names."""
    folder = tmp_path_factory.mktemp("foreign") / "model"
    shutil.copytree(model, folder)
    codes, scales = {}, {}
    for name, tensor in loaded(model).items():
        if not name.endswith("_proj.weight"):
            codes[name] = tensor
            continue
        n, k = tensor.shape
        tiles = tensor.view(n // 128, 128, k // 128, 128)
        scale = tiles.abs().amax((1, 3), keepdim=True) / 448
        codes[name] = (tiles / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(n, k)
        scales[f"{name}_scale_inv"] = scale.view(n // 128, k // 128).float()
    (folder / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": codes, "model-00002-of-00002.safetensors": scales}
    for file, table in files.items():
        save_file(table, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, table in files.items() for name in table}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                    "weight_block_size": [128, 128]}  # fmt: skip
    words = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(words | {"quantization_config": quantization}))
    return folder


def test_a_checkpoint_of_another_producer(foreign, model):
    found = run_cli("verify", foreign, "--full", "--against", model, "--json")
    report = found.json
    assert found.code == 0, report["findings"]
    assert report["format"] == "fp8"
    assert len(report["modules"]) == 7
    assert all(30 < module["sqnr_db"] < 33 for module in report["modules"])
    assert {module["label"] for module in report["modules"]} == {"fp8 block 128x128"}


def edit(folder, change):
    """Change tensors, each where it is; new ones go into the last file. Gone ones leave the index."""
    files = {path: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    table = {name: tensor for part in files.values() for name, tensor in part.items()}
    change(table)
    place = {name: path for path, part in files.items() for name in part}
    last = max(files)
    index = {"weight_map": {name: place.get(name, last).name for name in table}}
    for path in files:
        save_file({n: t for n, t in table.items() if place.get(n, last) == path}, path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DOWN = f"{L}.mlp.down_proj"


def put(name, make):
    return lambda table: table.__setitem__(name, make(table))


def float_again(table):
    del table[f"{DOWN}.weight_scale_inv"]
    table[f"{DOWN}.weight"] = table[f"{DOWN}.weight"].bfloat16()


TENSORS = {
    "no scale": (lambda t: t.pop(f"{DOWN}.weight_scale_inv"), "needs `{}.weight_scale_inv`, which no"),
    "another name of the scale": (
        lambda t: t.__setitem__(f"{DOWN}.weight_scale", t.pop(f"{DOWN}.weight_scale_inv")),
        "under `weight_scale`",
    ),
    "scale is e8m0": (
        put(
            f"{DOWN}.weight_scale_inv", lambda t: t[f"{DOWN}.weight_scale_inv"].to(torch.float8_e8m0fnu)
        ),
        "is F8_E8M0; fp8 block 128x128 reads F32 or BF16",
    ),
    "scale per channel": (
        put(f"{DOWN}.weight_scale_inv", lambda t: torch.ones(256, 1)),
        "is [256, 1]; for a weight of 256 x 512 fp8 block 128x128 has [2, 4]",
    ),
    "codes are e5m2": (
        put(f"{DOWN}.weight", lambda t: t[f"{DOWN}.weight"].float().to(torch.float8_e5m2)),
        "is e5m2, which engines do not serve",
    ),
    "codes are fnuz": (
        put(f"{DOWN}.weight", lambda t: t[f"{DOWN}.weight"].float().to(torch.float8_e4m3fnuz)),
        "is e4m3fnuz, whose codes stand for half",
    ),
    "a float that is not listed": (
        float_again,
        "is BF16 and not in modules_to_not_convert",
    ),
    "an input_scale": (
        put(f"{DOWN}.input_scale", lambda t: torch.ones(1)),
        "fp8 block 128x128 has no input_scale",
    ),
    "a scale of nothing": (
        put(f"{L}.mlp.gone.weight_scale_inv", lambda t: torch.ones(1, 1)),
        "belongs to no weight",
    ),
    "a bias of another width": (put(f"{DOWN}.bias", lambda t: torch.ones(3)), "not 256 floats"),
}  # fmt: skip
FULL = {
    "a code is NaN": (
        lambda t: t[f"{DOWN}.weight"].view(torch.uint8).__setitem__((3, 5), 0x7F),
        "a code is NaN",
    ),
    "a scale is zero": (
        lambda t: t[f"{DOWN}.weight_scale_inv"].__setitem__((1, 1), 0),
        "a scale is not a positive number",
    ),
}


@pytest.mark.parametrize("case", [*TENSORS, *FULL])
def test_tensors_that_the_engine_would_misread(foreign, tmp_path, case):
    change, word = (TENSORS | FULL)[case]
    copy = shutil.copytree(foreign, tmp_path / "copy")
    edit(copy, change)
    found = run_cli("verify", copy, *(["--full"] if case in FULL else []), "--json")
    assert found.code == 1, found.out
    errors = [f["what"] for f in found.json["findings"] if f["severity"] == "error"]
    assert any(word.format(DOWN) in what for what in errors), errors
    assert len(errors) == 1 + (case == "another name of the scale"), errors  # one lacks, one is odd


CONFIGS = {
    "no scheme of inputs": ({"activation_scheme": None}, "activation_scheme is None"),
    "blocks and static": ({"activation_scheme": "static"}, "engines do not have for blocks"),
    "another format": ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
    "blocks of nothing": ({"weight_block_size": [0, 128]}, "weight_block_size is [0, 128]"),
    "one scale a weight": ({"weight_block_size": None}, "under `weight_scale_inv`"),
    "codes are called float": ({"modules_to_not_convert": [DOWN]}, "but is F8_E4M3"),
    "a float head": ({"modules_to_not_convert": []}, "transformers would take it for fp8"),
    "half of what is fused": ({"ignored_layers": [f"{L}.mlp.up_proj"]}, "fuses these siblings"),
    "names are no list": ({"modules_to_not_convert": DOWN}, "not a list of names"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_the_engine_would_misread(foreign, tmp_path, case):
    changes, word = CONFIGS[case]
    copy = shutil.copytree(foreign, tmp_path / "copy")
    words = json.loads((copy / "config.json").read_text())
    words["quantization_config"] |= changes
    (copy / "config.json").write_text(json.dumps(words))
    found = run_cli("verify", copy, "--full", "--json")
    assert found.code == 1
    errors = [f["what"] for f in found.json["findings"] if f["severity"] == "error"]
    assert any(word in what for what in errors), errors


def test_a_tied_head_that_is_not_listed(foreign, tmp_path):
    """If there is no list, transformers leaves the head alone; a model without a head needs none."""
    copy = shutil.copytree(foreign, tmp_path / "copy")
    words = json.loads((copy / "config.json").read_text()) | {"tie_word_embeddings": True}
    block = words["quantization_config"]
    for names, classes, code in (
        (["visual"], ["LlamaForCausalLM"], 1),
        (["visual"], ["LlamaModel"], 0),
        (["lm_head"], ["LlamaForCausalLM"], 0),
        (None, ["LlamaForCausalLM"], 0),
    ):
        changes = {
            "architectures": classes,
            "quantization_config": block | {"modules_to_not_convert": names},
        }
        (copy / "config.json").write_text(json.dumps(words | changes))
        found = run_cli("verify", copy, "--json")
        assert found.code == code, found.out
        errors = [f["where"] for f in found.json["findings"] if f["severity"] == "error"]
        assert errors == ["`lm_head`"] * code
    edit(copy, put("lm_head.weight", lambda table: table["model.embed_tokens.weight"].clone()))
    (copy / "config.json").write_text(json.dumps(words | {"quantization_config": block | {
        "modules_to_not_convert": ["visual"]}}))  # fmt: skip
    errors = [f for f in run_cli("verify", copy, "--json").json["findings"] if f["severity"] == "error"]
    assert [f["where"] for f in errors] == ["`lm_head`"]
    assert "transformers would take it for fp8" in errors[0]["what"]


@pytest.mark.parametrize(
    ("names", "severity"), [(["lm_head"], "error"), (["visual", "lm_head"], "note")]
)
def test_a_float_layer_of_a_tower(foreign, tmp_path, names, severity):
    """No entry covers it; or one that only transformers takes for all within the tower."""
    copy = shutil.copytree(foreign, tmp_path / "copy")
    name = "model.visual.blocks.0.attn.qkv"
    edit(copy, put(f"{name}.weight", lambda _: torch.ones(8, 8, dtype=torch.bfloat16)))
    words = json.loads((copy / "config.json").read_text())
    words["quantization_config"]["modules_to_not_convert"] = names
    (copy / "config.json").write_text(json.dumps(words))
    found = run_cli("verify", copy, "--json").json["findings"]
    (found,) = [f for f in found if f["where"] == f"`{name}`"]
    assert (found["check"], found["severity"]) == ("loader", severity)
    assert "is BF16 and not in modules_to_not_convert" in found["what"]


def test_listed_names_that_no_module_has_are_noted(foreign, tmp_path):
    copy = shutil.copytree(foreign, tmp_path / "copy")
    words = json.loads((copy / "config.json").read_text())
    listed = ["model.lm_head", "lm_head", "visual.merger", "model.layers", f"{L}.mlp.no_proj"]
    words["quantization_config"]["modules_to_not_convert"] = listed
    (copy / "config.json").write_text(json.dumps(words))
    found = run_cli("verify", copy, "--json")
    assert found.code == 0, found.out
    notes = [f["what"] for f in found.json["findings"] if f["check"] == "config"]
    what = f"modules_to_not_convert names `{L}.mlp.no_proj` and 1 more, which no file holds"
    assert notes == [what]


def test_a_lost_config_is_told(foreign, tmp_path):
    copy = shutil.copytree(foreign, tmp_path / "copy")
    words = json.loads((copy / "config.json").read_text())
    del words["quantization_config"]
    (copy / "config.json").write_text(json.dumps(words))
    found = run_cli("verify", copy, "--json")
    assert found.code == 1
    assert "has no quantization_config for its fp8 weights" in found.json["findings"][0]["what"]


def test_scales_that_make_the_engine_round_again_are_noted(tmp_path, model):
    out = convert(tmp_path, "fp8_tensor", model)

    def change(table):
        table[f"{QKV[0]}.weight_scale"] /= 2
        table[f"{DOWN}.weight_scale"].fill_(1e-6)

    edit(out, change)
    (out / "quantcli_manifest.json").unlink()
    found = run_cli("verify", out, "--full", "--json")
    assert found.code == 0, found.json["findings"]
    notes = " ".join(f["what"] for f in found.json["findings"])
    assert "rounds codes again to the larger scale" in notes
    assert "weight_scale is 1e-06" in notes
    assert config(out)["modules_to_not_convert"] == ["lm_head"]  # tied: there is no such tensor


def test_siblings_of_a_recipe_share_a_scale(tmp_path, model):
    """k is three times as large as all others: its scale is that of everything it is grouped with."""
    path = recipe(tmp_path, "fp8_tensor")
    text = path.read_text()
    scales = {}
    for kind, line in (("engine", ""), ("recipe", r"siblings: ['(.*)\.(?:self_attn|mlp)\..*_proj']")):
        path.write_text(text + line + "\n")
        out = tmp_path / kind
        done = run_cli("quantize", path, "--model", model, "--out", out)
        assert done.code == 0, done.err
        stored = loaded(out)
        scales[kind] = {n: float(t) for n, t in stored.items() if n.endswith("weight_scale")}
        checked = run_cli("verify", out, "--full", "--against", model, "--json")
        assert checked.code == 0, checked.out
    k = scales["engine"][f"{QKV[1]}.weight_scale"]
    assert len(set(scales["engine"].values())) == 4  # qkv, o, gate and up, down
    assert set(scales["recipe"].values()) == {k}


def test_siblings_without_effect_are_noted(tmp_path, model):
    path = recipe(tmp_path, "fp8_dynamic", "compressed-tensors")
    path.write_text(path.read_text() + r"siblings: ['(.*)\.mlp\..*_proj']")
    done = run_cli("quantize", path, "--model", model, "--out", tmp_path / "out", "--plan", "--json")
    assert any("`siblings` has no effect" in note for note in done.json["plan"]["notes"])
