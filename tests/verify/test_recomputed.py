"""Changes after which a checkpoint is consistent in itself: only making it again finds them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from quantcli.checkpoint.manifest import encode_manifest
from quantcli.commands import quantize as commands
from quantcli.commands.pack import pack, plan_pack
from quantcli.core.errors import InputError
from quantcli.planning.block import Calibrated
from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.e2e.calibrating import ROOT
from tests.e2e.conftest import run_cli
from tests.verify.damage import MANIFEST, Copy, to_float
from tests.verify.stock import Good

LAYER = "model.layers.1"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
GATE = f"{LAYER}.mlp.gate_proj"

INT8 = {
    "dynamic": ("qwen2", "w8a8_dynamic"),
    "w8a16": ("llama", "w8a16"),
    "static": ("qwen2", "static"),
    "half static": ("llama:float16", "static"),
    "symmetric": ("llama", "symmetric"),
    "mix": ("qwen2", "mix"),
    "smooth": ("llama", "smooth"),
    "ct dynamic": ("qwen3", "ct_dynamic"),
    "ct static": ("qwen2", "ct_static"),
    "ct symmetric": ("llama", "ct_symmetric"),
    "ct w8a16": ("llama", "ct_w8a16"),
}
OTHERS = {
    "fp8": ("llama", "fp8_dynamic"),
    "ct fp8": ("llama", "ct_fp8"),
    "ct fp8 static": ("llama", "ct_fp8_static"),
    "ct w4a16": ("llama", "ct_w4a16"),
    "ct w4a8": ("llama", "ct_w4a8"),
    "int4": ("qwen3", "int4"),
}
CLIPPED = {
    "inputs dynamic": ("qwen2", "dynamic_inputs"),
    "inputs fp8": ("llama", "fp8_inputs"),
    "ct inputs dynamic": ("qwen3", "ct_dynamic_inputs"),
    "ct inputs w4a16": ("llama", "ct_w4a16_inputs"),
    "ct inputs fp8": ("llama", "ct_fp8_inputs"),
    "ct inputs block": ("llama", "ct_block_inputs"),
}
ALL = INT8 | OTHERS | CLIPPED
STATIC = ("static", "half static", "symmetric", "mix", "smooth", "ct static", "ct symmetric")


def calibration_of(good):
    folder = good.path.with_name(f"{good.path.name}.calibration")
    return folder if folder.exists() else None


def examine(path, source, calibration=None):
    return verify(VerifyOptions(path, full=True, against=str(source), calibration=calibration))


# -- consistent changes -------------------------------------------------------------------------------


def codes_of(tensors, module):
    """The name of a module's codes, and how much one more is in an element."""
    return next(
        f"{module}.{suffix}"
        for suffix in ("weight_packed", "weight")
        if f"{module}.{suffix}" in tensors
    )


def raised(codes):
    """The next code, where that is not out of range; packed ones in their lowest bits."""
    if codes.dtype == torch.int32:
        return torch.where(codes & 15 < 15, codes + 1, codes - 1)
    if codes.dtype == torch.int8:
        return torch.where(codes < 7, codes + 1, codes - 1)
    bits = codes.view(torch.uint8)  # fp8: the next number of the same sign
    return torch.where(bits & 127 < 126, bits + 1, bits - 1).to(torch.uint8).view(codes.dtype)


def settle(tensors, module):
    """Make quant_bias follow from codes, offset, bias and deq_scale."""
    if f"{module}.quant_bias" in tensors:
        offset = tensors[f"{module}.input_offset"].double()
        total = -offset * tensors[f"{module}.weight"].sum(1, dtype=torch.int64).double()
        if f"{module}.bias" in tensors:
            deq = tensors[f"{module}.deq_scale"]
            deq = deq.to(torch.int32).view(torch.float32) if deq.dtype == torch.int64 else deq
            total += tensors[f"{module}.bias"].double() / deq.double()
        tensors[f"{module}.quant_bias"] = total.round().to(torch.int32)


