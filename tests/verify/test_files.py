"""Harm to files, found from headers and small files alone."""

import codecs
import json
import re
import struct

import pytest

from quantcli.checkpoint.manifest import encode_manifest
from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.verify.damage import (
    CONFIG,
    DESCRIPTION,
    GENERATION,
    INDEX,
    MANIFEST,
    TOKENIZER,
    Copy,
    assert_caught,
    describe,
    each,
    edit,
    good_of,
    lose,
    raw,
    row,
    table,
    write,
)

Q = "model.layers.1.self_attn.q_proj"
EMBEDDING = "model.embed_tokens.weight"
AGAIN = (b'"dtype":"I8"', b'"dtype":"H8"')


def header(to):
    """Another header before the same data."""

    def change(data):
        (length,) = struct.unpack("<Q", data[:8])
        raw_header = to(data[8 : 8 + length])
        return struct.pack("<Q", len(raw_header)) + raw_header + data[8 + length :]

    return raw(1, change)


def replaced(old, new, count=1):
    return lambda data: data.replace(old, new, count)


def first_tensor_a_byte_later(raw_header):
    def later(match):
        return b'offsets":[1,%d]' % (int(match[1]) + 1)

    return re.sub(rb'offsets":\[0,(\d+)\]', later, raw_header, count=1)


def repeated_key(file, key, value):
    """The key once more, at the beginning."""
    text = json.dumps({key: value})[1:-1].encode()
    return raw(file, lambda data: data.replace(b"{", b"{" + text + b",", 1))


def index(to):
    """Another index, by a function of its weight_map."""

    def damage(copy):
        with copy.json(INDEX) as file:
            to(file["weight_map"])

    return damage


