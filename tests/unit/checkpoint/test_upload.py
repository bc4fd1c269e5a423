"""Commits to a repository of the Hub, asked of a server on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from quantcli.checkpoint.files import JOURNAL
from quantcli.checkpoint.hub import find_model
from quantcli.checkpoint.hub.upload import Branch, Entry, Sent, open_branch, send
from quantcli.core.errors import InputError, MachineError, QuantError
from tests.hub_server import Fault
from tests.hub_uploads import Shelf, uploads

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=")  # in huggingface_hub

URL = "hf://org/out"
SHARD = "model.safetensors"
CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Shelf]:
    (tmp_path / "served").mkdir()
    with uploads(tmp_path / "served", tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    file = tmp_path / "shard"
    file.write_bytes(CONTENT)
    return file


def begun(url: str = URL) -> Branch:
    branch = open_branch(url)
    branch.create()
    return branch


def served(hub: Shelf, branch: str = "") -> dict[str, bytes]:
    root = hub.folder / f"org/out{branch}"
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_shard_is_sent_and_then_named_by_a_commit(hub: Shelf, shard: Path) -> None:
    branch = open_branch(URL)
    assert branch.is_new
    assert branch.files == {}
    branch.create()
    assert hub.private == {"org/out"}
    send(URL, SHARD, shard, SHA256)
    shard.unlink()
    assert hub.puts == [SHA256]
    assert branch.files.keys() == {".gitattributes"}
    branch.write("Add it", {SHARD: Sent(len(CONTENT), SHA256), "a/b.txt": b"text"})
    assert branch.files[SHARD] == Entry(len(CONTENT), SHA256, large=True)
    assert served(hub)[SHARD] == CONTENT
    assert served(hub)["a/b.txt"] == b"text"
    assert branch.read("a/b.txt") == b"text"
    branch.write("Take it away", {}, ["a/b.txt", "never there"])
    assert served(hub).keys() == {".gitattributes", SHARD}
    assert open_branch(URL) == branch
    assert [(commit.branch, commit.title) for commit in hub.commits] == [
        ("main", "Add it"),
        ("main", "Take it away"),
    ]


def test_a_file_in_parts_and_one_that_the_hub_has(hub: Shelf, shard: Path) -> None:
    begun()
    hub.part_bytes = 3000
    for _ in range(2):
        send(URL, SHARD, shard, SHA256)
    parts = [asked.path.rpartition("/")[2] for asked in hub.asked if asked.method == "PUT"]
    assert parts == ["1", "2", "3", "4"]
    assert hub.puts == [SHA256]


def test_a_new_branch_has_no_files_of_others(hub: Shelf) -> None:
    begun().write("Other model", {"config.json": b"{}"})
    branch = open_branch(f"{URL}@int4")
    assert branch.commit is None
    assert branch.files.keys() == {".gitattributes"}
    branch.create()
    branch.write("Card", {"README.md": b"# Card"})
    assert served(hub, "@int4").keys() == {".gitattributes", "README.md"}
    assert served(hub).keys() == {".gitattributes", "config.json"}
    assert open_branch(f"{URL}@int4").url == f"{URL}@int4"


def nobody(hub: Shelf, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")


def stranger(hub: Shelf, patch: pytest.MonkeyPatch) -> None:
    hub.name = "somebody"


def reader(hub: Shelf, patch: pytest.MonkeyPatch) -> None:
    hub.name, hub.rights = "somebody", {"org": "read"}


def read_token(hub: Shelf, patch: pytest.MonkeyPatch) -> None:
    hub.role = "read"


def reader_of_it(hub: Shelf, patch: pytest.MonkeyPatch) -> None:
    begun()
    hub.rights = {"org": "read"}


def tag(hub: Shelf, patch: pytest.MonkeyPatch) -> None:
    begun()
    hub.tags = ["main"]


def offline(hub: Shelf, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def rejected(hub: Shelf, patch: pytest.MonkeyPatch) -> None:
    begun()
    hub.faults = [Fault("auth-check/write", status=401)]


def busy(hub: Shelf, patch: pytest.MonkeyPatch) -> None:
    begun()
    hub.faults = [Fault("auth-check/write", status=503, times=99)]


@pytest.mark.parametrize(
    ("arrange", "kind", "what"),
    [
        (nobody, InputError, "nobody is logged in to the Hub"),
        (stranger, InputError, "`org` is neither `somebody`, whose token is used, nor"),
        (reader, InputError, "the token does not allow writing here"),
        (read_token, InputError, "the token does not allow writing here"),
        (reader_of_it, InputError, "the token does not allow writing here"),
        (tag, InputError, "`main` is a tag"),
        (offline, InputError, "the Hub cannot be written to offline"),
        (rejected, InputError, "the Hub does not accept the token"),
        (busy, MachineError, "the Hub could not be written to: the server answers 503"),
    ],
)
def test_who_may_not_write_hears_it_before_the_work(
    hub: Shelf,
    monkeypatch: pytest.MonkeyPatch,
    arrange: Callable[[Shelf, pytest.MonkeyPatch], None],
    kind: type[QuantError],
    what: str,
) -> None:
    arrange(hub, monkeypatch)
    with pytest.raises(kind) as caught:
        open_branch(URL)
    assert caught.value.what.startswith(what)
    assert caught.value.where == URL
    assert caught.value.fix
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["hf://org", "hf://datasets/org", "hf://datasets/org/name", "hf://a/b/c", "hf://a/b@", "hf://"],
)
def test_an_address_that_is_not_of_a_model(url: str) -> None:
    with pytest.raises(InputError, match="not the address of a model on the Hub"):
        open_branch(url)


def test_a_busy_server_and_cut_connections_are_given_time(hub: Shelf, shard: Path) -> None:
    """Also a commit whose answer is lost: it is not made twice."""
    branch = begun()
    hub.faults = [
        Fault("/objects/batch", method="POST", status=503, times=2),
        Fault("", method="PUT", status=500),
        Fault("", method="PUT"),
        Fault("/commit/main", method="POST", status=429, retry_after=1),
        Fault("/commit/main", method="POST"),
    ]
    send(URL, SHARD, shard, SHA256)
    branch.write("Add it", {SHARD: Sent(len(CONTENT), SHA256)})
    assert not any(fault.times for fault in hub.faults)
    assert [commit.title for commit in hub.commits] == ["Add it"]
    assert served(hub)[SHARD] == CONTENT


def test_a_commit_of_somebody_else(hub: Shelf) -> None:
    """It is built upon, if the journal is the one that this run knows."""
    branch = begun()
    branch.write("Begin", {JOURNAL: b"1"})
    other = replace(branch)
    other.write("Licence", {"LICENSE": b"MIT"})
    branch.write("Shard", {JOURNAL: b"1, 2"})
    assert served(hub)["LICENSE"] == b"MIT"
    assert served(hub)[JOURNAL] == b"1, 2"
    with pytest.raises(MachineError, match="another run is writing here"):
        other.write("Shard", {JOURNAL: b"1, 3"})
    assert served(hub)[JOURNAL] == b"1, 2"


def test_somebody_who_keeps_committing(hub: Shelf) -> None:
    branch = begun()
    hub.faults = [Fault("/commit/main", method="POST", status=412, times=2)]
    with pytest.raises(MachineError, match="somebody else keeps committing"):
        branch.write("Add it", {"a.txt": b"a"})


def test_a_file_that_the_repository_ignores(hub: Shelf) -> None:
    branch = begun()
    hub.ignored = "a.txt"
    with pytest.raises(MachineError, match=r"does not list `a\.txt` as it was committed"):
        branch.write("Add it", {"a.txt": b"a", "b.txt": b"b"})


def test_what_was_uploaded_is_a_model_that_can_be_fetched(hub: Shelf, shard: Path) -> None:
    branch = begun()
    send(URL, SHARD, shard, SHA256)
    branch.write("All", {SHARD: Sent(len(CONTENT), SHA256), "config.json": b"{}"})
    folder = find_model("org/out")
    assert (folder / SHARD).read_bytes() == CONTENT
