"""No false alarm on what other producers write soundly; damage in the same places is seen."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.calibration.replay.served import Served
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.core.errors import InputError
from quantcli.sources.decode import decoded
from quantcli.targets.layouts import stray_signs
from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.e2e.conftest import run_cli
from tests.verify import producers
from tests.verify.damage import Copy
from tests.verify.producers import (
    FP8,
    FP8_ROWS,
    INT8,
    MODULES,
    MXFP8,
    described,
    float_model,
    fp8,
    fp8_rows,
    int8,
    mxfp4,
    mxfp8,
    others,
    quantized,
    signed_int8,
    weights,
)
from tests.verify.stock import TEXT

NO_MANIFEST = "there is no quantcli_manifest.json: sizes and hashes of files are not known"
ROUNDED_AGAIN = "rounds codes again to the larger scale"
K = "model.layers.0.self_attn.k_proj"


def examine(path, source=None, **more):
    return verify(VerifyOptions(path, full=True, against=source and str(source), **more))


def errors(report):
    return [f"{f.check}: {f.what} | {f.where}" for f in report.errors]


def notes(report):
    """All but those that any checkpoint of another producer has."""
    found = [f.what for f in report.findings if f.severity == "note"]
    return [what for what in found if what != NO_MANIFEST and ROUNDED_AGAIN not in what]


def sound(path, source):
    """The notes of a checkpoint that has no error, and whose weights are all compared."""
    assert errors(examine(path)) == []
    report = examine(path, source)
    assert errors(report) == []
    assert len(report.modules) == len(MODULES)
    return notes(report)


def change(path, name, to):
    """Another tensor in a tensor's place."""
    tensors = load_file(path / "model.safetensors")
    tensors[name] = to(tensors[name].clone()).contiguous()
    save_file(tensors, path / "model.safetensors")


def edit(path, file, **entries):
    """Other entries in a JSON file; None takes one away."""
    table = json.loads((path / file).read_text()) | entries
    table = {key: value for key, value in table.items() if value is not None}
    (path / file).write_text(json.dumps(table))


def weight(checkpoint, module):
    stored = decoded(checkpoint).tensors[f"{module}.weight"]
    with stored.open() as rows:
        return rows.weight(0, stored.spec.shape[0])


@pytest.fixture
def source(tmp_path):
    return float_model(tmp_path / "float")


# -- what the source has not either -----------------------------------------------------------------


def test_a_model_of_a_class_without_lm_head(tmp_path):
    head = others("score")
    path = quantized(
        tmp_path / "q", int8, INT8, tensors=head, architectures=["LlamaForSequenceClassification"]
    )
    edit_ignore(path, "score")
    assert errors(examine(path)) == []


def edit_ignore(path, name):
    edit(path, "config.json", quantization_config={**INT8, "ignore": [name]})


def test_a_lost_lm_head_is_an_error_unless_the_source_has_none(tmp_path, source):
    path = quantized(tmp_path / "q", int8, INT8, tensors=others(None))
    lost = "layers: lm_head is missing, though config.json says that embeddings are not tied"
    assert errors(examine(path)) == [f"{lost} | {path}"]
    assert errors(examine(path, source))[0] == f"{lost} | {path}"
    headless = float_model(tmp_path / "headless", others(None))
    assert sorted(notes(examine(path, headless))) == [
        "lm_head is missing, though config.json says that embeddings are not tied; "
        "the other model is like that"
    ]


def without(index):
    table = others()
    del table[f"model.layers.{index}.input_layernorm.weight"]
    return table


def test_a_norm_that_the_source_lacks_too_is_a_note(tmp_path, source):
    path = quantized(tmp_path / "q", int8, INT8, tensors=without(1))
    lacks = "layers: lacks `input_layernorm`, which other layers have | `model.layers.1`"
    assert errors(examine(path)) == [lacks]
    assert lacks in errors(examine(path, source))
    same = float_model(tmp_path / "same", without(1))
    report = examine(path, same)
    assert errors(report) == []
    assert notes(report) == [
        "lacks `input_layernorm`, which other layers have; the other model is like that"
    ]


ENCODER = {"architectures": ["ModernBertModel"]}


