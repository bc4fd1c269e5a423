from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcli.checkpoint.checkpoint import (
    Checkpoint,
    must_be_unchanged,
    open_checkpoint,
    read_json_file,
    scan_checkpoint,
)
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import Progress
from tests.builders import INDEX, make_model, pack, tensor, write_safetensors
from tests.hub_cache import MARKER, cache_model, link_files

ONE = {"a": tensor("U8", 2)}
TWO = {"b": tensor("U8", 3)}
PAIR = {
    "model-00001-of-00002.safetensors": ONE,
    "model-00002-of-00002.safetensors": TWO,
}
FIRST, SECOND = PAIR
NOT_JSON = "not valid JSON: Expecting value: line 1 column 1 (char 0)"
Build = Callable[[Path], Any]


def indexed(content: Any) -> Build:
    """A model of one shard with this in its index: bytes as they are, all else as JSON."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda model: make_model(model, files={INDEX: raw})


def mapped(shard: Any) -> Build:
    return indexed({"weight_map": {"model.embed.weight": shard}})


def configured(content: bytes) -> Build:
    return lambda model: make_model(model, files={"config.json": content})


def linked(name: str, target: str, *, folder: bool = False) -> Build:
    """A model with a link `name`; the target outside exists."""

    def build(model: Path) -> None:
        outside = model.parent / "outside"
        outside.mkdir()
        (outside / "secret").write_text("secret")
        make_model(model)
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target, target_is_directory=folder)

    return build


def fifo(model: Path) -> None:
    make_model(model)
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")


def huge(name: str) -> Build:
    """A model with a sparse file of a gigabyte."""

    def build(model: Path) -> None:
        make_model(model, files={name: b"{}"})
        os.truncate(model / name, 2**30)

    return build


def without(name: str, build: Build = make_model) -> Build:
    def rest(model: Path) -> None:
        build(model)
        (model / name).unlink()

    return rest


def pickles(*names: str) -> Build:
    """A model of nothing but these files."""
    rest = without("model.safetensors")

    def build(model: Path) -> None:
        rest(model)
        for name in names:
            (model / name).write_bytes(b"\x80\x04.")

    return build


def sharded(shards: Any = PAIR, **options: Any) -> Build:
    return lambda model: make_model(model, shards, **options)


# how to build it, `what`, `where` with {} for the model directory
REFUSED = [
    # the index
    pytest.param(indexed(b"oops"), NOT_JSON, f"{{}}/{INDEX}", id="index-not-json"),
    pytest.param(
        indexed(b'{"weight_map":'),
        "not valid JSON: Expecting value: line 1 column 15 (char 14)",
        f"{{}}/{INDEX}",
        id="index-cut-off",
    ),
    pytest.param(
        indexed(b"{\xff}"), "not UTF-8 (byte 1)", f"{{}}/{INDEX}", id="index-not-utf-8"
    ),
    pytest.param(
        indexed([]), f"{INDEX} must hold a JSON object", f"{{}}/{INDEX}", id="index-list"
    ),
    pytest.param(
        indexed({}),
        "index has no `weight_map` of tensor names to files",
        f"{{}}/{INDEX}",
        id="index-without-weight-map",
    ),
    pytest.param(
        indexed({"weight_map": ["model.safetensors"]}),
        "index has no `weight_map` of tensor names to files",
        f"{{}}/{INDEX}",
        id="weight-map-list",
    ),
    pytest.param(
        indexed({"weight_map": {}}),
        "`weight_map` of the index is empty",
        f"{{}}/{INDEX}",
        id="weight-map-empty",
    ),
    pytest.param(
        indexed(b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'),
        "key 'a' stands twice",
        f"{{}}/{INDEX}",
        id="index-duplicate-tensor",
    ),
    pytest.param(
        indexed(b'{"weight_map":' * 100_000),
        "JSON is nested too deeply",
        f"{{}}/{INDEX}",
        id="index-nested-bomb",
    ),
    pytest.param(
        huge(INDEX), f"{INDEX} is over 268435456 bytes", f"{{}}/{INDEX}", id="index-over-limit"
    ),
    pytest.param(
        indexed({"weight_map": {"": "model.safetensors"}}),
        "a tensor has an empty name",
        f"{{}}/{INDEX}",
        id="index-empty-tensor-name",
    ),
    pytest.param(
        indexed({"weight_map": {"\x1b]0;x\x07": "model.safetensors"}}),
        "tensor name `\\x1b]0;x\\x07` has control characters",
        f"{{}}/{INDEX}",
        id="index-escape-code-in-tensor-name",
    ),
    pytest.param(
        indexed(rb'{"weight_map":{"\udead":"model.safetensors"}}'),
        "text holds half a surrogate pair",
        f"{{}}/{INDEX}",
        id="index-surrogate",
    ),
    pytest.param(
        mapped(1), "1 is not the name of a file", f"{{}}/{INDEX}, tensor `model.embed.weight`",
        id="file-number",
    ),
    *(
        pytest.param(
            mapped(file),
            f"file name `{shown}` {fault}",
            f"{{}}/{INDEX}, tensor `model.embed.weight`",
            id=f"file-{word}",
        )
        for word, file, shown, fault in (
            ("parent", "../x.safetensors", "../x.safetensors", "is not one inside the folder"),
            ("absolute", "/x/x.safetensors", "/x/x.safetensors", "is not one inside the folder"),
            ("subfolder", "x/y.safetensors", "x/y.safetensors", "is not one inside the folder"),
            ("backslash", "..\\x.safetensors", "..\\x.safetensors", "is not one inside the folder"),
            ("nul", "x\0.safetensors", "x\\x00.safetensors", "has control characters"),
            ("newline", "x\n.safetensors", "x\\n.safetensors", "has control characters"),
            ("escape-code", "\x1b[2J.safetensors", "\\x1b[2J.safetensors", "has control characters"),
            ("dot", ".", ".", "is not one inside the folder"),
            ("dots", "..", "..", "is not one inside the folder"),
            ("empty", "", "", "is not one inside the folder"),
            ("long", "x" * 256, "x" * 40, "is longer than a disk takes"),
        )
    ),
    *(
        pytest.param(
            mapped(f"model{suffix}"),
            f"`model{suffix}` is a pickle file",
            f"{{}}/{INDEX}, tensor `model.embed.weight`",
            id=f"file-pickle-{suffix[1:]}",
        )
        for suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    ),
    pytest.param(
        mapped("model.gguf"),
        "`model.gguf` is not a safetensors file",
        f"{{}}/{INDEX}, tensor `model.embed.weight`",
        id="file-gguf",
    ),
    # the shards
    pytest.param(
        without(SECOND, sharded(index=True)),
        f"shard `{SECOND}` is missing (listed in the index)",
        "{}",
        id="shard-of-the-index-missing",
    ),
    pytest.param(
        without(SECOND, sharded()),
        f"shard `{SECOND}` is missing (the other shards' names call for it)",
        "{}",
        id="shard-missing-by-name",
    ),
    pytest.param(
        without("mtp-00001-of-00002.safetensors", sharded(
            {**PAIR, "mtp-00001-of-00002.safetensors": {"c": tensor("U8", 1)},
             "mtp-00002-of-00002.safetensors": {"d": tensor("U8", 1)}}
        )),
        "shard `mtp-00001-of-00002.safetensors` is missing (the other shards' names call for it)",
        "{}",
        id="shard-missing-of-a-second-family",
    ),
    pytest.param(
        sharded({FIRST: ONE, SECOND: {**TWO, **ONE}}),
        "tensor `a` stands in two shards",
        f"{FIRST} and {SECOND} in {{}}",
        id="tensor-in-two-shards",
    ),
    pytest.param(
        sharded(index={"weight_map": {"a": FIRST, "b": SECOND, "c": SECOND}}),
        "index lists tensor `c`, which no shard holds",
        INDEX,
        id="index-lists-too-much",
    ),
    pytest.param(
        sharded(index={"weight_map": {"a": SECOND, "b": FIRST}}),
        f"index says `a` is in `{SECOND}`; it is in `{FIRST}`",
        INDEX,
        id="index-names-the-wrong-shard",
    ),
    pytest.param(
        sharded({FIRST: {**ONE, **TWO}}, index={"weight_map": {"a": FIRST}}),
        f"index does not list `b`, which `{FIRST}` holds",
        INDEX,
        id="index-lists-too-little",
    ),
    pytest.param(
        sharded(files={SECOND: pack(b"{}", b"x")}),
        "bytes belong to no tensor: tensors take 0 bytes, the data section has 1",
        f"{{}}/{SECOND}",
        id="shard-damaged",
    ),
    # the directory
    pytest.param(lambda model: None, "no such model directory", "{}", id="no-directory"),
    pytest.param(
        lambda model: model.write_text("x"),
        "MODEL must be a directory with safetensors files",
        "{}",
        id="directory-is-a-file",
    ),
    pytest.param(Path.mkdir, "no .safetensors file here", "{}", id="directory-empty"),
    pytest.param(
        pickles("model.bin"),
        "weights are pickle files, such as `model.bin`",
        "{}",
        id="directory-of-bin",
    ),
    pytest.param(
        pickles("b.pt", "a.PT", "notes.txt"),
        "weights are pickle files, such as `a.PT`",
        "{}",
        id="directory-of-pt",
    ),
    pytest.param(
        linked("model.safetensors", "../outside/secret"),
        "link leads out of the model directory",
        "{}/model.safetensors -> {}/../outside/secret",
        id="link-to-a-file-outside",
    ),
    pytest.param(
        linked("notes.txt", "/dev/null"),
        "link leads out of the model directory",
        "{}/notes.txt -> /dev/null",
        id="link-to-an-absolute-file",
    ),
    pytest.param(
        linked("assets", "../outside", folder=True),
        "link leads out of the model directory",
        "{}/assets -> {}/../outside",
        id="link-to-a-folder-outside",
    ),
    pytest.param(
        linked("model.safetensors", "gone"),
        "link leads nowhere",
        "{}/model.safetensors",
        id="link-dangling",
    ),
    pytest.param(
        linked("loop", "loop"), "link leads nowhere", "{}/loop", id="link-to-itself"
    ),
    pytest.param(fifo, "not a regular file", "{}/model.safetensors", id="fifo"),
    pytest.param(
        without("model.safetensors", linked("device", "/dev/zero")),
        "link leads out of the model directory",
        "{}/device -> /dev/zero",
        id="link-to-a-device",
    ),
    pytest.param(
        lambda model: (model / "model.safetensors").mkdir(parents=True),
        "no .safetensors file here",
        "{}",
        id="directory-named-model.safetensors",
    ),
    pytest.param(
        without("config.json"), "model has no config.json", "{}", id="config-missing"
    ),
    pytest.param(
        configured(b"[]"),
        "config.json must hold a JSON object",
        "{}/config.json",
        id="config-list",
    ),
    pytest.param(configured(b""), NOT_JSON, "{}/config.json", id="config-empty"),
    pytest.param(
        configured(b'{"hidden_size":"wide"}'),
        "config.json: `hidden_size` should be a whole number of 0 or more, not text: it is 'wide'",
        "{}/config.json",
        id="config-size-text",
    ),
    pytest.param(
        configured(b'{"hidden_size":}'),
        "not valid JSON: Expecting value: line 1 column 16 (char 15)",
        "{}/config.json",
        id="config-broken",
    ),
    pytest.param(
        configured(b'{"a":{"hidden_size":1,"hidden_size":2}}'),
        "key 'hidden_size' stands twice",
        "{}/config.json",
        id="config-duplicate-key",
    ),
    pytest.param(
        huge("config.json"),
        "config.json is over 268435456 bytes",
        "{}/config.json",
        id="config-over-limit",
    ),
]  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.mark.parametrize(("build", "what", "where"), REFUSED)
def test_refused(model: Path, build: Build, what: str, where: str) -> None:
    build(model)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            open_checkpoint(model)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()
    place = where.replace("{}/..", str(model.parent)).replace("{}", str(model))
    assert (caught.value.what, caught.value.where) == (what, place)


def test_every_refusal_says_something_else() -> None:
    said = {case.values[1:] for case in REFUSED}
    same = {"weight-map-list", "directory-named-model.safetensors"}  # as their neighbours
    assert len(said) == len(REFUSED) - len(same)


def test_a_name_over_the_systems_limit_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        scan_checkpoint(tmp_path / ("x" * 300))
    assert caught.value.what == "cannot read: File name too long"


def test_problems_are_gathered_not_only_the_first(model: Path) -> None:
    make_model(
        model,
        {FIRST: {**ONE, **TWO}, "extra.safetensors": ONE},
        index={"weight_map": {"a": FIRST, "c": FIRST, "d": SECOND}},
    )
    (model / "config.json").unlink()
    checkpoint = scan_checkpoint(model)
    assert [problem.what for problem in checkpoint.problems] == [
        f"shard `{SECOND}` is missing (listed in the index)",
        "index lists tensor `c`, which no shard holds",
        f"index does not list `b`, which `{FIRST}` holds",
        "model has no config.json",
    ]
    assert checkpoint.config.plain() == {}
    assert checkpoint.left_out == {"extra.safetensors": f"not listed in {INDEX}"}


def test_ten_missing_shards_are_enough_to_name(model: Path) -> None:
    make_model(model, {"m-00001-of-99999999999999999999.safetensors": ONE})
    problems = [problem.what for problem in scan_checkpoint(model).problems]
    assert len(problems) == 10
    assert problems[0].startswith("shard `m-00002-of-99999999999999999999.safetensors` is missing")


def test_a_good_checkpoint(model: Path) -> None:
    make_model(
        model,
        PAIR,
        index=True,
        config={"model_type": "x", "text_config": {"layers": 1}},
        files={"README.md": "hello", "assets/a/b.txt": "abc", ".gitattributes": ""},
    )
    checkpoint = open_checkpoint(model)
    assert checkpoint.path == model.resolve()
    assert checkpoint.shards == (FIRST, SECOND)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert [(s.dtype, s.shape) for s in checkpoint.specs()] == [("U8", (2,)), ("U8", (3,))]
    assert checkpoint.tensors["b"].file == model / SECOND
    assert checkpoint.nbytes == 5
    assert checkpoint.config.plain() == {"model_type": "x", "text_config": {"layers": 1}}
    assert checkpoint.text_config.plain() == {"layers": 1}
    assert checkpoint.aux == {
        ".gitattributes": 0,
        "README.md": 5,
        "assets/a/b.txt": 3,
        "config.json": 49,
    }
    assert (checkpoint.left_out, checkpoint.problems, checkpoint.notes) == ({}, [], [])


def test_text_config_is_the_config_where_it_is_not_nested(model: Path) -> None:
    make_model(model, config={"text_config": None, "layers": 2})
    assert open_checkpoint(model).text_config.plain() == {"text_config": None, "layers": 2}


@pytest.mark.parametrize(
    ("said", "notes"),
    [(5, []), (6, [f"{INDEX} says total_size 6; the tensors take 5 bytes"]), ("5", [])],
)
def test_a_wrong_total_size_is_only_a_note(model: Path, said: Any, notes: list[str]) -> None:
    weight_map = {"a": FIRST, "b": SECOND}
    make_model(model, PAIR, index={"metadata": {"total_size": said}, "weight_map": weight_map})
    assert open_checkpoint(model).notes == notes


def cached(hub: Path, *, shared: bool = False) -> Path:
    """A model in a cache of the Hub: its snapshot."""
    model = hub / "fetched"
    make_model(model / "draft", files={"notes/a.txt": "abc"})
    return cache_model(make_model(model), hub, shared=shared)


def test_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.shards == ("model.safetensors",)
    assert checkpoint.nbytes == 16
    assert checkpoint.tensors["model.embed.weight"].file.name == "model.safetensors"
    assert checkpoint.aux["draft/notes/a.txt"] == 3


@pytest.mark.parametrize("target", ["../../refs/main", "../other/x", "../../../x"])
def test_links_of_the_hub_cache_may_lead_to_blobs_only(tmp_path: Path, target: str) -> None:
    snapshot = cached(tmp_path)
    outside = snapshot / target
    outside.resolve().parent.mkdir(exist_ok=True)
    outside.write_text("x")
    (snapshot / "x").symlink_to(target)
    with pytest.raises(InputError, match=r"^link leads out of the model directory"):
        open_checkpoint(snapshot)


def test_a_folder_named_blobs_opens_no_way_out_elsewhere(tmp_path: Path) -> None:
    snapshot = cached(tmp_path)
    moved = snapshot.parent.rename(tmp_path / "models--org--name" / "other") / snapshot.name
    with pytest.raises(InputError, match=r"^link leads out of the model directory"):
        open_checkpoint(moved)


@pytest.mark.parametrize("shared", [False, True], ids=["blobs", "shared store"])
@pytest.mark.parametrize("local", [False, True], ids=["snapshot", "local_dir"])
def test_blobs_of_the_hub_are_read_however_they_are_linked(
    tmp_path: Path, shared: bool, local: bool
) -> None:
    snapshot = cached(tmp_path / "hub", shared=shared)
    model = link_files(snapshot, tmp_path / "far" / "model") if local else snapshot
    checkpoint = open_checkpoint(model)
    assert checkpoint.path == model
    assert checkpoint.nbytes == 16
    assert checkpoint.tensors["model.embed.weight"].file == model / "model.safetensors"
    assert checkpoint.aux["draft/notes/a.txt"] == 3


def test_a_link_by_way_of_the_snapshot_is_followed(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "hub", shared=True)
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).symlink_to(snapshot / name)
    assert open_checkpoint(model).nbytes == 16


HASH = "ab" + "0" * 62


@pytest.mark.parametrize(
    ("secret", "others"),
    [
        (f"models--o--n/blobs/{HASH}", []),  # no snapshots
        (f"datasets--o--n/blobs/{HASH}", ["datasets--o--n/snapshots/"]),
        (f"proj/blobs/{HASH}", ["proj/snapshots/"]),
        ("models--o--n/blobs/key", ["models--o--n/snapshots/"]),  # not named by a hash
        (f"models--o--n/blobs/{HASH[:39]}", ["models--o--n/snapshots/"]),
        (f"models--o--n/blobs/{HASH.upper()}", ["models--o--n/snapshots/"]),
        (f"models--o--n/blobs/ab/{HASH}", ["models--o--n/snapshots/"]),
        (f"models--o--n/other/{HASH}", ["models--o--n/snapshots/"]),
        (f"blobs/ab/{HASH}", []),  # no marker
        (f"blobs/ab/{HASH}", [f"blobs/ab/{MARKER}"]),
        (f"blobs/ab/{HASH}", [f"blobs/{MARKER}/"]),  # a folder
        (f"blobs/cd/{HASH}", [f"blobs/{MARKER}"]),  # in the folder of another hash
        (f"blobs/ab/{HASH[:40]}", [f"blobs/{MARKER}"]),
        (f"blobs/{HASH}", [f"blobs/{MARKER}"]),
        (f"store/ab/{HASH}", [f"store/{MARKER}"]),
        (f"blobs/ab/{HASH}/key", [f"blobs/{MARKER}"]),
    ],
)
@pytest.mark.parametrize("hops", [1, 2])
def test_what_only_resembles_a_blob_is_out_of_the_model(
    model: Path, tmp_path: Path, secret: str, others: list[str], hops: int
) -> None:
    make_model(model)
    for name in [secret, *others]:
        place = tmp_path / "home" / name
        (place if name.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            place.write_text("secret")
    target = tmp_path / "home" / secret
    if hops == 2:
        (tmp_path / "between").symlink_to(target)
        target = tmp_path / "between"
    (model / "x").symlink_to(target)
    with pytest.raises(InputError, match=r"^link leads out of the model directory") as caught:
        open_checkpoint(model)
    assert caught.value.where == f"{model / 'x'} -> {tmp_path / 'home' / secret}"


def test_a_planted_cache_opens_no_way_out(tmp_path: Path) -> None:
    """Whatever names and markers a model brings, and whatever it links them to."""
    secret = tmp_path / "home" / ".ssh" / "key"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret")
    evil = tmp_path / "evil"
    snapshot = cached(evil, shared=True)
    repository = snapshot.parents[1]
    (repository / "blobs" / HASH).symlink_to(secret)
    (evil / "blobs" / "ab").mkdir(exist_ok=True)
    (evil / "blobs" / "ab" / HASH).symlink_to(secret)
    taken = {folder.name for folder in (evil / "blobs").iterdir()}  # by the model's own hashes
    other = next(name for number in range(256) if (name := f"{number:02x}") not in taken)
    (evil / "blobs" / other).symlink_to(secret.parent)
    (secret.parent / (other + HASH[2:])).write_text("secret")  # even of such a name
    for target in (
        f"../../blobs/{HASH}",
        f"../../../blobs/ab/{HASH}",
        f"../../../blobs/{other}/{other}{HASH[2:]}",
        str(secret),
    ):
        (snapshot / "x").symlink_to(target)
        with pytest.raises(InputError, match=r"^link leads out of the model directory"):
            open_checkpoint(snapshot)
        (snapshot / "x").unlink()
    assert open_checkpoint(snapshot).nbytes == 16


@pytest.mark.parametrize("target", ["loop", "gone"])
def test_a_blob_that_leads_nowhere(tmp_path: Path, target: str) -> None:
    snapshot = cached(tmp_path, shared=True)
    blob = snapshot.parents[1] / "blobs" / HASH
    blob.symlink_to(HASH if target == "loop" else f"../../blobs/ab/{HASH}")
    (snapshot / "x").symlink_to(f"../../blobs/{HASH}")
    with pytest.raises(InputError, match=r"^link leads nowhere"):
        open_checkpoint(snapshot)


def test_a_folder_or_device_in_the_place_of_a_blob(model: Path, tmp_path: Path) -> None:
    make_model(model)
    repository = tmp_path / "models--o--n"
    (repository / "snapshots").mkdir(parents=True)
    blob = repository / "blobs" / HASH
    blob.mkdir(parents=True)
    (model / "x").symlink_to(blob)
    with pytest.raises(InputError, match=r"^link leads out of the model directory"):
        open_checkpoint(model)
    blob.rmdir()
    os.mkfifo(blob)
    with pytest.raises(InputError, match=r"^link leads out of the model directory"):
        open_checkpoint(model)


def test_a_link_within_the_model_is_followed(model: Path) -> None:
    make_model(model, files={"LICENSE": "free"})
    (model / "COPYING").symlink_to("LICENSE")
    assert open_checkpoint(model).aux["COPYING"] == 4


def test_infinity_in_config_json(model: Path) -> None:
    make_model(model, config={"time_step_limit": [0.0, float("inf")]})
    assert "Infinity" in (model / "config.json").read_text()
    assert open_checkpoint(model).config.plain() == {"time_step_limit": [0.0, float("inf")]}


PICKLED = "may hold pickled code, which is never read or passed on"
OTHER = "the same weights in another format"
STALE = "an index, a signature or a quantization file, true only for the weights it was made for"
HIDDEN = "not part of the model"
ODD = "its name has control characters"


@pytest.mark.parametrize(
    ("file", "shown", "reason"),
    [
        ("pytorch_model.bin", None, PICKLED),
        ("training_args.BIN", None, PICKLED),
        ("original/consolidated.00.pth", None, PICKLED),
        ("model-q4.gguf", None, OTHER),
        ("tf_model.h5", None, OTHER),
        ("consolidated.safetensors", None, "the same weights in another layout"),
        ("pytorch_model.bin.index.json", None, STALE),
        ("quant_model_description.json", None, STALE),
        ("quantize_config.json", None, STALE),
        ("hf_quant_config.json", None, STALE),
        ("quantcli_manifest.json", None, STALE),
        (".git/config", ".git/", HIDDEN),
        ("sub/.cache/x", "sub/.cache/", HIDDEN),
        ("__pycache__/x.pyc", "__pycache__/", HIDDEN),
        ("bell\a.txt", "'bell\\x07.txt'", ODD),
        ("line\nbreak/x", "'line\\nbreak/'", ODD),
        ("\udcff.json", "'\\xff.json'", ODD),
    ],
)
def test_left_out(model: Path, file: str, shown: str | None, reason: str) -> None:
    make_model(model)
    (model / file).parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(model / file, ONE)
    checkpoint = open_checkpoint(model)
    assert checkpoint.left_out == {shown or file: reason}
    assert checkpoint.shards == ("model.safetensors",)
    assert list(checkpoint.aux) == ["config.json"]
    json.dumps(checkpoint.left_out, ensure_ascii=False).encode()  # what --json prints


@pytest.mark.parametrize(
    "file",
    ["sub/quant_config.json", "tokenizer.json", "größe.txt", "1_Pooling/config.json"],
)
def test_carried_along(model: Path, file: str) -> None:
    make_model(model, files={file: "abc"})
    checkpoint = open_checkpoint(model)
    assert checkpoint.aux == {"config.json": 2, file: 3}
    assert checkpoint.left_out == {}


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("adapter_model.safetensors", "weights of an adapter"),
        ("optimizer.safetensors", "the model is in model.safetensors"),
        ("value_head.safetensors", "the model is in model.safetensors"),
        ("model.fp16.safetensors", "the model is in model.safetensors"),
        ("ema.safetensors", "the model is in model.safetensors"),
        ("mtp-00001-of-00002.safetensors", "the model is in model.safetensors"),
        ("original/model.safetensors", "weights in a folder below the model, {}"),
        ("onnx/model.onnx", "weights in a folder below the model, {}"),
        ("onnx/fp16/model.onnx_data", "weights in a folder below the model, {}"),
        ("x/model.safetensors.index.json", "weights in a folder below the model, {}"),
    ],
)
def test_model_safetensors_alone_is_the_model(model: Path, file: str, reason: str) -> None:
    make_model(model)
    (model / file).parent.mkdir(exist_ok=True, parents=True)
    write_safetensors(model / file, ONE)
    checkpoint = open_checkpoint(model)
    assert checkpoint.shards == ("model.safetensors",)
    size = f"{(model / file).stat().st_size} bytes"
    assert checkpoint.left_out == {file: reason.format(size)}
    folder = file.rpartition("/")[0]
    notes = [f"left out 1 file of `{folder}/`: {reason.format(size)}"] if folder else []
    assert [note for note in checkpoint.notes if "left out" in note] == notes
    assert list(checkpoint.aux) == ["config.json"]


def test_without_it_all_shards_but_those_of_something_else_are_the_model(model: Path) -> None:
    mtp = {"mtp.safetensors": {"c": tensor("U8", 1)}}
    make_model(model, {**PAIR, **mtp})
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "ema-1.safetensors"):
        write_safetensors(model / name, ONE)
    checkpoint = open_checkpoint(model)
    assert checkpoint.shards == (FIRST, SECOND, "mtp.safetensors")
    assert sorted(checkpoint.left_out) == [
        "adapter_model.safetensors", "ema-1.safetensors", "optimizer.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_the_config_of_an_adapter_goes_with_its_weights(model: Path, weights: str) -> None:
    """With adapter_config.json in its folder, transformers loads another model's weights."""
    make_model(model, files={"adapter_config.json": "{}"})
    write_safetensors(model / weights, ONE)
    checkpoint = open_checkpoint(model)
    assert checkpoint.left_out["adapter_config.json"] == "of an adapter, whose weights are left out"
    assert weights in checkpoint.left_out
    assert list(checkpoint.aux) == ["config.json"]