def one_code(tensors):
    name = codes_of(tensors, Q)
    codes = tensors[name].clone()
    codes[5, 3] = raised(codes[5, 3:4])[0]
    tensors[name] = codes
    settle(tensors, Q)
    return f"`{name}`[5, 3]"


def one_row(tensors):
    name = codes_of(tensors, GATE)
    codes = tensors[name].clone()
    codes[7] = raised(codes[7])
    tensors[name] = codes
    settle(tensors, GATE)
    return f"`{name}`[7, 0]"


def scaled(tensor, by):
    """Times a factor, or by one step of a dtype for which that is too little."""
    if tensor.dtype == torch.int64:  # bits of a float32, of which float16 honours the top 19
        value = tensor.to(torch.int32).view(torch.float32) * by
        return (value.view(torch.int32) & -(2**13)).to(torch.int64)
    return (
        tensor * by
        if tensor.dtype == torch.float32
        else (tensor.view(torch.int16) + 1).view(tensor.dtype)
    )


def scales(tensors):
    """All that says a weight's scale, a thousandth more."""
    names = [f"{OUT}.{s}" for s in ("weight_scale", "weight_scale_inv", "deq_scale")]
    for name in names:
        if name in tensors:
            tensors[name] = scaled(tensors[name], 1.001)
    settle(tensors, OUT)
    return f"`{next(name for name in names if name in tensors)}`[0"


def input_scales(tensors):
    """Of q, k and v, which share it."""
    for module in (Q, K, V):
        tensors[f"{module}.input_scale"] = tensors[f"{module}.input_scale"] * 4
        if f"{module}.deq_scale" in tensors:
            tensors[f"{module}.deq_scale"] = scaled(tensors[f"{module}.deq_scale"], 4)
        settle(tensors, module)
    return f"`{Q}.input_scale`[0]"


def input_offsets(tensors):
    suffix = "input_offset" if f"{Q}.input_offset" in tensors else "input_zero_point"
    for module in (Q, K, V):
        tensors[f"{module}.{suffix}"] = tensors[f"{module}.{suffix}"] + 1
        settle(tensors, module)
    return f"`{Q}.{suffix}`[0]"


def codes_shifted(tensors):
    """Each code of a weight one more, and the zero point of its inputs as well."""
    name = codes_of(tensors, OUT)
    tensors[name] = raised(tensors[name])
    for suffix in ("input_offset", "input_zero_point"):
        if f"{OUT}.{suffix}" in tensors:
            tensors[f"{OUT}.{suffix}"] = tensors[f"{OUT}.{suffix}"] + 1
    settle(tensors, OUT)
    return f"`{name}`[0, 0]"


CHANGES = [
    *((name, change) for name in INT8 for change in (one_code, one_row, scales, codes_shifted)),
    *((name, input_scales) for name in (*STATIC, "ct fp8 static")),
    *((name, input_offsets) for name in ("static", "half static", "mix", "smooth", "ct static")),
    *((name, change) for name in OTHERS | CLIPPED for change in (one_code, one_row, scales)),
]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=lambda v: getattr(v, "__name__", v))
def test_a_consistent_change_is_found(stock, tmp_path, name, change):
    good = stock.good(*ALL[name])
    copy = Copy(good, tmp_path / "copy")
    with copy.tensors() as tensors:
        where = change(tensors)
    copy.seal()
    report = examine(copy.path, good.source, calibration_of(good))
    assert {e.check for e in report.errors} == {"recomputed"}, report.errors[:3]
    places = [e.where for e in report.errors]
    assert any(place.startswith(where) for place in places), places
    module = where.strip("`").rpartition(".")[0].rpartition(".")[0]
    assert all(module in place for place in places), places


def flipped(tensors):
    """The sign of a scale, by hand and by the code of the group's largest weight."""
    name = f"{OUT}.weight_scale"
    scale = tensors[name].clone()
    scale[3, 1] = -scale[3, 1]
    tensors[name] = scale
    return f"`{name}`[3, 1]"


