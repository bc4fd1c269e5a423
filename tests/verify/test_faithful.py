"""Checkpoints that are sound in themselves, and not what the float model says: --against and --run."""

import shutil

import pytest
import torch

from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.verify.damage import (
    CONFIG,
    GENERATION,
    MANIFEST,
    TOKENIZER,
    Copy,
    add,
    assert_caught,
    bit,
    change,
    drop,
    each,
    edit,
    good_of,
    lose,
    put,
    raw,
    row,
    swap,
    table,
    write,
)
from tests.verify.test_files import USES, of_the_text, stray

LAYER, OTHER = "model.layers.1", "model.layers.2"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down"))
NORM, EMBEDDING = f"{LAYER}.input_layernorm.weight", "model.embed_tokens.weight"
EXPERTS = f"{LAYER}.mlp.experts"
CODES = ("weight", "weight_scale", "weight_offset")


def doubled(tensor):
    return tensor * 2


def of(other):
    """Another tensor's values."""

    def damage(name):
        def change_it(copy):
            with copy.tensors() as tensors:
                tensors[name] = tensors[other].clone()

        return change_it

    return damage


def rows_rolled(tensor):
    return tensor.roll(1, 0)


def row_zeroed(tensor):
    tensor[7] = 0
    return tensor


def row_negated(tensor):
    tensor[7] = -tensor[7].clamp(min=-7)
    return tensor


def exponent_raised(tensor):
    tensor[3, 1] += 2
    return tensor


def column_negated(tensor):
    tensor[:, 3] = -tensor[:, 3].clamp(min=-127)
    return tensor


def copied(*suffixes):
    """A module of another layer in a module's place."""
    names = (f"self_attn.q_proj.{suffix}" for suffix in suffixes)
    return each(*(of(f"{OTHER}.{name}")(f"{LAYER}.{name}") for name in names))


def saturated(copy):
    """Input scales of a layer a sixteenth of what they were, all else made to match them."""
    with copy.tensors() as tensors:
        for module in (Q, K, V, OUT, GATE, UP, DOWN):
            tensors[f"{module}.input_scale"] /= 16
            tensors[f"{module}.deq_scale"] /= 16
            tensors[f"{module}.quant_bias"] -= tensors[f"{module}.quant_bias"]
            tensors[f"{module}.input_offset"] *= 0
            if f"{module}.bias" in tensors:
                bias = tensors[f"{module}.bias"].double() / tensors[f"{module}.deq_scale"].double()
                tensors[f"{module}.quant_bias"] = bias.round().to(torch.int32)


def shifted(copy):
    """An offset that leaves inputs no room, with quant_bias to match."""
    with copy.tensors() as tensors:
        for module in (Q, K, V):
            offset = tensors[f"{module}.input_offset"]
            sums = tensors[f"{module}.weight"].sum(1, dtype=torch.int64)
            change_of = (127 - offset).long() * sums
            tensors[f"{module}.quant_bias"] -= change_of.to(torch.int32)
            tensors[f"{module}.input_offset"] = torch.full_like(offset, 127)