@pytest.mark.parametrize(
    ("index", "config", "said"),
    [
        (0, ENCODER, "its input may be normalized before"),
        (1, {"layer_types": ["a", "b", "a", "a"]}, "config.json describes it in another way"),
        (3, {"num_kv_shared_layers": 1}, "config.json describes it in another way"),
        (1, {"num_kv_shared_layers": 1}, None),
        (1, ENCODER, None),
        (0, {}, None),
        (1, {"layer_types": ["a", "b", "a", "b"]}, None),
        (1, {"eos_token_id": [1, 2, 3, 4]}, None),
    ],
)
def test_a_norm_that_the_model_has_not(tmp_path, index, config, said):
    report = examine(quantized(tmp_path / "q", int8, INT8, tensors=without(index), **config))
    lacks = "lacks `input_layernorm`, which other layers have"
    where = f"`model.layers.{index}`"
    if said is None:
        assert errors(report) == [f"layers: {lacks} | {where}"]
    else:
        assert errors(report) == []
        assert notes(report) == [f"{lacks}; {said}"]


def test_no_tokenizer_is_a_note_if_the_source_has_none(tmp_path, source):
    path = quantized(tmp_path / "q", int8, INT8)
    (path / "tokenizer.json").unlink()
    assert [e.split(" | ")[0] for e in errors(examine(path, source))] == [
        "files: there is no tokenizer",
        "source: file of the other model is missing",
    ]
    (source / "tokenizer.json").unlink()
    assert notes(examine(path, source)) == ["there is no tokenizer; the other model is like that"]


# -- vLLM-Ascend ------------------------------------------------------------------------------------

CACHE = {"kv_cache_scale": torch.full((32,), 0.02), "kv_cache_offset": torch.zeros(32)}
ONE = {"kv_cache_scale": torch.tensor([0.02]), "kv_cache_offset": torch.zeros(1)}
OF_CACHE = (
    "the cache of keys and values is quantized, and the other model's is not: nothing is compared with "
    f"`{K}.kv_cache_offset`"
)


def ascend_int8(weight):
    parts = int8(weight)
    return parts | {"weight_offset": torch.zeros_like(parts["weight_scale"])}


@pytest.mark.parametrize("cache", [CACHE, ONE], ids=["channels", "one"])
def test_a_cache_of_int8(tmp_path, source, cache):
    path = described(tmp_path / "q", ascend_int8, "W8A8_DYNAMIC", cache)
    assert sound(path, source) == [f"{OF_CACHE} and 15 more"]


def test_scales_of_a_cache_that_the_engine_does_not_read(tmp_path):
    path = described(tmp_path / "q", ascend_int8, "W8A8_DYNAMIC", CACHE)
    edit(path, "quant_model_description.json", kv_cache_type=None)
    report = examine(path)
    assert len(report.errors) == 16
    assert '"kv_cache_type": "C8"' in report.errors[0].what
    assert "the engine stops at it" in report.errors[0].what


@pytest.mark.parametrize(
    ("to", "said"),
    [
        (lambda t: t[:31], "cache: is F32 [31]; a cache in int8 per channel has 1 or 32 here"),
        (lambda t: t.to(torch.int8), "cache: is I8 [32], and the engine reads floats"),
        (lambda t: -t, "values: a scale is not a positive number: -0.0199999996"),
    ],
)
def test_damaged_scales_of_a_cache(tmp_path, to, said):
    path = described(tmp_path / "q", ascend_int8, "W8A8_DYNAMIC", CACHE)
    change(path, f"{K}.kv_cache_scale", to)
    (error,) = errors(examine(path))
    assert error.startswith(said)
    assert f"{K}.kv_cache_scale" in error