@pytest.mark.parametrize("name", ["ct w4a16", "ct inputs w4a16", "ct w4a8"])
def test_a_flipped_sign_is_found(stock, tmp_path, name):
    good = stock.good(*ALL[name])
    copy = Copy(good, tmp_path / "copy")
    with copy.tensors() as tensors:
        where = flipped(tensors)
    copy.seal()
    report = examine(copy.path, good.source, calibration_of(good))
    assert where in [e.where for e in report.errors if e.check == "recomputed"]


# -- what is found without calibration ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["static", "mix", "ct static", "ct fp8 static"])
@pytest.mark.parametrize("change", [one_code, one_row, scales])
def test_found_without_the_calibration(stock, tmp_path, name, change):
    good = stock.good(*ALL[name])
    copy = Copy(good, tmp_path / "copy")
    with copy.tensors() as tensors:
        where = change(tensors)
    copy.seal()
    report = examine(copy.path, good.source)
    assert [e.check for e in report.errors] == ["recomputed"] * len(report.errors)
    if change is scales and name != "ct fp8 static":  # clipped by inputs: only codes are known
        where = f"`{OUT}.weight`["
    assert any(e.where.startswith(where) for e in report.errors)
    kinds = ["ranges of inputs", "clips by inputs"][: 1 + (name != "ct fp8 static")]
    for kind, left_out in zip(kinds, report.not_checked, strict=True):
        assert left_out.startswith(f"{kind} were not recomputed in ")
        assert "give --calibration DIR" in left_out


def test_what_is_not_found_without_the_calibration(stock, tmp_path):
    good = stock.good("qwen2", "static")
    copy = Copy(good, tmp_path / "copy")
    with copy.tensors() as tensors:
        input_offsets(tensors)
    copy.seal()
    report = examine(copy.path, good.source)
    assert report.ok
    assert report.not_checked == [
        f"{what} were not recomputed in 28 modules: give --calibration DIR, the folder that "
        "`quantize` kept"
        for what in ("ranges of inputs", "clips by inputs")
    ]


@pytest.mark.parametrize("name", CLIPPED)
def test_clips_by_inputs_without_the_calibration(stock, tmp_path, name):
    """Scales are taken as they are, and codes must be the nearest to them."""
    good = stock.good(*ALL[name])
    report = examine(good.path, good.source)
    assert [f.what for f in report.findings] == []
    modules = sum(name.endswith("_proj.weight") for file in good.source.glob("*.safetensors")
                  for name in load_file(file))  # fmt: skip
    assert report.not_checked == [
        f"clips by inputs were not recomputed in {modules} modules: give --calibration DIR, the folder "
        "that `quantize` kept"
    ]
    for number, change in enumerate((one_code, one_row, scales)):
        copy = Copy(good, tmp_path / f"copy{number}")
        with copy.tensors() as tensors:
            where = change(tensors)
            if change is scales:
                where = f"`{codes_of(tensors, OUT)}`["
        copy.seal()
        report = examine(copy.path, good.source)
        assert {e.check for e in report.errors} == {"recomputed"}
        assert any(e.where.startswith(where) for e in report.errors), report.errors


def test_smoothed_without_the_calibration(stock):
    good = stock.good("llama", "smooth")
    report = examine(good.path, good.source)
    assert report.ok
    assert report.checked["recomputed"] == 3  # embedding, last norm, head
    assert report.not_checked[0].startswith("codes and scales were not recomputed for 36 of 39 tensors")


def test_edits_are_recomputed(stock, tmp_path):
    """A norm and all that read it, changed consistently: the model's function is the same."""
    good = stock.good("llama", "smooth")
    copy = Copy(good, tmp_path / "copy")
    norm = f"{LAYER}.input_layernorm.weight"
    with copy.tensors() as tensors:
        tensors[norm] = tensors[norm] / 2
        for module in (Q, K, V):
            for suffix in ("weight_scale", "deq_scale"):
                tensors[f"{module}.{suffix}"] = tensors[f"{module}.{suffix}"] * 2
            settle(tensors, module)
    copy.seal()
    report = examine(copy.path, good.source, calibration_of(good))
    assert {e.check for e in report.errors} >= {"recomputed"}
    assert f"`{norm}`[0]" in [e.where for e in report.errors]