AGAINST = [
    # codes and scales
    row("scales of k and v swapped", "dynamic", swap(K, V, "weight_scale"), "edits", f"`{K}`",
        "its rows were multiplied", most=2),
    row("codes of k and v swapped", "dynamic", swap(K, V, "weight"), "sqnr", f"`{K}`", most=2),
    row("k and v swapped", "dynamic", swap(K, V, *CODES), "sqnr", f"`{V}`", most=2),
    row("gate and up swapped", "fp8", swap(GATE, UP, *CODES), "sqnr", f"`{UP}`", most=2),
    row("square weight transposed", "dynamic", change(f"{OUT}.weight", lambda t: t.T), "sqnr",
        f"`{OUT}`"),
    row("rows shifted by one", "w8a16", each(*(change(f"{Q}.{s}", rows_rolled) for s in CODES)), "sqnr",
        f"`{Q}`"),
    row("two rows swapped", "dynamic", change(f"{GATE}.weight", lambda t: t[[1, 0, *range(2, 96)]]),
        "sqnr", f"`{GATE}`", "row 0"),
    row("one row zeroed", "dynamic", change(f"{GATE}.weight", row_zeroed), "sqnr", f"`{GATE}`",
        "row 7"),
    row("one row zeroed, fp8", "fp8", change(f"{GATE}.weight", row_zeroed), "sqnr", f"`{GATE}`",
        "row 7"),
    row("sign of a column flipped", "dynamic", change(f"{Q}.weight", column_negated), "sqnr", f"`{Q}`"),
    row("codes of two layers swapped", "dynamic",
        swap(f"{LAYER}.mlp.up_proj", f"{OTHER}.mlp.up_proj", "weight"), "sqnr", f"`{UP}`", most=2),
    row("weight of another layer", "moe", copied(*CODES), "sqnr", f"`{Q}`"),
    row("two experts swapped", "moe", swap(f"{EXPERTS}.1.up_proj", f"{EXPERTS}.6.up_proj", *CODES),
        "sqnr", "experts.1.up_proj", most=2),
    row("top bit of one code", "dynamic", bit(f"{GATE}.weight", 100, 7), "sqnr", f"`{GATE}`", "row 1"),
    row("sign of one fp8 code", "fp8", change(f"{GATE}.weight", lambda t: largest_negated(t)), "sqnr",
        f"`{GATE}`"),
    row("one exponent", "mxfp8", change(f"{Q}.weight_scale", exponent_raised), "sqnr", f"`{Q}`",
        "row 3"),
    row("row of int4 codes negated", "flatquant", change(f"{Q}.weight", row_negated), "sqnr", f"`{Q}`",
        "row 7"),
    row("scale of one row doubled", "dynamic", put(f"{Q}.weight_scale", (9, 0), 0.01), "sqnr", f"`{Q}`",
        "row 9", also={"edits"}, most=2),
    row("all scales doubled", "dynamic", change(f"{OUT}.weight_scale", doubled), "edits", f"`{OUT}`",
        "its rows were multiplied"),
    row("scales 1 % off, for a release's limit", "dynamic",
        change(f"{OUT}.weight_scale", lambda t: t * 1.015), "sqnr", f"`{OUT}`", "limit 38",
        limits={"min_sqnr": 38.0}),
    row("deq_scale doubled", "static", change(f"{OUT}.deq_scale", doubled), "edits", f"`{OUT}`"),
    row("transform of another layer", "flatquant",
        each(*(of(f"model.layers.0.self_attn.{m}_proj.left_trans")(f"{LAYER}.self_attn.{m}_proj.left_trans")
               for m in "qkv")), "sqnr", f"`{Q}`", also=(), most=9),
    # what stays float
    row("embedding's lowest bit", "dynamic", bit(EMBEDDING, 0, 0), "copies", EMBEDDING,
        "first at [0, 0]"),
    row("head's lowest bit", "w8a16", bit("lm_head.weight", 2, 0), "copies", "lm_head",
        "first at [0, 1]"),
    row("final norm", "dynamic", put("model.norm.weight", (5,), 3), "copies", "model.norm", "at [5]"),
    row("one number of a norm", "dynamic", put(NORM, (5,), 3), "edits", NORM,
        "no matrix that reads it"),
    row("router's rows swapped", "moe", change(f"{LAYER}.mlp.gate.weight", lambda t: t.flip(0)), "sqnr",
        "mlp.gate"),
    row("kv_b_proj scaled", "latent", change(f"{LAYER}.self_attn.kv_b_proj.weight", doubled), "edits",
        "kv_b_proj"),
    row("bias doubled", "tied", change(f"{Q}.bias", doubled), "edits", f"{Q}.bias"),
    row("tensor too many", "dynamic", add(f"{LAYER}.extra.weight", torch.ones(4)), "source",
        f"{LAYER}.extra.weight", "not in the other model", also=()),
    row("final norm is missing", "dynamic", drop("model.norm.weight"), "source", "model.norm.weight",
        "missing"),
    row("embedding is missing", "tied", drop(EMBEDDING), "source", EMBEDDING, "missing"),
    # smoothing
    row("norm as it was before smoothing", "smooth", lambda copy: restored(copy, NORM), "edits",
        "nothing that they read is divided", Q, most=9),
    row("norm divided twice", "smooth", change(NORM, lambda t: t / 2), "edits",
        "the columns of no reader compensate", Q, most=9),
    row("one reader as before smoothing", "smooth", lambda copy: unsmoothed(copy, K), "edits",
        "nothing that they read is divided", f"`{Q}`", most=9),
    row("o_proj's columns doubled", "smooth",
        each(*(change(f"{OUT}.{s}", doubled) for s in ("weight_scale", "deq_scale"))), "edits",
        "nothing that they read is divided", f"`{OUT}`", most=2),
    # files
    row("tokenizer lost before the manifest", "dynamic", lose(TOKENIZER), "source", TOKENIZER,
        "missing"),
    row("generation config lost", "dynamic", lose(GENERATION), "source", GENERATION),
    row("generation config changed", "dynamic", edit(GENERATION, eos_token_id=5), "source", GENERATION,
        "differs"),
    row("chat template changed", "dynamic", raw("chat_template.jinja", lambda d: d + b" "), "source",
        "chat_template.jinja", "differs"),
    row("tokenizer of another model", "dynamic", raw(TOKENIZER, lambda d: d.replace(b"1.0", b"1.1")),
        "source", TOKENIZER),
    # files and keys too many, by whoever could seal the manifest again
    *(row(f"{file} is added", "dynamic", write(file), "source", file, "not in the other model", what)
      for file, what in USES.items()),
    row("stray weight file", "dynamic", stray, "source", "stray.safetensors", "weights"),
    row("compiled code", "reference", write("__pycache__/modeling.pyc"), "source", "__pycache__/",
        "code"),
    row("code named in config.json", "dynamic", edit(CONFIG, auto_map={"AutoModel": "evil.M"}),
        "source", "`auto_map` is", "no such key"),
    row("tied, and a head stored", "dynamic", edit(CONFIG, tie_word_embeddings=True), "source",
        "`tie_word_embeddings` is True"),
    row("tied in the text model's part", "multimodal",
        lambda copy: of_the_text(copy, tie_word_embeddings=False), "source", "text_config.tie_word"),
    row("key that is null", "dynamic", lambda copy: null(copy, "sliding_window"), "source",
        "`sliding_window` is None", "no such key"),
    row("key that is gone", "dynamic", edit(CONFIG, rms_norm_eps=None), "source", "`rms_norm_eps`",
        "missing"),
    row("dtype, in the manifest too", "dynamic", lambda copy: served_in_float16(copy), "source",
        "`dtype` is 'float16'", "by the other model it is bfloat16"),
    row("dtype, without a manifest", "ct dynamic",
        each(edit(CONFIG, torch_dtype="float16"), lose(MANIFEST)), "source", "`torch_dtype`",
        "bfloat16"),
    row("quantization that another reader finds", "ct dynamic",
        edit(CONFIG, compression_config={"a": 1}), "source", "`compression_config`"),
    row("config.json of another model", "dynamic", edit(CONFIG, rms_norm_eps=0.1), "source",
        "rms_norm_eps", "0.1"),
    row("rope of another model, in the text model's part", "multimodal", lambda copy: nested(copy),
        "source", "max_position_embeddings"),
]  # fmt: skip