def by_definition(parts):
    """What e2m1 nibbles and exponents stand for, number by number."""
    packed, exponent = parts["weight"].tolist(), parts["weight_scale"].tolist()
    rows = []
    for r, octets in enumerate(packed):
        row = []
        for nibble in [n for octet in octets for n in (octet & 15, octet >> 4)]:
            value = producers.E2M1[nibble & 7] * 2.0 ** (exponent[r][len(row) // 32] - 127)
            row.append(-value if nibble & 8 else value)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("label", ["W4A4_MXFP4", "W4A8_MXFP"])
def test_fp4_with_exponents(tmp_path, source, label):
    path = described(tmp_path / "q", mxfp4, label)
    assert sound(path, source) == []
    assert torch.equal(weight(open_checkpoint(path), K), by_definition(mxfp4(weights()[K])))


@pytest.mark.parametrize(
    ("suffix", "to", "said"),
    [
        ("weight", lambda t: t >> 4 | t << 4, "sqnr: SQNR is"),
        ("weight_scale", lambda t: t[:, :1], "parameters: is [32, 1]; for a weight of 32 x 64 W4"),
        ("weight_scale", lambda t: t.float(), "parameters: is F32; W4A4_MXFP4 reads U8"),
        ("weight_scale", lambda t: t.fill_(255), "values: an E8M0 scale is NaN"),
    ],
)  # fmt: skip
def test_damaged_fp4(tmp_path, source, suffix, to, said):
    path = described(tmp_path / "q", mxfp4, "W4A4_MXFP4")
    change(path, f"{K}.{suffix}", to)
    found = errors(examine(path, source))
    assert any(error.startswith(said) and K in error for error in found), found


def rotated_fp4(weight):
    """As FlatQuant transforms it: with one rotation on either side, of a whole row."""
    sides = (8, weight.shape[1] // 8)
    drawn = (torch.randn(s, s, generator=torch.Generator().manual_seed(s)) for s in sides)
    left, right = (torch.linalg.qr(square)[0] for square in drawn)
    rows = (left.mT @ weight.view(-1, *sides) @ right).reshape(weight.shape)
    trans = {"left_trans": left, "right_trans": right, "clip_ratio": torch.tensor([0.9])}
    return mxfp4(rows) | {name: tensor.contiguous() for name, tensor in trans.items()}


def test_transformed_fp4_of_another_producer(tmp_path, source):
    """It knows nothing of `max_supported_tp`, and its transforms are not in blocks."""
    path = described(tmp_path / "q", rotated_fp4, "W4A4_MXFP4_FLATQUANT")
    found = errors(examine(path, source))
    assert any("is [8, 8]; for a weight of" in f and "[16, 16]" in f for f in found), found
    edit(path, "quant_model_description.json", max_supported_tp=1)
    assert sound(path, source) == []
    error = (weight(open_checkpoint(path), K) - weights()[K]).norm() / weights()[K].norm()
    assert error < 0.15


def test_widths_that_the_loader_does_not_take(tmp_path):
    """It pairs the scales of a row, and fills up an odd one for W4A4_MXFP4 alone."""
    for label, fine in (("W4A8_MXFP", False), ("W4A4_MXFP4", True)):
        path = described(tmp_path / label, mxfp4, label)
        for suffix in ("weight", "weight_scale"):
            change(path, f"{K}.{suffix}", lambda t: t[:, : t.shape[1] // 2].contiguous())
        told = [f for f in errors(examine(path)) if "has 32 inputs; the engine takes multiples" in f]
        assert bool(told) != fine


def test_linears_of_a_type_for_experts(tmp_path):
    path = described(tmp_path / "q", mxfp4, "W4A16_MXFP4")
    found = errors(examine(path))
    assert any("is W4A16_MXFP4, which the engine has for experts alone" in f for f in found)


def test_a_type_that_cannot_be_checked_is_a_note(tmp_path, source):
    path = described(tmp_path / "q", mxfp4, "W8A8S")
    report = examine(path, source)
    assert errors(report) == []
    cannot_check, not_compared = notes(report)
    assert cannot_check.startswith("this version cannot check `model.layers.0.")
    assert cannot_check.endswith(f"` and {len(MODULES) - 1} more: type W8A8S")
    assert not_compared == (
        f"{len(MODULES)} modules were not compared, whose formats this version cannot read"
    )
    with pytest.raises(InputError, match="cannot decode type W8A8S"):
        decoded(open_checkpoint(path))


def test_a_tensor_without_a_dot_in_its_name(tmp_path):
    path = described(tmp_path / "q", ascend_int8, "W8A8_DYNAMIC")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"image_newline": torch.ones(64).bfloat16()}, path / "model.safetensors")
    assert "does not describe `image_newline`" in errors(examine(path))[0]
    edit(path, "quant_model_description.json", image_newline="FLOAT")
    assert errors(examine(path)) == []


# -- fp8 --------------------------------------------------------------------------------------------


def renamed(weight, inputs=None):
    parts = fp8(weight)
    parts["weight_scale_inv"] = parts.pop("weight_scale")
    return parts | ({"activation_scale": torch.tensor(0.5)} if inputs else {})


def in_float16(weight):
    parts = fp8(weight)
    parts["weight_scale"] = parts["weight_scale"].half()
    return {"weight": (weight / parts["weight_scale"].float()).to(torch.float8_e4m3fn)} | {
        "weight_scale": parts["weight_scale"]
    }


OF_TRANSFORMERS = "vLLM 0.32 knows these names for Mistral3ForConditionalGeneration alone"


@pytest.mark.parametrize(
    ("encode", "block", "names"),
    [
        (fp8, FP8, 0),
        (fp8, FP8 | {"fmt": "float8_e4m3fn"}, 0),
        (in_float16, FP8, 0),
        (renamed, FP8 | {"weight_block_size": None}, len(MODULES)),
        (lambda w: renamed(w, True), FP8 | {"activation_scheme": "static"}, 2 * len(MODULES)),
    ],
    ids=["0-d", "fmt", "float16", "other names", "static"],
)
def test_fp8_of_whole_weights(tmp_path, source, encode, block, names):
    path = quantized(tmp_path / "q", encode, block)
    found = sound(path, source)
    assert len(found) == (names > 0)
    if names:
        assert OF_TRANSFORMERS in found[0]
        assert f"and {names - 1} more" in found[0]
        edit(path, "config.json", architectures=["Mistral3ForConditionalGeneration"])
        assert notes(examine(path)) == []


def test_names_of_blocks_stay_those_of_blocks(tmp_path):
    def encode(weight):
        parts = fp8(weight)
        return {"weight": parts["weight"], "weight_scale_inv": parts["weight_scale"].view(1, 1)}

    assert "under `weight_scale_inv`" in errors(examine(quantized(tmp_path / "q", encode, FP8)))[0]


def test_a_reference_that_cannot_be_read_is_refused(tmp_path):
    """Its codes would be taken for weights."""
    path = quantized(tmp_path / "q", fp8, FP8)
    broken = quantized(tmp_path / "broken", lambda w: {"weight": fp8(w)["weight"]}, FP8)
    with pytest.raises(InputError, match="there is neither"):
        examine(path, broken)


def test_codes_of_unknown_type_are_not_run_as_weights(stock, tmp_path):
    good = stock.good("llama", "ct_dynamic")
    copy = Copy(good, tmp_path / "copy")
    options = {"run": True, "data": [str(TEXT)], "samples": 4, "length": 16}
    assert examine(copy.path, good.source, **options).run is not None
    with copy.json("config.json") as config:
        config["quantization_config"]["config_groups"]["group_0"]["format"] = "marlin-24"
    copy.seal()
    report = examine(copy.path, good.source, **options)
    assert report.run is None
    assert {e.check for e in report.errors} == {"config", "source", "copies", "recomputed"}


# -- compressed-tensors -----------------------------------------------------------------------------


def test_negative_scales_multiply_like_any_other(tmp_path, source):
    path = quantized(tmp_path / "q", signed_int8, INT8)
    parts = signed_int8(weights()[K])
    assert 4 <= int((parts["weight_scale"] < 0).sum()) <= 28
    assert sound(path, source) == []
    expected = parts["weight"].float() * parts["weight_scale"]
    assert torch.equal(weight(open_checkpoint(path), K), expected)


def test_negative_scales_are_not_packed(tmp_path):
    path = quantized(tmp_path / "q", signed_int8, INT8)
    done = run_cli("pack", path, "--target", "ascend", "--out", tmp_path / "out")
    assert done.code == 2
    assert "ascend is not known to take negative scales" in done.err


def test_a_type_that_cannot_be_read_is_not_packed(tmp_path):
    path = described(tmp_path / "q", mxfp4, "W8A8S")
    done = run_cli("pack", path, "--target", "compressed-tensors", "--out", tmp_path / "out")
    assert done.code == 2
    assert "this version cannot decode type W8A8S" in done.err


@pytest.mark.parametrize(("encode", "block"), [(int8, INT8), (fp8_rows, FP8_ROWS)], ids=["int8", "fp8"])
def test_a_single_negative_scale_is_damage(tmp_path, encode, block):
    path = quantized(tmp_path / "q", encode, block)

    def negate(scale):
        scale[3] *= -1
        return scale

    change(path, f"{K}.weight_scale", negate)
    assert errors(examine(path))[0].startswith("values: a scale is not a positive number: -")
    with pytest.raises(InputError, match="a scale is a positive number"):
        weight(open_checkpoint(path), K)


@pytest.mark.parametrize(("count", "stray"), [(2, []), (7, []), (8, []), (9, [4]), (64, [4])])
def test_one_negative_scale_is_stray_only_among_many(count, stray):
    """If signs are free, half of them are negative: of two scales none, one or both."""
    scale = torch.ones(count, 1)
    scale[min(4, count - 1)] = -1
    assert stray_signs(scale).nonzero()[:, 0].tolist() == stray


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_scales_of_mixed_signs_are_numbers_still(tmp_path, value):
    path = quantized(tmp_path / "q", signed_int8, INT8)
    change(path, f"{K}.weight_scale", lambda t: t.index_fill_(0, torch.tensor([5]), value))
    (error,) = errors(examine(path))
    assert error.startswith("values: a scale is not a positive number")
    assert f"{K}.weight_scale`[5, 0]" in error


@pytest.mark.parametrize(("encode", "block"), [(int8, INT8), (fp8_rows, FP8_ROWS)], ids=["int8", "fp8"])
def test_scales_without_a_second_dimension_are_decoded(tmp_path, encode, block):
    """Engines stop at them, and verification says it; what they mean is certain."""

    def flat(weight):
        parts = encode(weight)
        return parts | {"weight_scale": parts["weight_scale"].flatten()}

    path = quantized(tmp_path / "q", flat, block)
    assert "is [32]; for a weight of 32 x 64" in "".join(errors(examine(path)))
    parts = encode(weights()[K])
    expected = parts["weight"].float() * parts["weight_scale"]
    assert torch.equal(weight(open_checkpoint(path), K), expected)
    assert len(examine(quantized(tmp_path / "right", encode, block), path).modules) == len(MODULES)


def test_float_routers_that_ignore_lacks(tmp_path):
    router = {"model.layers.0.mlp.gate.weight": torch.ones(4, 64).bfloat16()}
    path = quantized(tmp_path / "q", int8, INT8, tensors=others() | router)
    assert errors(examine(path)) == []
    assert "model.layers.0.mlp.gate.weight" in decoded(open_checkpoint(path)).tensors
    edit(path, "config.json", model_type="qwen3_moe")
    what = (
        "loader: `ignore` lacks `model.layers.0.mlp.gate`, float routers that the engine would quantize"
    )
    assert errors(examine(path)) == [f"{what} | config.json"]
    assert "model.layers.0.mlp.gate.weight" in decoded(open_checkpoint(path)).tensors


# -- MXFP8 ---------------------------------------------------------------------------------------------


def mx_checkpoint(path, encode, target):
    if target == "ascend":
        return described(path, encode, "W8A8_MXFP8")
    return quantized(path, encode, MXFP8)


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("target", ["ascend", "compressed-tensors"])
def test_mxfp8_with_exponents_rounded_either_way(tmp_path, source, target, up):
    path = mx_checkpoint(tmp_path / "q", lambda weight: mxfp8(weight, up), target)
    assert sound(path, source) == []
    parts = mxfp8(weights()[K], up)
    expected = [
        [
            float(code) * 2.0 ** (int(parts["weight_scale"][row, column // 32]) - 127)
            for column, code in enumerate(codes)
        ]
        for row, codes in enumerate(parts["weight"].float().tolist())
    ]
    assert torch.equal(weight(open_checkpoint(path), K), torch.tensor(expected))
    other = "ascend" if target == "compressed-tensors" else "compressed-tensors"
    done = run_cli("pack", path, "--target", other, "--out", tmp_path / "packed")
    assert done.code == 0, done.err
    assert errors(examine(tmp_path / "packed", source)) == []
    packed = weight(open_checkpoint(tmp_path / "packed"), K)
    assert torch.equal(packed, torch.tensor(expected))


def moved(exponents, step):
    """With one other exponent."""
    exponents[3, 1] += step
    return exponents


@pytest.mark.parametrize(
    ("target", "suffix", "to", "said"),
    [
        ("compressed-tensors", "weight", lambda t: t.view(torch.uint8).fill_(0x7F).view(t.dtype),
         "values: a code is NaN"),
        ("compressed-tensors", "weight_scale", lambda t: t.fill_(255), "values: an E8M0 scale is NaN"),
        ("compressed-tensors", "weight_scale", lambda t: t.view(torch.float8_e8m0fnu),
         "parameters: is F8_E8M0; mxfp8 reads U8"),
        ("compressed-tensors", "weight_scale", lambda t: t[:, :1], "parameters: is [32, 1]; for a"),
        ("compressed-tensors", "weight_scale", lambda t: moved(t, 1), "sqnr: SQNR"),
        ("ascend", "weight_scale", lambda t: moved(t, -1), "sqnr: a weight is off by"),
        ("ascend", "weight_scale", lambda t: t.view(torch.int8), "parameters: is I8; W8A8_MXFP8 reads"),
    ],
)  # fmt: skip
def test_damaged_mxfp8(tmp_path, source, target, suffix, to, said):
    path = mx_checkpoint(tmp_path / "q", mxfp8, target)
    change(path, f"{K}.{suffix}", to)
    found = errors(examine(path, source))
    assert any(said in error for error in found), found
    assert all(K in error for error in found)


def test_mxfp8_in_use(tmp_path, source):
    """With float inputs it is run as it is with inputs alike, which vLLM's emulation leaves float."""
    block = producers.groups("mxfp8-quantized", MXFP8["config_groups"]["group_0"]["weights"], None)
    path = quantized(tmp_path / "q", mxfp8, block)
    report = examine(path, source)
    assert errors(report) == []
    assert {module.label for module in report.modules} == {"mxfp8 float inputs"}
    other = quantized(tmp_path / "both", mxfp8, MXFP8)
    alone, both = Served.open(path), Served.open(other)
    assert alone.notes == []
    assert [note[:36] for note in both.notes] == ["inputs of mxfp8 stay float in this r"]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    (scheme, parts), (full, more) = (s.quantizer(K, torch.zeros(0), None) for s in (alone, both))
    y = x @ by_powers(parts).mT
    assert torch.equal(scheme.forward(x, parts), y)
    assert torch.equal(full.forward(x, more), y)
    assert not torch.equal(full.forward(x, parts), y)


def by_powers(parts):
    """float32 [n, k]."""
    return parts["weight"].float() * parts["weight_scale"].repeat_interleave(32, 1)


# -- a model that was loaded and saved again --------------------------------------------------------


def test_saved_again_by_a_newer_version(tmp_path, source):
    path = quantized(tmp_path / "q", int8, INT8)
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    edit(path, "config.json", rope_theta=None, rope_parameters=rope, transformers_version="5.1")
    (path / "tokenizer.json").write_text(json.dumps(producers.TOKENIZER, indent=4, sort_keys=True))
    (source / "README.md").write_text("a model")
    assert sound(path, source) == ["file of the other model is missing"]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"rope_theta": None}, "`rope_theta` is missing"),
        ("config.json", {"rope_theta": 500000.0}, "`rope_theta` is 500000.0"),
        ("config.json", {"rope_theta": None, "rope_parameters": {"rope_theta": 500000.0}},
         "`rope_parameters.rope_theta` is 500000.0"),
        ("config.json", {"rope_theta": None, "rope_parameters": {"rope_type": "yarn"}},
         "`rope_parameters.rope_t"),
        ("config.json", {"rms_norm_eps": None}, "`rms_norm_eps` is missing"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"b": 0}}}, "file differs"),
    ],
)  # fmt: skip
def test_settings_that_were_changed(tmp_path, file, change, said):
    source = float_model(tmp_path / "float", rms_norm_eps=1e-6)
    path = quantized(tmp_path / "q", int8, INT8, rms_norm_eps=1e-6)
    edit(path, file, **change)
    found = errors(examine(path, source))
    assert found
    assert all(error.startswith("source: ") for error in found)
    assert said in found[0]


def test_an_index_under_the_name_of_another_producer(tmp_path, source):
    path = quantized(tmp_path / "q", int8, INT8)
    names = load_file(path / "model.safetensors")
    index = path / "quant_model_weights.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    (note,) = sound(path, source)
    assert note.startswith("engines read no index of this name")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "other.safetensors")}))
    assert "it holds weights" in errors(examine(path, source))[0]


def test_what_is_excused_is_what_both_have(tmp_path, source):
    """The same check with another text is not excused."""
    report = examine(quantized(tmp_path / "q", int8, INT8, tensors=without(1)), source)
    report.excuse([replace(report.errors[0], where="`model.layers.2`")])
    assert [e.where for e in report.errors if e.check == "layers"] == ["`model.layers.1`"]