# -- sound ones ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_sound(stock, name):
    good = stock.good(*ALL[name])
    report = examine(good.path, good.source, calibration_of(good))
    assert [f.what for f in report.findings] == []
    assert report.not_checked == []
    held = sum(len(load_file(file)) for file in good.path.glob("*.safetensors"))
    assert report.checked["recomputed"] == held


@pytest.mark.parametrize("case", [("qwen3_moe", "w8a8_moe"), ("mixtral", "w8a8_moe")], ids=" ".join)
def test_experts_that_saw_no_token(stock, case):
    """They take a scheme that needs no data, which the tensors tell without the calibration."""
    good = stock.good(*case, "calibration.uncalibrated=dynamic", "calibration.samples=1")
    for calibration in (None, calibration_of(good)):
        report = examine(good.path, good.source, calibration)
        assert report.errors == []
        assert bool(report.not_checked) == (calibration is None)


RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Makes checkpoints of the trained model by shipped recipes, and of a mixture of experts."""
    folder = tmp_path_factory.mktemp("shipped")

    def make(stock, recipe):
        path = ROOT / "recipes" / f"{recipe}.yaml"
        sets = []
        if "\ncalibration:" in path.read_text():
            sets += ["calibration.samples=2", "calibration.length=32"]
        if "flatquant" in recipe:
            rule = f"rules.{int('mxfp4' in recipe)}"  # learning takes long
            sets += [f"{rule}.match=*.layers.1.self_attn.*_proj", "expect.quantizable_pct=> 1"]
            sets += [f"{rule}.scheme={{name: {recipe.removesuffix('_tp1')}, epochs: 1}}"]
        wide = ":wide" if recipe.startswith("mxfp4") else ""  # groups in pairs
        model = stock.model(f"qwen3_moe{wide}") if "moe" in recipe else ROOT / "examples" / "tiny-qwen3"
        out = folder / recipe
        commands.quantize(commands.plan(path, model=str(model), out=out, overrides=tuple(sets)))
        return Good(out, model)

    return make


@pytest.mark.parametrize("recipe", RECIPES)
def test_shipped_recipes(stock, shipped, recipe):
    good = shipped(stock, recipe)
    report = verify(
        VerifyOptions(good.path, against=str(good.source), calibration=calibration_of(good), workers=3)
    )
    assert [f.what for f in report.errors if f.check == "recomputed"] == []
    assert report.not_checked == []
    held = sum(len(load_file(file)) for file in good.path.glob("*.safetensors"))
    assert report.checked["recomputed"] == held


# -- packed -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(stock, tmp_path_factory):
    """Packs a checkpoint of the stock into another format."""
    folder = tmp_path_factory.mktemp("packed")

    def make(name, target):
        good = stock.good(*ALL[name])
        out = folder / f"{name} {target}"
        if not out.exists():
            pack(plan_pack(str(good.path), target, out))
        return good, Good(out, good.source)

    return make


@pytest.mark.parametrize(
    ("name", "target"), [("dynamic", "compressed-tensors"), ("ct w8a16", "ascend"),
                         ("static", "compressed-tensors"), ("fp8", "compressed-tensors")],
)  # fmt: skip
def test_packed(packed, tmp_path, name, target):
    good, out = packed(name, target)
    calibration = calibration_of(good)
    report = examine(out.path, good.source, calibration)
    assert [f.what for f in report.errors] == []
    assert report.not_checked == []
    held = sum(len(load_file(file)) for file in out.path.glob("*.safetensors"))
    assert report.checked["recomputed"] == held
    report = examine(out.path, good.path)
    assert report.errors == []
    assert report.checked["recomputed"] == held
    copy = Copy(out, tmp_path / "copy")
    with copy.tensors() as tensors:
        where = one_code(tensors)
    copy.seal()
    for model in (good.source, good.path):
        report = examine(copy.path, model, calibration if model == good.source else None)
        assert {e.check for e in report.errors} == {"recomputed"}
        assert report.errors[0].where.startswith(where)


def test_packed_by_another_tool(packed, tmp_path):
    """With a scale in another dtype, which the engine reads as well."""
    good, out = packed("ct w8a16", "ascend")
    copy = Copy(out, tmp_path / "copy")
    with copy.tensors() as tensors:
        tensors[f"{Q}.weight_scale"] = tensors[f"{Q}.weight_scale"].bfloat16()
    copy.seal()
    report = examine(copy.path, good.source)
    assert [(e.what, e.where) for e in report.errors] == [
        ("is torch.bfloat16; the recipe makes torch.float32 of the source", f"`{Q}.weight_scale`[0, 0]")
    ]


def test_packed_and_measured_without_the_calibration(packed):
    good, out = packed("static", "compressed-tensors")
    report = examine(out.path, good.source)
    assert report.ok
    assert "packing changes how ranges" in report.not_checked[0]


# -- what cannot be recomputed ------------------------------------------------------------------------


def rewritten(copy, **entries):
    """Another manifest, sealed; `both`: the recipe's text, in its file as well."""
    if (text := entries.pop("both", None)) is not None:
        (copy.path / "quantcli_recipe.yaml").write_text(text)
        entries["recipe"] = text
    path = copy.path / MANIFEST
    path.write_bytes(encode_manifest({**json.loads(path.read_text()), **entries}))
    copy.seal()


