"""Every reader of what strangers write, as a function of bytes: what it raises is a QuantError."""

from __future__ import annotations

import email.message
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.fuzz import folders

Read = Callable[[bytes], object]


@dataclass(frozen=True)
class Reader:
    """A reader.

    make:  gives the function, in a folder of its own. seeds: good inputs. kind: see `mutate.KINDS`.
    words: values that mean something to it. runs: how many a whole run makes.
    """

    name: str
    make: Callable[[Path], Read]
    seeds: Callable[[], Sequence[bytes]]
    kind: str
    words: tuple[Any, ...] = ()
    runs: int = 100_000


READERS: dict[str, Reader] = {}


def reader(
    kind: str, seeds: Callable[[], Sequence[bytes]], words: Sequence[Any] = (), runs: int = 100_000
) -> Callable[[Callable[[Path], Read]], Callable[[Path], Read]]:
    """Registers a function under its name."""

    def register(make: Callable[[Path], Read]) -> Callable[[Path], Read]:
        name = make.__name__
        READERS[name] = Reader(name, make, seeds, kind, tuple(words), runs)
        return make

    return register


def _json(*values: Any) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(value).encode() for value in values]


def each(*reads: Callable[[], object]) -> None:
    """Call all, also those behind one that refuses; raise the first refusal."""
    from quantcli.core.errors import QuantError

    refusals = []
    for read in reads:
        try:
            read()
        except QuantError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


# -- files of a model ----------------------------------------------------------------------------

_HEADER = {
    "__metadata__": {"format": "pt"},
    "model.a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "model.b.weight": {"dtype": "F4", "shape": [2, 4], "data_offsets": [12, 16]},
    "model.c.weight": {"dtype": "U8", "shape": [0, 3], "data_offsets": [16, 16]},
    "model.d.scale": {"dtype": "F8_E8M0", "shape": [], "data_offsets": [16, 17]},
}


def _headers() -> list[bytes]:
    from tests.builders import pack

    return [pack(_HEADER, bytes(17)), pack({}, b""), pack({"a": _HEADER["model.a.weight"]}, bytes(12))]


@reader("header", _headers, ("BF16", "F32", "C64", "F4", "BOOL", 12, 16, 17, [0, 17]), 1_000_000)
def header(folder: Path) -> Read:
    from quantcli.checkpoint.header import read_header

    file = folder / "model.safetensors"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return read_header(file)

    return read


_INDEX: dict[str, Any] = {
    "metadata": {"total_size": 8},
    "weight_map": {"a.weight": "model-00001-of-00002.safetensors",
                   "b.weight": "model-00002-of-00002.safetensors"},
}  # fmt: skip


@reader("json", _json(_INDEX), ("model.safetensors", "model.bin", "a.safetensors/b", "config.json"))
def index(folder: Path) -> Read:
    from quantcli.checkpoint.checkpoint import open_checkpoint
    from tests.builders import make_model, tensor

    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    shards = {
        file: {f"{name}.weight": tensor("BF16", 2)} for name, file in zip("ab", names, strict=True)
    }
    make_model(folder, shards, index=_INDEX)

    def read(data: bytes) -> object:
        (folder / "model.safetensors.index.json").write_bytes(data)
        return open_checkpoint(folder)

    return read


_SPEECH = {"model_type": "whisper", "text_config": folders.LLAMA, "vision_config": {"hidden_size": 8},
           "speculators_model_type": "eagle3", "transformer_layer_config": folders.LLAMA}  # fmt: skip
_TYPES = ("qwen3", ["qwen3"], "mamba2", "eagle", "qwen3_moe", "LlamaForCausalLM", "bfloat16", "float64")


@reader("json", _json(folders.LLAMA, _SPEECH, folders.LLAMA | {"quantization_config": {}}), _TYPES)
def config(folder: Path) -> Read:
    from quantcli.checkpoint.checkpoint import scan_checkpoint
    from quantcli.checkpoint.detect import must_run_alone
    from quantcli.checkpoint.inspection import inspect_checkpoint
    from quantcli.checkpoint.roles import roles_of

    folders.make(folder, "float")

    def read(data: bytes) -> object:
        (folder / "config.json").write_bytes(data)
        checkpoint = scan_checkpoint(folder)
        return each(
            lambda: json.dumps(inspect_checkpoint(checkpoint)),
            lambda: roles_of(checkpoint),
            lambda: must_run_alone(checkpoint),
        )

    return read