TEXT = [
    row(
        "input scales too small",
        "static",
        saturated,
        "layer outputs",
        f"`{LAYER}`",
        also={"kl"},
        most=2,
    ),
    row("input offset leaves no room", "static", shifted, "layer outputs", f"`{LAYER}`"),
]


def largest_negated(tensor):
    """The sign of the largest code."""
    place = int(tensor.float().abs().argmax())
    flat = tensor.view(-1)
    flat[place] = -flat[place].float() if int(flat[place].float()) != -8 else 7
    return tensor


def restored(copy, name):
    """A tensor as it is in the float model."""
    from safetensors.torch import load_file

    before = load_file(copy.source / "model.safetensors")[name]
    with copy.tensors() as tensors:
        tensors[name] = before


def unsmoothed(copy, module):
    """A weight quantized from the float model, without what smoothing did."""
    from safetensors.torch import load_file

    weight = load_file(copy.source / "model.safetensors")[f"{module}.weight"].float()
    with copy.tensors() as tensors:
        scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
        codes = (weight / scale).round().clamp(-128, 127)
        tensors[f"{module}.weight"] = codes.to(torch.int8)
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.deq_scale"] = scale[:, 0] * tensors[f"{module}.input_scale"]
        offset = tensors[f"{module}.input_offset"].double()
        tensors[f"{module}.quant_bias"] = (-offset * codes.sum(1).double()).round().to(torch.int32)


def nested(copy):
    with copy.json(CONFIG) as config:
        config["text_config"]["max_position_embeddings"] = 4096


def null(copy, key):
    with copy.json(CONFIG) as config:
        assert key not in config
        config[key] = None


def served_in_float16(copy):
    edit(CONFIG, dtype="float16")(copy)
    edit(MANIFEST, serving_dtype="F16")(copy)


@pytest.mark.parametrize(
    "file",
    [".gitattributes", ".cache/huggingface/x", "README.md", "LICENSE", "model.sig", "figures/a.png"],
)
def test_what_an_upload_adds_is_a_note(stock, tmp_path, file):
    copy = Copy(good_of(stock, "dynamic"), tmp_path / "copy")
    write(file)(copy)
    copy.seal()
    report = verify(VerifyOptions(copy.path, full=True, against=str(copy.source)))
    notes = [(note.check, note.where, note.what) for note in report.findings]
    place, what = (".cache/", "folder") if file.startswith(".cache") else (file, "file")
    assert ("source", place, f"{what} is not in the other model; engines do not read it") in notes
    assert report.ok


def test_a_file_that_conversions_leave_out_is_a_note_if_it_is_the_source_s(stock, tmp_path):
    copy = Copy(good_of(stock, "dynamic"), tmp_path / "copy")
    source = shutil.copytree(copy.source, tmp_path / "source")
    for folder in (copy.path, source):
        (folder / "training_args.bin").write_bytes(b"same")
    copy.seal()

    def findings():
        report = verify(VerifyOptions(copy.path, against=str(source)))
        return [(f.check, f.severity) for f in report.findings if f.where == "training_args.bin"]

    assert findings() == [("files", "note"), ("source", "note")]
    (source / "training_args.bin").write_bytes(b"other")
    assert findings() == [("files", "note"), ("source", "error")]


@pytest.mark.parametrize(**table(AGAINST))
def test_against(stock, tmp_path, row):
    assert_caught(stock, row, tmp_path)


@pytest.mark.parametrize(**table(TEXT))
def test_run(stock, tmp_path, row):
    assert_caught(stock, row, tmp_path)