@pytest.fixture
def copy(stock, tmp_path):
    return Copy(stock.good("llama", "w8a8_dynamic"), tmp_path / "copy")


def recipe_of(copy):
    return (copy.path / "quantcli_recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"source": {"fingerprint": "0" * 64}}, "the manifest names another source than MODEL"),
        ({"source": None}, "the manifest names another source than MODEL"),
        ({"recipe": None}, "the manifest's recipe is not that of quantcli_recipe.yaml"),
        ({"recipe": "target: ascend\n"}, "the manifest's recipe is not that of quantcli_recipe.yaml"),
        ({"state": "lossless"}, "MODEL cannot be packed as the manifest says: this is a float model"),
        (
            {"state": "lossless", "source": {"fingerprint": "0" * 64}},
            "the manifest's recipe is not that of quantcli_source_recipe.yaml",
        ),
    ],
)
def test_manifests_that_say_something_else(copy, entries, reason):
    rewritten(copy, **entries)
    report = examine(copy.path, copy.source)
    (left_out,) = report.not_checked
    assert left_out.startswith(f"codes and scales were not recomputed: {reason}")
    assert "recomputed" not in report.checked
    assert [f.what for f in report.findings if f.severity == "note"] == [left_out]
    assert [e.what for e in report.errors] == (
        ["says that MODEL was packed, which is not possible: "
         "this is a float model: there are no codes to pack"] if "float model" in reason else []
    )  # fmt: skip