def _stored(folder: Path) -> object:
    """What `quantize`, `inspect` and `verify` see in a quantized checkpoint's headers."""
    from quantcli.checkpoint.checkpoint import scan_checkpoint
    from quantcli.sources.decode import decoded
    from quantcli.targets.base import quantization_of
    from quantcli.verification.structure import verify_structure

    return each(
        lambda: quantization_of(scan_checkpoint(folder)),
        lambda: decoded(scan_checkpoint(folder)),
        lambda: verify_structure(folder, (1, 2)),
    )


_METHODS = (
    *folders.FORMATS, "compressed-tensors", "pack-quantized", "float-quantized", "nvfp4-pack-quantized",
    "mixed-precision", "channel", "tensor", "group", "block", "token", "modelopt", "NVFP4", "FP8",
    "MIXED_PRECISION", "W4A16_AWQ", "fp8_e4m3", "int4", "per_group", "Linear", "re:.*", "lm_head",
    folders.MODULE, f"re:{folders.MODULE}", {"num_bits": 4, "type": "float"}, [32, 32], 4, 8, 16, 32,
    "bitsandbytes", "mxfp4", "quanto", "auto_round:auto_awq", ["re:(([a-z_.0-9])+)+!"],
    {"dynamic": {"+:(a+)+$": {"bits": 8}}}, {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
)  # fmt: skip


def _quantized() -> list[bytes]:
    tables = [
        {"of": name, "config": folders.LLAMA | {"quantization_config": settings}}
        for name, settings in folders.SETTINGS.items()
        if settings is not None
    ]
    return [json.dumps(table).encode() for table in tables]


@reader("json", _quantized, _METHODS)
def quantization(folder: Path) -> Read:
    """Quantization configs of all formats: {"of": format, "config": config.json}."""
    for name in folders.FORMATS:
        folders.make(folder / name, name)

    def read(data: bytes) -> object:
        try:
            table = json.loads(data)
            place, content = folder / table["of"], json.dumps(table["config"]).encode()
            assert table["of"] in folders.FORMATS
        except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
            place, content = folder / "int8", data
        (place / "config.json").write_bytes(content)
        return _stored(place)

    return read


@reader("json", _json(folders.DESCRIPTION), ("FLOAT", "W8A8", "W4A8_DYNAMIC", "W8A16", "C8",
        "W4A4_FLATQUANT_DYNAMIC", 256, folders.MODULE))  # fmt: skip
def description(folder: Path) -> Read:
    """quant_model_description.json of the Ascend format."""
    folders.make(folder, "ascend")

    def read(data: bytes) -> object:
        (folder / "quant_model_description.json").write_bytes(data)
        return _stored(folder)

    return read


def _cards() -> list[bytes]:
    front = (
        "license: mit\nlanguage: [en, no]\ntags:\n- a\n- b\nbase_model: x/y\nquantized_by: quantcli\n"
    )
    body = "# Card\n\ntext <b>x</b> | `code`\n\n```\nfence\n```\n"
    return [f"---\n{front}---\n{body}".encode(), body.encode()]


@reader("text", _cards)
def card(folder: Path) -> Read:
    """README.md of a model."""
    from quantcli.checkpoint.checkpoint import scan_checkpoint
    from quantcli.planning.card.source import kept, not_kept, read_source_card

    folders.make(folder, "float")
    file = folder / "README.md"
    file.touch()
    checkpoint = scan_checkpoint(folder)

    def read(data: bytes) -> object:
        file.write_bytes(data)
        source = read_source_card(checkpoint)
        return [*kept(source.front)], not_kept(source.front)

    return read


# -- YAML ------------------------------------------------------------------------------------------

_RECIPES = (
    b"target: ascend\nrules:\n- match: '*_proj'\n  scheme: w8a8_dynamic\n",
    b"""target: compressed-tensors
rules:
- match: ["re:.*\\\\.mlp\\\\..*", "*.o_proj"]
  scheme: {name: w4a16, group_size: 32, symmetric: false}
- role: [attention, expert]
  scheme: w8a8_static
  optional: true
siblings: ["(.*)\\\\.(?:gate|up)_proj"]
smooth: {alpha: 0.8}
kv_cache: fp8
max_shard: 4GB
calibration: {data: text.txt, samples: 4, length: 16, seed: 1}
verify: {min_sqnr: 20, max_kl: 0.1}
expect: {quantized_modules: ">= 1"}
""",
)


@reader(
    "yaml", lambda: _RECIPES, ("w4a4_flatquant", "gptq", "keep", "float", "re:(a+)+$", "5GB", "dynamic")
)
def recipe(folder: Path) -> Read:
    from quantcli.recipe.recipe import load_recipe

    file = folder / "recipe.yaml"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return load_recipe(file)

    return read


_RELEASE = b"""model: model
output: out/{name}
calibration: {data: text.txt, samples: 4}
set: {max_shard: 2GB}
verify: {full: true, against: true, tp: 2}
checkpoints:
- w8a8_dynamic
- {recipe: w4a16, name: four, set: {rules.0.scheme: keep}, out: four}
"""


@reader("yaml", lambda: [_RELEASE], ("{name}", "hf://a/b", "../x", "w8a8_dynamic", "rules.0.scheme"))
def release(folder: Path) -> Read:
    from quantcli.recipe.release import read_release

    file = folder / "release.yaml"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        found = read_release(file)
        return each(*(lambda entry=entry: found.place(entry, "out") for entry in found.entries))

    return read


@reader("yaml", lambda: _RECIPES, ("re:(a+)+$",))
def own_recipe(folder: Path) -> Read:
    """The recipe inside a checkpoint, which `verify` reads for its limits."""
    from quantcli.verification.limits import own_limits

    file = folder / "quantcli_recipe.yaml"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return own_limits(folder)

    return read


# -- regular expressions ---------------------------------------------------------------------------

_EXPRESSIONS = (
    b"re:.*self_attn.*", b"re:model\\.layers\\.(0|1)\\.mlp\\.(gate|up)_proj$", b"re:(?!.*mlp).*_proj",
    b"re:(([a-z_.0-9])+)+!", b"re:(a|aa)+$", b"re:(?:[a-z.0-9_]*)*x", b"re:(?P<a>.)(?P=a){0,9}",
    b"lm_head",
)  # fmt: skip


@reader("text", lambda: _EXPRESSIONS)
def expression(folder: Path) -> Read:
    """Regular expressions of config.json and of recipes, on long names."""
    from tests.builders import make_model, tensor

    names = [f"model.layers.{i}.{'mlp.' * 20}up_proj" for i in range(3)]
    tensors = {f"{name}.weight": tensor("I8", 4, 4) for name in names}
    tensors |= {f"{name}.weight_scale": tensor("F32", 4, 1, fill=60) for name in names}
    make_model(folder, {"model.safetensors": tensors})

    def read(data: bytes) -> object:
        text = data.decode("utf-8", errors="replace")
        settings = json.loads(json.dumps(folders.SETTINGS["int8"]))
        settings["ignore"] = [text]
        settings["config_groups"]["group_0"]["targets"] = ["Linear", text]
        table = folders.LLAMA | {"quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(table))
        return _stored(folder)

    return read


@reader("text", lambda: _EXPRESSIONS)
def pattern(folder: Path) -> Read:
    """Patterns of a recipe, on a long name."""
    from quantcli.recipe.recipe import load_recipe

    def read(data: bytes) -> object:
        text = "".join(c for c in data.decode("utf-8", errors="replace") if c.isprintable())
        rules = [{"match": [text], "scheme": "w8a8_dynamic"}]
        found = load_recipe({"target": "ascend", "rules": rules, "siblings": [f"({text[3:]})"]})
        name = "model.layers.0." + "mlp." * 40 + "up_proj"
        return each(
            lambda: found.rules[0].matches(name), *(lambda p=p: p.key(name) for p in found.siblings)
        )

    return read


# -- what quantcli itself stored -------------------------------------------------------------------

_FILES = {"model.safetensors": {"bytes": 4, "sha256": "0" * 64, "blake3": "0" * 64},
          "config.json": {"bytes": 2, "sha256": "1" * 64}}  # fmt: skip
_MANIFEST = {
    "manifest_version": 1, "tool": {"version": "1", "packages": {"torch": "2"}},
    "target": "compressed-tensors",
    "source": {"fingerprint": "2" * 64, "name": "x"}, "recipe": "target: ascend\n", "plan": "3" * 64,
    "seconds": 1, "left_out": {"a.bin": "why"}, "numerics": {}, "files": _FILES,
}  # fmt: skip


@reader(
    "json",
    _json(_MANIFEST),
    ("../x", "a/../../b", "config.json", "ascend", "no-such-target", "a" * 256),
)
def manifest(folder: Path) -> Read:
    """The manifest of a checkpoint, sealed again after each change if it can be."""
    from quantcli.checkpoint.manifest import encode_manifest, read_manifest, whole_manifest
    from quantcli.verification.structure import verify_structure

    folders.make(folder, "int8")
    file = folder / "quantcli_manifest.json"

    def read(data: bytes) -> object:
        with suppress(ValueError, AttributeError, TypeError, RecursionError):
            data = encode_manifest(json.loads(data))
        file.write_bytes(data)
        return each(
            lambda: read_manifest(folder),
            lambda: whole_manifest(data, {"config.json": 2}),
            lambda: verify_structure(folder),
        )

    return read


def _statement() -> dict[str, Any]:
    """A statement over two files, in pieces."""
    pieces = [("a.txt:0:3", "1" * 64), ("a.txt:3:5", "2" * 64), ("b c/d:0:9", "3" * 64)]
    whole = hashlib.sha256(bytes.fromhex("".join(digest for _, digest in pieces))).hexdigest()
    resources = [{"name": n, "algorithm": "sha256-sharded-3", "digest": d} for n, d in pieces]
    how = {"method": "shards", "hash_type": "sha256", "shard_size": 3.0, "ignore_paths": ["model.sig"]}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "x", "digest": {"sha256": whole}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {"serialization": how, "resources": resources},
    }


@reader(
    "json",
    lambda: [json.dumps(_statement()).encode()],
    ("files", "shards", "sha256", "blake3", "../x", "a:0:1", "a:1:0", "a:0:99999999999999999999", "::"),
)
def statement(folder: Path) -> Read:
    """What a signature is over; its digest is right if it can be."""
    from quantcli.checkpoint.signature.bundle import read_statement

    def read(data: bytes) -> object:
        with suppress(ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
            table = json.loads(data)
            digests = "".join(each["digest"] for each in table["predicate"]["resources"])
            whole = hashlib.sha256(bytes.fromhex(digests)).hexdigest()
            table["subject"][0]["digest"]["sha256"] = whole
            data = json.dumps(table).encode()
        return read_statement(data, "model.sig")

    return read


def _signatures() -> list[bytes]:
    """Signatures of a key, and of certificates."""
    from quantcli.checkpoint.signature.bundle import bundle_bytes
    from quantcli.checkpoint.signature.keys import Signer
    from tests.signing import issue

    payload, root = json.dumps(_statement()).encode(), issue("root", ca=True)
    leaf = issue("signer", root)
    signers = Signer(leaf.key), Signer(leaf.key, (leaf.certificate, root.certificate))
    return [bundle_bytes(signer.sign(payload)) for signer in signers]


@reader("json", _signatures, ("MAAA", "AAAA", "application/vnd.in-toto+json"), 20_000)
def signature(folder: Path) -> Read:
    """The file of a signature, checked against a key and a certificate of others."""
    from quantcli.checkpoint.signature.bundle import read_bundle
    from quantcli.checkpoint.signature.keys import Identity, Untrusted
    from tests.signing import issue

    other = issue("other", ca=True)
    identity = Identity((other.key.public_key(),), (other.certificate,))

    def read(data: bytes) -> object:
        with suppress(Untrusted):
            return identity.check(read_bundle(data, "model.sig"))
        return None

    return read


_JOURNAL = [
    {"plan": "a" * 64, "checksum": True, "source": {"files": {"a": [1, 2]}}},
    {"shard": "model-00001-of-00002.safetensors", "nbytes": 12, "sha256": "b" * 64},
    {"shard": "model-00002-of-00002.safetensors", "nbytes": 12, "sha256": None, "blake3": "c" * 64},
]


def _journals() -> list[bytes]:
    return [b"".join(json.dumps(line).encode() + b"\n" for line in _JOURNAL)]


@reader("lines", _journals, ("../x", "model.safetensors", {"parts": 1}))
def journal(folder: Path) -> Read:
    """The journal of an interrupted run, in a folder."""
    from quantcli.convert.journal import Journal, check_folder

    head = _JOURNAL[0]
    file = folder / ".quantcli_journal"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return each(lambda: check_folder(folder, head), lambda: Journal(folder, head).close())

    return read


def _object_journals() -> list[bytes]:
    first = {"run": "0" * 16, "files": ["a.safetensors", "config.json"], **_JOURNAL[0]}
    entry = {"bytes": 12, "sha256": "b" * 64}
    lines = [first, {"shard": "a.safetensors", "entry": entry, "tag": '"x"'}]
    return [b"".join(json.dumps(line).encode() + b"\n" for line in lines)]


@reader("lines", _object_journals, ("../x", {"bytes": 1}))
def object_journal(folder: Path) -> Read:
    """The journal of an upload, in object storage."""
    from quantcli.convert.objects.journal import read_notes

    class Bucket:
        content = b""

        def __str__(self) -> str:
            return "s3://bucket/out"

        def get(self, _: str) -> tuple[bytes, Any]:
            return self.content, None

    bucket: Any = Bucket()

    def read(data: bytes) -> object:
        bucket.content = data
        notes = read_notes(bucket)
        notes.check(_JOURNAL[0], bucket)
        return [(name, up.version) for name, up in notes.done.items()]

    return read


_PART = {
    "part_version": 1, "part": 1, "of": 2, "checksum": True, "carried": ["config.json"],
    "shards": {"model-00001-of-00002.safetensors": 1, "model-00002-of-00002.safetensors": 2},
    "manifest": {"plan": "a" * 64, "tool": {}, "source": {"fingerprint": "b" * 64}, "recipe": "x: y\n"},
    "files": {"model-00001-of-00002.safetensors": {"bytes": 4, "sha256": "a" * 64, "blake3": "b" * 64},
              "config.json": {"bytes": 4, "sha256": "a" * 64, "blake3": "b" * 64}},
}  # fmt: skip


@reader("json", _json(_PART), ("../x", "config.json", "quantcli_manifest.json", "a.safetensors"))
def part(folder: Path) -> Read:
    """The description of a part, sealed again if it can be; and the parts as a set."""
    from quantcli.checkpoint.manifest import encode_manifest
    from quantcli.convert.part_folder import check_set, read_part

    folders_ = [folder / "one", folder / "two"]
    for each_folder in folders_:
        each_folder.mkdir()
    second = {**_PART, "part": 2}
    second["files"] = {
        "model-00002-of-00002.safetensors": {"bytes": 4, "sha256": "a" * 64, "blake3": "b" * 64}
    }
    (folders_[1] / "quantcli_part.json").write_bytes(encode_manifest(second))

    def read(data: bytes) -> object:
        with suppress(ValueError, AttributeError, TypeError, RecursionError):
            data = encode_manifest(json.loads(data))
        (folders_[0] / "quantcli_part.json").write_bytes(data)
        return check_set([read_part(each_folder) for each_folder in folders_])

    return read


_LAYER = {
    "layer": "model.layers.0", "experts": {}, "uncalibrated": [], "smoothed": [["a", "b"]],
    "modules": {"model.layers.0.mlp.up_proj": {"tokens": 4, "amax": 1.5, "remark": "x"},
                "model.layers.0.mlp.experts.0.up_proj": {"tokens": 4, "routed": 3}},
    "edits": {"model.layers.0.mlp.up_proj.weight": {"columns": "00000"}},
    "taken_from": {"a": "b"},
}  # fmt: skip


@reader("json", _json(_LAYER), ("00000", "00001", "rows", "columns", "value", {"x": "y"}, "smoothed"))
def calibration(folder: Path) -> Read:
    """The report of a calibrated layer, sealed again if it can be."""
    import torch
    from safetensors.torch import save_file

    from quantcli.calibration import store
    from quantcli.core.disk import sha256_of

    stats = {"stats.model.layers.0.mlp.up_proj.amax": torch.ones(1), "vector.00000": torch.ones(4)}
    file = folder / store.layer_file(0)
    save_file(stats, file)
    (folder / store.HEAD).write_text(json.dumps(_HEAD))
    digest = sha256_of(file)

    def read(data: bytes) -> object:
        with suppress(ValueError, AttributeError, TypeError, RecursionError):
            table = json.loads(data)
            content = {key: value for key, value in table.items() if key != "sha256"}
            data = json.dumps({**content, "sha256": store.digest_of([digest, content])}).encode()
        (folder / "layer-00000.json").write_bytes(data)
        return store.load_measured(folder, 1)

    return read


_HEAD = {
    "version": 2, "layers": 1, "tool": "quantcli 1", "model": "a" * 64, "data": "b" * 64,
    "inputs": {"calibration.inputs": "float"}, "edits": {}, "options": {"observer": "minmax"},
    "modules": {"model.layers.0.mlp.up_proj": "c" * 64}, "measured": {"c" * 64: {"observer": "x"}},
}  # fmt: skip


@reader("json", _json(_HEAD), (2, "float", {}, "c" * 64))
def calibration_head(folder: Path) -> Read:
    """What a calibration is of."""
    from quantcli.calibration import store

    file = folder / "calibration.json"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        found = store.read_head(folder)
        assert found is not None
        key, other = found[0], store.Key("a" * 64, "b" * 64, {}, {}, {"observer": "mse"}, {"m": "d"})
        return key.digest, key.serves(other), key.float_inputs, store.refusal(folder, key, other)

    return read


# -- answers of servers ----------------------------------------------------------------------------


class _Response:
    """An answer as http.client gives it: headers, a blank line, the body."""

    chunked = False

    def __init__(self, data: bytes) -> None:
        head, _, self._body = data.partition(b"\n\n")
        status, _, lines = head.partition(b"\n")
        self.status = int(status) if status.isdigit() and len(status) < 4 else 200
        self.headers = email.message.Message()
        for line in lines.decode("latin-1").splitlines():
            name, _, value = line.partition(":")
            if name.isascii() and name.replace("-", "").isalnum():
                self.headers[name] = value.strip()
        self._file = io.BytesIO(self._body)
        self.length = 0

    def readinto(self, block: memoryview) -> int:
        return self._file.readinto(block)

    def read(self, most: int) -> bytes:
        return self._file.read(most)

    def close(self) -> None:
        self._file.close()


_ANSWERS = (
    b'206\nContent-Range: bytes 0-3/12\nContent-Length: 4\nETag: "x"\n\nabcd',
    b"200\nContent-Length: 12\nLast-Modified: today\n\nabcdefghijkl",
    b"503\nRetry-After: 7\n\n",
)


@reader("text", lambda: _ANSWERS)
def answer(folder: Path) -> Read:
    """The answer to a request for a range, and to one for a size."""
    from quantcli.checkpoint.remote import ranges, web
    from quantcli.checkpoint.remote.http_folder import WebFolder
    from quantcli.checkpoint.remote.origin import PassingError, Version

    origin = WebFolder("https://example.org/model")

    def read(data: bytes) -> object:
        response: Any = _Response(data)
        with suppress(PassingError):
            web.content_length(response.headers)
            web.redirected(origin.url, response, "x")
        with suppress(PassingError):
            block = memoryview(bytearray(4))
            ranges.read_answer(
                response, origin, "a", Version(12, ranges.tag_of(response.headers)), 0, block
            )

    return read


_PAGE = (
    b'<!DOCTYPE html><html><body><a href="config.json">c</a> <a href="model.safetensors">m</a>'
    b'<a href="sub/">s</a><a href="https://example.org/model/x%20y.json?q=1#f">x</a></body></html>'
)


@reader("text", lambda: [_PAGE])
def page(folder: Path) -> Read:
    """The page of a folder on a web server."""
    from quantcli.checkpoint.remote import http_folder
    from quantcli.checkpoint.remote.origin import PassingError, check_names
    from quantcli.core.events import SILENT

    content = b""

    @contextmanager
    def followed(method: str, url: str, *_: Any) -> Iterator[Any]:
        headers = b"200\nContent-Type: text/html\nContent-Length: 4\n\n"
        yield _Response(headers + (content if url.endswith("model/") else b""))

    origin = http_folder.WebFolder("https://example.org/model")

    def read(data: bytes) -> object:
        nonlocal content
        content = data
        with suppress(PassingError), patch.object(http_folder, "followed", followed):
            check_names(origin, origin.list(SILENT).files)

    return read


def _listing() -> dict[str, Any]:
    names = ("config.json", "model.safetensors", "tokenizer.json", "sub/model.onnx")
    lfs = {"sha256": "a" * 64, "size": 4, "pointerSize": 134}
    siblings = [{"rfilename": name, "size": 4, "blobId": "b" * 40} for name in names]
    siblings[1]["lfs"] = lfs
    return {"_id": "1", "id": "a/b", "sha": "c" * 40, "private": False, "gated": False, "tags": ["x"],
            "siblings": siblings, "createdAt": "2024-01-01T00:00:00.000Z", "downloads": 1,
            "cardData": {"license": "mit"}}  # fmt: skip


@reader("json", lambda: [json.dumps(_listing()).encode()], ("../x", "/etc/passwd", "c" * 40, -1))
def hub(folder: Path) -> Read:
    """The Hub's list of a repository's files."""
    import huggingface_hub
    from huggingface_hub.hf_api import ModelInfo

    from quantcli.checkpoint.hub import find, repository

    table: Any = None

    class Api:
        def model_info(self, *_: Any, **__: Any) -> Any:
            return ModelInfo(**table)

    def read(data: bytes) -> object:
        nonlocal table
        api = patch.object(huggingface_hub, "HfApi", Api)
        with api, find._our_errors("a/b", None):
            table = json.loads(data)
            found = repository.look_up("a/b", None)
            return repository.choose(found.sizes, folder)

    return read


# -- text ------------------------------------------------------------------------------------------


def _texts() -> list[bytes]:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    lines = [{"text": "one two"}, chat, {"inputs_pretokenized": "a"}]
    return [b"".join(json.dumps(line).encode() + b"\n" for line in lines)]


@reader("lines", _texts, ("text", "messages", "content", [{"type": "text", "text": "x"}]))
def text(folder: Path) -> Read:
    """Lines of JSON to calibrate with."""
    from quantcli.calibration.text.documents import read_documents

    file = folder / "text.jsonl"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return read_documents(str(file), "--data", lambda _: None)

    return read


# A reader that may end its process: its tokenizer is a library's, in another language.
def _tokenizers() -> list[bytes]:
    vocabulary = {
        token: n for n, token in enumerate(["<s>", "</s>", "<pad>", "<unk>", *"abcdefgh xyz."])
    }
    own = {"<s>": "bos_token", "</s>": "eos_token", "<pad>": "pad_token"}
    added = [
        {"id": vocabulary[token], "content": token, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for token in own
    ]  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
    table = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": "q"}, "content": "a"},
        "pre_tokenizer": split, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    pairs = {"type": "BPE", "vocab": {**vocabulary, "ab": 16, "\u0120": 17}, "merges": [["a", "b"]],
             "unk_token": "<unk>", "byte_fallback": False, "dropout": None}  # fmt: skip
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    both = {"type": "Sequence", "pretokenizers": [split, bytes_]}
    second = table | {"model": pairs, "pre_tokenizer": both}
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    config |= {kind: token for token, kind in own.items()}
    return [json.dumps({"tokenizer": one, "config": config}).encode() for one in (table, second)]


_BOMBS = (
    "(a+)+$", "(?:(?:[a-z ]*)*)*!", "\\p{L}{1,9999}", "BPE", "WordPiece", "Unigram", "WordLevel",
    {"type": "Replace", "pattern": {"String": ""}, "content": "aaaa"}, "<unk>",
    {"type": "Prepend", "prepend": "x"},
    {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Sequence", "normalizers": []}, {"type": "BertNormalizer"}, {"type": "Metaspace"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "TemplateProcessing"},
    "{% for a in range(99999999) %}x{% endfor %}", "{{ 'a' * 999999999 }}", "{{ messages[0].x.y }}",
    "{{ ''.__class__ }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)  # fmt: skip


@reader("json", _tokenizers, _BOMBS, 1000)
def tokenizer(folder: Path) -> Read:
    """Tokenizer files, and texts that go through them."""
    from quantcli.calibration.text.dataset import TextSource, load_dataset

    data = folder / "text.jsonl"
    chat = {"messages": [{"role": "user", "content": "a cab "}, {"role": "x", "content": "bad"}]}
    data.write_text("".join(json.dumps(one) + "\n" for one in (chat, {"text": "a cabbage faded " * 9})))
    source = TextSource(str(data), "--data", 2, 8, None, False, 16)

    def read(content: bytes) -> object:
        try:
            table = json.loads(content)
            files = {"tokenizer.json": table["tokenizer"], "tokenizer_config.json": table["config"]}
            texts = {name: json.dumps(value).encode() for name, value in files.items()}
        except (ValueError, KeyError, TypeError, RecursionError):
            texts = {"tokenizer.json": content}
        for name, raw in texts.items():
            (folder / name).write_bytes(raw)
        return load_dataset(source, folder, positions=64, vocab_size=64)

    return read