def test_an_adapter_alone_is_not_a_model(model: Path) -> None:
    make_model(model, {"adapter_model.safetensors": ONE}, files={"adapter_config.json": "{}"})
    with pytest.raises(InputError, match="weights of an adapter, not of a model"):
        open_checkpoint(model)


def test_stages_of_sentence_embeddings_stay(model: Path) -> None:
    stages = [{"idx": 0, "path": ""}, {"idx": 2, "path": "2_Dense"}, {"path": ["odd"]}, 7]
    make_model(model, files={"modules.json": json.dumps(stages), "2_Dense/config.json": "{}"})
    for folder in ("2_Dense", "3_Dense"):
        (model / folder).mkdir(exist_ok=True)
        write_safetensors(model / folder / "model.safetensors", ONE)
    checkpoint = open_checkpoint(model)
    assert "2_Dense/model.safetensors" in checkpoint.aux
    assert list(checkpoint.left_out) == ["3_Dense/model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["rewritten", "touched", "removed"])
def test_a_change_after_opening_is_found(model: Path, name: str, how: str) -> None:
    make_model(model, files={"tokenizer.json": "{}", "x.gguf": "left out"})
    checkpoint = open_checkpoint(model)
    must_be_unchanged(checkpoint)
    (model / "x.gguf").unlink()
    must_be_unchanged(checkpoint)
    content, status = (model / name).read_bytes(), (model / name).stat()
    if how == "removed":
        (model / name).unlink()
    elif how == "rewritten":
        (model / name).write_bytes(content + b" ")
        os.utime(model / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.utime(model / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(InputError, match="the model changed while it was read") as caught:
        must_be_unchanged(checkpoint)
    assert caught.value.where == str(model / name)


def test_a_disk_that_fails_after_opening(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(model)
    checkpoint = open_checkpoint(model)
    usual, name = Path.stat, "config.json"

    def fail(path: Path, **more: Any) -> os.stat_result:
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return usual(path, **more)

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(MachineError) as caught:
        must_be_unchanged(checkpoint)
    assert caught.value.what == "cannot read: Input/output error"
    assert caught.value.where == str(model / name)


def test_a_change_of_headers_that_keeps_size_and_time_is_found(model: Path) -> None:
    make_model(model, {"model.safetensors": {"a": tensor("U8", 2)}})
    checkpoint = open_checkpoint(model)
    assert checkpoint.fingerprint
    file = model / "model.safetensors"
    status = file.stat()
    file.write_bytes(file.read_bytes().replace(b'"a"', b'"b"'))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(InputError, match="the model changed while it was read"):
        must_be_unchanged(checkpoint)


def test_a_link_to_a_folder_within_is_left_out(model: Path) -> None:
    make_model(model, files={"assets/x": "abc"})
    (model / "more").symlink_to("assets")
    checkpoint = open_checkpoint(model)
    assert checkpoint.left_out == {"more/": "a link to a folder"}
    assert checkpoint.aux == {"assets/x": 3, "config.json": 2}


def test_a_shard_that_the_index_does_not_list_is_left_out_unread(model: Path) -> None:
    make_model(model, PAIR, index=True, files={"stale.safetensors": b"not even a header"})
    checkpoint = open_checkpoint(model)
    assert checkpoint.left_out == {"stale.safetensors": f"not listed in {INDEX}"}
    assert checkpoint.shards == (FIRST, SECOND)


def test_consolidated_files_are_the_weights_where_there_are_no_others(model: Path) -> None:
    make_model(model, {"consolidated.safetensors": ONE})
    checkpoint = open_checkpoint(model)
    assert checkpoint.shards == ("consolidated.safetensors",)
    assert checkpoint.left_out == {}


def fingerprint(folder: Path, **options: Any) -> str:
    return open_checkpoint(make_model(folder, **options)).fingerprint


def test_fingerprint_tells_models_apart_but_not_their_places(tmp_path: Path) -> None:
    shard = "model.safetensors"
    models: list[dict[str, Any]] = [
        {"shards": {shard: {"a": tensor("U8", 2, 3)}}},
        {"shards": {shard: {"a": tensor("U8", 3, 2)}}},
        {"shards": {shard: {"a": tensor("I8", 2, 3)}}},
        {"shards": {shard: {"b": tensor("U8", 2, 3)}}},
        {"shards": {"other.safetensors": {"a": tensor("U8", 2, 3)}}},
        {"shards": {shard: {"a": tensor("U8", 2, 3)}}, "config": {"x": 1}},
    ]
    prints = [fingerprint(tmp_path / f"{n}", **options) for n, options in enumerate(models)]
    assert len(set(prints)) == len(models)
    assert fingerprint(tmp_path / "copy", **models[0]) == prints[0]
    assert fingerprint(tmp_path / "more", **models[0], files={"README.md": "x"}) == prints[0]


def test_fingerprint_stays_what_it_was(model: Path) -> None:
    make_model(model, {"model.safetensors": ONE})
    header = len(pack({"__metadata__": {"format": "pt"}, "a": {"dtype": "U8", "shape": [2],
                       "data_offsets": [0, 2]}}))  # fmt: skip
    told = f"model.safetensors\0{header}\0a\0U8\0(2,)\nmodel.safetensors\0{header + 2}\n{{}}"
    assert open_checkpoint(model).fingerprint == hashlib.sha256(told.encode()).hexdigest()


def test_read_json_file_of_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        read_json_file(tmp_path / "x.json")
    assert caught.value.what == "cannot read: No such file or directory"
    assert caught.value.where == str(tmp_path / "x.json")


def test_nothing_is_written_to_the_model(model: Path) -> None:
    make_model(model, PAIR, index=True)
    before = {path: path.stat().st_mtime_ns for path in [model, *model.iterdir()]}
    model.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert isinstance(open_checkpoint(model), Checkpoint)
    model.chmod(stat.S_IRWXU)
    assert {path: path.stat().st_mtime_ns for path in [model, *model.iterdir()]} == before


@pytest.mark.parametrize(
    ("shards", "tensors", "index", "is_large"),
    [
        (16, 1, False, False),
        (17, 1, False, True),
        (16, 1, True, False),
        (17, 1, True, True),
        (1, 3000, False, False),
        (1, 8000, False, True),
        (2, 5000, False, False),
        (2, 5000, True, True),  # the index lists all tensors
    ],
)
def test_large_headers_are_announced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shards: int,
    tensors: int,
    index: bool,
    is_large: bool,
) -> None:
    names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    one = tensor("BF16", 1)
    tables = {
        file: {f"layers.{n}.{k}.weight": one for k in range(tensors)} for n, file in enumerate(names)
    }
    model = make_model(tmp_path / "model", tables, index=index)
    said: list[str] = []
    progress = Progress()
    monkeypatch.setattr(progress, "say", said.append)
    checkpoint = scan_checkpoint(model, progress)
    assert len(checkpoint.tensors) == shards * tensors
    assert said == [f"reading the headers of {model}"] * is_large