SIDECARS = {
    "status": (
        "ct dynamic", "config.json",
        lambda t: t["quantization_config"].update(quantization_status="frozen"),
        "`quantization_config.quantization_status` is 'frozen'; the recipe makes 'compressed'",
    ),
    "sparsity": (
        "ct dynamic", "config.json", lambda t: t["quantization_config"].update(sparsity_config={}),
        "`quantization_config.sparsity_config` is {}; the recipe makes no such key",
    ),
    "ignore": (
        "ct dynamic", "config.json",
        lambda t: t["quantization_config"]["ignore"].append("re:.*mlp.foo"),
        "`quantization_config.ignore` is [",
    ),
    "observer": (
        "ct dynamic", "config.json",
        lambda t: t["quantization_config"]["config_groups"]["group_0"]["weights"].update(zp_dtype="x"),
        "`quantization_config.config_groups.group_0.weights.zp_dtype` is 'x'; the recipe makes no such",
    ),
    "rotation": (
        "dynamic", "quant_model_description.json", lambda t: t.update(is_rot_used=True),
        "`is_rot_used` is True; the recipe makes no such key",
    ),
    "quant type": (
        "dynamic", "quant_model_description.json", lambda t: t.update(model_quant_type="W4A4"),
        "`model_quant_type` is 'W4A4'; the recipe makes 'W8A8_DYNAMIC'",
    ),
    "index": (
        "dynamic", "model.safetensors.index.json", lambda t: t["metadata"].update(total_size=1),
        "`metadata.total_size` is 1; the recipe makes ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SIDECARS)
def test_keys_of_generated_files_that_the_recipe_does_not_make(stock, tmp_path, case):
    made, file, change, what = SIDECARS[case]
    copy = Copy(stock.good(*INT8[made]), tmp_path / "copy")
    table = json.loads((copy.path / file).read_text())
    change(table)
    (copy.path / file).write_text(json.dumps(table))
    copy.seal()
    errors = [e for e in examine(copy.path, copy.source).errors if e.check == "recomputed"]
    assert [(e.where, e.what[: len(what)]) for e in errors] == [(file, what)]


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("rules: [", "the manifest's recipe cannot be read: "),
        ("target: nowhere\nrules: [{match: '*', scheme: keep}]\n", "cannot be read: unknown target"),
        ("target: ascend\nrules: [{match: '*.x', scheme: w8a16}]\n", "`rules.0` matches no module"),
        ("target: compressed-tensors\nrules: [{match: '*_proj', scheme: w8a8_dynamic}]\n",
         "the manifest's recipe is for compressed-tensors, this is ascend"),
        ("target: ascend\nrules: [{match: 're:(a{999}){999}', scheme: keep}]\n", "too costly to match"),
        ("target: ascend\nrules: [{match: 're:(?:.|..|...)*(?<=!)', scheme: keep}]\n",
         "takes too long to match"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_used(copy, recipe, reason):
    rewritten(copy, both=recipe)
    report = examine(copy.path, copy.source)
    assert report.ok
    assert reason in report.not_checked[0]


def test_another_recipe_makes_other_numbers(copy):
    rewritten(copy, both=recipe_of(copy).replace("w8a8_dynamic", "w8a16"))
    report = examine(copy.path, copy.source)
    assert {e.check for e in report.errors} == {"recomputed"}
    assert report.errors[0].what == "the recipe makes this module W8A16; it is W8A8_DYNAMIC"


def test_a_recipe_that_leaves_a_module_out(copy):
    text = recipe_of(copy)
    keep = f"rules:\n- match:\n  - {OUT}\n  scheme: keep\n"
    rewritten(copy, both=text.replace("rules:\n", keep, 1))
    report = examine(copy.path, copy.source)
    assert (report.errors[0].check, report.errors[0].where) == ("recomputed", f"`{OUT}`")
    assert report.errors[0].what == "the recipe keeps this module float; it is W8A8_DYNAMIC"


def test_a_recipe_with_transforms_outside_of_layers(stock, tmp_path):
    good = stock.good("llama", "head")
    copy = Copy(good, tmp_path / "head")
    recipe = (
        "target: {name: ascend, tp: 1}\nrules:\n- {match: lm_head, scheme: w4a4_flatquant}\n"
        "- {match: '*_proj', scheme: w8a8_dynamic}\n"
    )
    rewritten(copy, both=recipe)
    report = examine(copy.path, good.source)
    assert report.not_checked


def test_a_module_that_has_stayed_float(copy):
    to_float(GATE)(copy)
    to_float(f"{LAYER}.mlp.up_proj")(copy)
    copy.seal()
    report = examine(copy.path, copy.source)
    assert (f"`{GATE}`", "recomputed") in [(e.where, e.check) for e in report.errors]


def test_no_manifest(copy):
    (copy.path / MANIFEST).unlink()
    report = examine(copy.path, copy.source)
    assert report.ok
    assert report.not_checked == [
        "codes and scales were not recomputed: no sound quantcli_manifest.json says how they were made"
    ]


def test_another_version_is_noted(copy):
    rewritten(copy, tool={"name": "quantcli", "version": "0.0.1"})
    report = examine(copy.path, copy.source)
    assert report.ok
    (note,) = report.findings
    assert note.what.startswith("quantcli 0.0.1 made the checkpoint; ")


def test_damage_is_not_recomputed(copy):
    copy.shards[0].write_bytes(copy.shards[0].read_bytes()[:-1])
    report = examine(copy.path, copy.source)
    assert "recomputed" not in report.checked


# -- the calibration ----------------------------------------------------------------------------------


def test_calibrations_of_something_else(stock, tmp_path, copy):
    static, other = stock.good("qwen2", "static"), stock.good("llama", "smooth")
    for folder, what in (
        (calibration_of(other), "the calibration there is of another model"),
        (tmp_path / "nowhere", "no finished calibration is there"),
        (static.path, "is not a calibration"),
    ):
        with pytest.raises(InputError, match=what):
            examine(static.path, static.source, folder)
    with pytest.raises(InputError, match="nothing in the checkpoint's recipe needs a calibration"):
        examine(copy.path, copy.source, calibration_of(other))
    with pytest.raises(InputError, match="--calibration has no effect without --against MODEL"):
        VerifyOptions(copy.path, calibration=tmp_path)


def test_it_is_said(stock):
    good = stock.good("qwen2", "static")
    done = run_cli("verify", good.path, "--against", good.source)
    assert done.code == 0
    assert "; ranges of inputs were not recomputed in 28 modules" in done.out
    again = run_cli(
        "verify", good.path, "--against", good.source, "--calibration", calibration_of(good)
    )
    assert again.code == 0
    assert "recomputed 162" in again.out
    assert "were not recomputed" not in again.out


@pytest.mark.parametrize("case", [("llama", "fp8_dynamic"), ("llama", "ct_w4a16")], ids=" ".join)
def test_a_quantized_source(stock, tmp_path, case):
    """Its codes are decoded again, row by row."""
    source = stock.good(*case).path
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('target: ascend\nrules: [{match: "*_proj", scheme: w8a8_dynamic}]\n')
    out = Good(tmp_path / "out", source)
    commands.quantize(commands.plan(recipe, model=str(source), out=out.path))
    report = examine(out.path, source)
    assert report.errors == []
    assert report.not_checked == []
    assert report.checked["recomputed"] == 95
    copy = Copy(out, tmp_path / "copy")
    with copy.tensors() as tensors:
        where = one_code(tensors)
    copy.seal()
    report = examine(copy.path, source)
    assert [(e.check, e.where) for e in report.errors] == [("recomputed", where)]


def test_what_an_error_says(stock, tmp_path):
    good = stock.good("llama", "w8a8_dynamic")
    copy = Copy(good, tmp_path / "copy")
    with copy.tensors() as tensors:
        name = f"{Q}.weight"
        codes = tensors[name].clone()
        codes[3, 4] = -100
        codes[5, 6:9] = -101
        before = int(tensors[name][3, 4])
        tensors[name] = codes
    copy.seal()
    errors = [e for e in examine(copy.path, good.source).errors if e.check == "recomputed"]
    what = f"is -100; the recipe makes {before} of the source, and 3 more differ"
    assert [(e.what, e.where, e.fix) for e in errors] == [
        (what, f"`{name}`[3, 4]", "convert the model again")
    ]


@pytest.mark.parametrize(("elements", "job"), [(1, 1), (1000, 2**12)])
def test_whatever_cuts_the_work(stock, monkeypatch, elements, job):
    good = stock.good("llama", "smooth")
    monkeypatch.setattr("quantcli.planning.block.JOB_BYTES", job)
    monkeypatch.setattr("quantcli.planning.block.compute.__defaults__", (Calibrated(), elements))
    options = VerifyOptions(
        good.path, against=str(good.source), calibration=calibration_of(good), workers=3
    )
    report = verify(options)
    assert report.errors == []
    assert report.checked["recomputed"] == 207