def of_another_sharding(copy):
    """The index of the same model in smaller files."""
    files = sorted(path.name for path in copy.shards)
    with copy.json(INDEX) as file:
        for number, name in enumerate(file["weight_map"]):
            file["weight_map"][name] = files[number * len(files) // len(file["weight_map"])]


def in_two(copy):
    """The first file's tensors in the last file, too."""
    from safetensors.torch import load_file, save_file

    both = load_file(copy.shards[-1]) | {EMBEDDING: load_file(copy.shards[0])[EMBEDDING]}
    save_file(both, copy.shards[-1], metadata={"format": "pt"})


def stray(copy):
    """A weight file that no index lists, nor the manifest."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy.shards[0])
    save_file(tensors, copy.path / "stray.safetensors", metadata={"format": "pt"})


def unlisted(copy):
    """A weight file that the index has forgotten."""
    with copy.json(INDEX) as file:
        lost = copy.shards[1].name
        file["weight_map"] = {k: v for k, v in file["weight_map"].items() if v != lost}


def gone(copy):
    """A weight file that nothing tells of but the description."""
    unlisted(copy)
    copy.shards[1].unlink()


def manifest(to, *, sealed=True):
    """Another manifest, sealed or not."""

    def damage(copy):
        written = json.loads((copy.path / MANIFEST).read_text())
        to(written)
        data = encode_manifest(written) if sealed else json.dumps(written, indent=2).encode()
        (copy.path / MANIFEST).write_bytes(data)

    return damage


def moved(written):
    written["files"]["../" + TOKENIZER] = written["files"].pop(TOKENIZER)


def first_shard(written):
    return next(name for name in written["files"] if name.endswith(".safetensors"))


OPEN = {"sealed": False}
# Files that something may read, each with the word for it.
USES = {
    "modeling_other.py": "code",
    "deep/modeling_other.PY": "code",
    "pytorch_model.bin": "pickle",
    "model.gguf": "weights",
    "extra/model.safetensors.index.json": "weights",
    "chat_template.json": "template",
    "additional_chat_templates/tools.jinja": "template",
    "tokenizer.model": "tokenizer",
    "added_tokens.json": "tokenizer",
    "merges.txt": "tokenizer",
    "preprocessor_config.json": "settings",
    "weights.xyz": "a library may look for it",
}
MARKED = (codecs.BOM_UTF8 + b"%b").__mod__
ROWS = [
    # a byte order mark, at which engines stop
    *(
        row(f"{name} is marked", "dynamic", raw(name, MARKED), check, "byte order mark", name)
        for name, check in ((CONFIG, "config"), (INDEX, "index"), (DESCRIPTION, "description"))
    ),
    # weight files
    row("truncated", "dynamic", raw(1, lambda data: data[:-100]), "headers", "truncated", "00002-of"),
    row("truncated to nothing", "dynamic", raw(1, lambda _: b""), "headers", "0 bytes", "00002-of"),
    row("extra bytes", "dynamic", raw(1, lambda data: data + b"\0" * 8), "headers", "belong to no"),
    row("header's length", "dynamic", raw(1, lambda d: d[:6] + b"\x01" + d[7:]), "headers", "length"),
    row("header is no JSON", "dynamic", header(replaced(b":", b";")), "headers", "not valid JSON"),
    row("header's dtype", "dynamic", header(replaced(*AGAIN)), "headers", "unknown dtype 'H8'"),
    row("header's shape", "dynamic", header(replaced(b"[64,1]", b"[64,2]")), "headers",
        "take 256 bytes"),
    row("header names a tensor twice", "dynamic",
        header(replaced(b"up_proj.weight_offset", b"up_proj.weight_scale")), "headers", "stands twice"),
    row("header's data overlap",
        "dynamic", header(first_tensor_a_byte_later),
        "headers", "leaves a gap"),
    row("header's name of a tensor", "dynamic",
        header(replaced(b"layers.1.self_attn.k_proj.weight\"", b"layers.1.self_attn.k_pRoj.weight\"")),
        "index", "k_proj.weight", "no shard holds", also={"description", "parameters"}, most=5),
    row("pointer of Git LFS",
        "dynamic", raw(1, lambda _: b"version https://git-lfs.github.com/spec/v1"),
        "headers", "Git LFS"),
    row("weight file is missing", "dynamic", lose(1), "index", "shard", "00002-of", "is missing"),
    row("tensor in two files", "dynamic", in_two, "index", EMBEDDING, "two shards"),
    # index
    row("index of another sharding", "dynamic", of_another_sharding, "index", "says", "it is in"),
    row("index misses a tensor", "dynamic", index(lambda m: m.pop(f"{Q}.weight")), "index",
        "does not list", f"{Q}.weight"),
    row("index lists a tensor too many", "dynamic",
        index(lambda m: m.update({"model.ghost.weight": m[EMBEDDING]})), "index", "model.ghost.weight",
        "no shard holds"),
    row("index misses a file", "dynamic", unlisted, "index", "does not list", "00002-of"),
    row("index is no JSON", "dynamic", raw(INDEX, lambda data: data[:-3]), "index", "not valid JSON"),
    row("index leads out of the folder", "dynamic",
        index(lambda m: m.update({EMBEDDING: "../model.safetensors"})), "index",
        "not one inside the folder"),
    # config.json
    row("no config", "dynamic", lose(CONFIG), "config", "no config.json"),
    row("config is no JSON", "dynamic", raw(CONFIG, lambda data: data[1:]), "config", "not valid JSON"),
    row("key twice in config", "dynamic", repeated_key(CONFIG, "model_type", "x"), "config", "twice"),
    row("quantization_config", "dynamic", edit(CONFIG, quantization_config={"bits": 8}), "config",
        "quantization_config", "reads no description"),
    row("quantization_config of the text model", "multimodal",
        lambda copy: quantized_text(copy), "config", "text_config.quantization_config"),
    row("compression_config", "dynamic", edit(CONFIG, compression_config={"a": 1}), "config",
        "compression_config"),
    row("float32", "dynamic", edit(CONFIG, dtype="float32"), "config", "float32",
        "bfloat16 or float16"),
    row("dtype that nothing has", "dynamic", edit(CONFIG, dtype="int7"), "config", "no dtype"),
    *(row(f"{key} of another serving dtype", good, edit(CONFIG, **{key: "float16"}), "config", key,
          "'float16'", "served in BF16") for good, key in
      (("dynamic", "dtype"), ("dynamic", "torch_dtype"), ("ct dynamic", "torch_dtype"))),
    row("torch_dtype that nothing is served in", "dynamic", edit(CONFIG, torch_dtype="float32"),
        "config", "torch_dtype", "'float32'", "served in BF16"),
    row("dtype of the text model", "multimodal", lambda copy: of_the_text(copy, dtype="float16"),
        "config", "text_config.dtype", "served in BF16"),
    row("no dtype", "dynamic", edit(CONFIG, dtype=None), "config", "no dtype"),
    # description
    row("no description", "dynamic", lose(DESCRIPTION), "description", "there is no", DESCRIPTION),
    row("description is no JSON", "dynamic", raw(DESCRIPTION, lambda data: data[:-5]), "description",
        "not valid JSON"),
    row("description is a list", "dynamic", raw(DESCRIPTION, lambda data: b"[]"), "description",
        "JSON object"),
    row("key twice in the description", "dynamic",
        repeated_key(DESCRIPTION, f"{Q}.weight", "FLOAT"), "description", "stands twice", Q),
    row("module not described", "dynamic", describe(**{f"{Q}.weight": None}), "description",
        f"does not describe `{Q}.weight`"),
    row("scale not described", "dynamic", describe(**{f"{Q}.weight_scale": None}), "description",
        f"does not describe `{Q}.weight_scale`"),
    row("described, and nowhere", "dynamic", describe(**{"model.layers.9.x.weight": "FLOAT"}),
        "description", "model.layers.9.x.weight", "no weight file holds"),
    row("a number for a type", "dynamic", describe(**{f"{Q}.weight": 8}), "description",
        "is 8, not a type"),
    row("null for a type", "dynamic", describe(**{f"{Q}.weight": "null"}), "description", "'null'",
        f"{Q}.weight"),
    row("tied head not described", "tied", describe(**{"lm_head.weight": None}), "description",
        "does not describe `lm_head.weight`"),
    row("type that no engine has", "dynamic", describe(**{f"{Q}.weight": "W8A8_DYNAMYC"}),
        "description", "W8A8_DYNAMYC", Q),
    row("scale of another type than its weight", "dynamic", describe(**{f"{Q}.weight_scale": "W8A16"}),
        "description", "'W8A16'", f"{Q}.weight_scale"),
    row("fp8 by the reference producer's name", "fp8",
        raw(DESCRIPTION, lambda data: data.replace(b"W8A8FP8", b"WFP8AFP8")), "description",
        "WFP8AFP8_DYNAMIC", "27 more"),
    # what lies beside
    row("tokenizer lost on the way", "dynamic", lose(TOKENIZER), "manifest", TOKENIZER, "missing",
        **OPEN),
    row("tokenizer never there", "reference", lose(TOKENIZER), "files", "no tokenizer"),
    row("generation config lost on the way", "dynamic", lose(GENERATION), "manifest", GENERATION,
        **OPEN),
    row("weight file gone, from the index too", "dynamic", gone, "description", "no weight file holds",
        "38 more", also={"layers"}, most=3),
    # manifest
    row("digit of the manifest", "dynamic", raw(MANIFEST, replaced(b'"bytes": 1', b'"bytes": 2')),
        "manifest", "changed since it was written", **OPEN),
    row("manifest is no JSON", "dynamic", raw(MANIFEST, lambda data: data[:50]), "manifest",
        "not valid JSON", **OPEN),
    row("manifest leads out of the folder", "dynamic", manifest(moved), "manifest",
        "not one inside the folder", **OPEN),
    row("manifest has an overlong name", "dynamic",
        manifest(lambda m: m["files"].update({"x" * 300: {"bytes": 1}})), "manifest",
        "longer than a disk takes", **OPEN),
    row("manifest forgets a weight file", "dynamic",
        manifest(lambda m: m["files"].pop(first_shard(m))), "manifest", "not in the manifest", **OPEN),
    *(row(f"{file} is not in the manifest", "dynamic", write(file), "manifest", file, what,
          "not in the manifest", **OPEN) for file, what in USES.items()),
    row("manifest has another size", "dynamic",
        manifest(lambda m: m["files"][TOKENIZER].update(bytes=7)), "manifest", "says 7", **OPEN),
    row("manifest without files", "dynamic", manifest(lambda m: m.pop("files")), "manifest",
        "`files` is missing",
        **OPEN),
    row("file without a size in the manifest", "dynamic",
        manifest(lambda m: m["files"][TOKENIZER].pop("bytes")), "manifest", TOKENIZER, **OPEN),
]  # fmt: skip


def quantized_text(copy):
    with copy.json(CONFIG) as config:
        config["text_config"]["quantization_config"] = {"quant_method": "fp8"}


def of_the_text(copy, **entries):
    with copy.json(CONFIG) as config:
        config["text_config"].update(entries)


@pytest.mark.parametrize(**table(ROWS))
def test_caught(stock, tmp_path, row):
    assert_caught(stock, row, tmp_path)


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (each(stray, Copy.seal), "weight file is not in the index: engines skip it"),
        (each(write("old.bin"), Copy.seal), "file is not verified: engines read safetensors"),
        (write("notes.md"), "file is not in the manifest"),
        (write(".gitattributes"), "file is not in the manifest"),
        (write("model.sigstore.json"), "file is not in the manifest"),
        (write(".cache/huggingface/x"), "folder is not in the manifest"),
        (lose(MANIFEST), "there is no quantcli_manifest.json"),
        (each(edit(CONFIG, dtype="float16"), lose(MANIFEST)),
         "is BF16, like 10 other tensors; the model is served in F16, to which it is rounded"),
        (each(edit(CONFIG, torch_dtype="float32"), lose(MANIFEST)),
         "`torch_dtype` is 'float32'; another key says BF16"),
        (each(describe(indexer_quant_type="INT8_DYNAMIC"), Copy.seal),
         "has `indexer_quant_type`: what the engine rounds"),
        (each(edit(CONFIG, tie_word_embeddings=True), Copy.seal),
         "`tie_word_embeddings` is true, and `lm_head.weight` is stored"),
    ],
    ids=["stray weight file", "pickle", "later file", "attributes", "signature", "downloads",
         "no manifest", "dtype", "torch_dtype", "cache", "tied head"],
)  # fmt: skip
def test_harmless_and_told(stock, tmp_path, damage, note):
    copy = Copy(good_of(stock, "dynamic"), tmp_path / "copy")
    damage(copy)
    report = verify(VerifyOptions(copy.path, full=True))
    assert report.ok
    assert any(note in finding.what for finding in report.findings), report.findings


def test_a_stray_weight_file_that_the_manifest_does_not_list(stock, tmp_path):
    copy = Copy(good_of(stock, "dynamic"), tmp_path / "copy")
    stray(copy)
    (error,) = verify(VerifyOptions(copy.path)).errors
    assert (error.check, error.where) == ("manifest", "stray.safetensors")
    assert error.what.endswith("it holds weights, which an engine may load")
