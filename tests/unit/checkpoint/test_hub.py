"""Models on the Hub, asked of a server on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from quantcli.checkpoint.checkpoint import scan_checkpoint
from quantcli.checkpoint.hub import download, find_headers, find_model, repository
from quantcli.checkpoint.remote import mounts
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError, Interrupted, MachineError, QuantError
from quantcli.core.events import Progress
from tests.builders import INDEX, make_model, tensor
from tests.e2e.conftest import run_cli
from tests.hub_server import Fault, Hub, commit_of, used

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOOKING = "no folder org/name here: looking for it on the Hub, or in its cache"
SHARDS = {
    f"model-0000{n}-of-00002.safetensors": {f"layers.{n}.w.weight": tensor("BF16", 64, 64, fill=n)}
    for n in (1, 2)
}
FIRST, LAST = SHARDS
NEEDED = {
    "README.md": "# Card", "LICENSE": "MIT", "chat_template.jinja": "{{ messages }}",
    "generation_config.json": "{}", "tokenizer.json": "{}", "tokenizer.model": b"\0\1",
    "qwen.tiktoken": "IQ== 0", "modeling_own.py": "x = 1", "assets/picture.png": b"png",
    "hf_quant_config.json": "{}",
}  # fmt: skip
NOT_NEEDED = {
    "pytorch_model-00001-of-00002.bin": b"p" * 5000, "pytorch_model.bin.index.json": "{}",
    "model.fp16.safetensors": b"s" * 3000, "consolidated.safetensors": b"s", "model.gguf": b"g",
    "tf_model.h5": b"h", "flax_model.msgpack": b"f", "onnx/model.onnx": b"o",
    "original/consolidated.00.pth": b"p", ".eval_results/a.yaml": "a: 1", "training_args.bin": b"t",
}  # fmt: skip


class Told(Progress):
    """What a run reports."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.total = self.arrived = 0
        self.complete: list[str] = []
        self.when_complete: Callable[[], None] = lambda: None

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, nbytes: int, files: int, noun: str = "shard") -> None:
        self.total = nbytes

    def advance(self, nbytes: int) -> None:
        self.arrived += nbytes

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        self.complete.append(file)
        self.when_complete()


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with org/name: a model in two shards, and all that may be next to one."""
    return make_model(
        tmp_path / "served" / "org" / "name", SHARDS, config={"model_type": "tiny"}, index=True,
        files=NEEDED | NOT_NEEDED,
    ).parents[1]  # fmt: skip


@pytest.fixture
def hub(models: Path, tmp_path: Path) -> Iterator[Hub]:
    """The server of it."""
    with used(models, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def told() -> Told:
    return Told()


def unfinished(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.incomplete"))


def test_only_files_that_a_conversion_needs_are_fetched(hub: Hub, told: Told) -> None:
    folder = find_model("org/name", told)
    full = hub.folder / "org" / "name"
    fetched = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert fetched == {"config.json", INDEX, *SHARDS, *NEEDED}
    assert all((folder / name).read_bytes() == (full / name).read_bytes() for name in fetched)
    assert not any(asked.path.endswith(name) for name in NOT_NEEDED for asked in hub.fetched())
    assert scan_checkpoint(folder).aux == scan_checkpoint(full).aux
    size = sum((full / name).stat().st_size for name in fetched - {"config.json", INDEX})
    assert (told.total, told.arrived) == (size, size)
    assert told.complete[-2:] in ([FIRST, LAST], [LAST, FIRST])
    assert told.said[0] == LOOKING
    assert told.said[1:] == [
        "fetching 12 files of org/name, 16.7 kB",
        "not fetched, since not needed: 11 files, 8.0 kB: "
        "pytorch_model-00001-of-00002.bin, model.fp16.safetensors, .eval_results/a.yaml, ...",
    ]


def test_the_second_time_nothing_is_fetched(hub: Hub, told: Told) -> None:
    folder = find_model("org/name")
    hub.asked.clear()
    assert find_model("org/name", told) == folder
    assert [asked.path for asked in hub.asked] == ["/api/models/org/name"]
    assert told.said == [LOOKING]


def test_a_cache_that_takes_no_note_of_a_branch(hub: Hub, tmp_path: Path) -> None:
    repository = tmp_path / "cache" / "models--org--name"
    repository.mkdir(parents=True)
    (repository / "refs").write_text("")  # where a folder would be made
    folder = find_model("org/name")
    hub.asked.clear()
    assert find_model("org/name") == folder
    assert [asked.path for asked in hub.asked] == ["/api/models/org/name"]


def test_a_cut_connection_is_resumed_where_it_was_cut(
    hub: Hub, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_CHUNK", 1000)
    hub.faults = [Fault(LAST, cut=3000), Fault(LAST, cut=2000)]
    folder = find_model("org/name", told)
    whole = (hub.folder / "org" / "name" / LAST).read_bytes()
    assert (folder / LAST).read_bytes() == whole
    parts = [(asked.span, asked.sent) for asked in hub.fetched(LAST)]
    rest = len(whole) - 5000
    assert parts == [(None, 3000), ("bytes=3000-", 2000), ("bytes=5000-", rest)]
    assert told.arrived == told.total
    assert sum("Error while downloading from a file" in line for line in told.said) == 2
    assert unfinished(tmp_path) == []


def test_a_server_that_sends_all_again_after_a_cut(hub: Hub, told: Told) -> None:
    hub.faults = [Fault(LAST, cut=3000), Fault(LAST, whole=True)]
    folder = find_model("org/name", told)
    assert (folder / LAST).read_bytes() == (hub.folder / "org" / "name" / LAST).read_bytes()
    assert told.arrived == told.total


def test_patience_ends_and_says_what_is_kept(hub: Hub, told: Told, tmp_path: Path) -> None:
    hub.faults = [Fault(LAST, times=1000, cut=0)]
    with pytest.raises(MachineError) as caught:
        find_model("org/name", told)
    assert caught.value.what.startswith("org/name could not be fetched from the Hub: ")
    assert caught.value.where == "13 of 14 files are complete in the Hub's cache, and are kept"
    assert caught.value.fix == "check the network; the same command again fetches the others"
    own = [line for line in told.said if line.startswith(f"`{LAST}`")]
    waits = [line.rpartition("trying again in ")[2] for line in own]
    assert waits == ["1 s", "2 s", "4 s", "8 s"]
    assert unfinished(tmp_path) == []
    hub.faults.clear()
    hub.asked.clear()
    assert (find_model("org/name") / LAST).stat().st_size
    assert [Path(asked.path).name for asked in hub.fetched()] == ["name", LAST]


def test_a_busy_server_is_given_the_time_that_it_asks_for(
    hub: Hub, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=waits.append))
    hub.faults = [
        Fault("org/name", status=503),
        Fault("org/name", status=429, retry_after=7),
        Fault(LAST, status=503, retry_after=1000),
    ]
    find_model("org/name", told)
    assert waits == [1, 7, 120]
    assert told.said[1] == "org/name: the server answers 503; trying again in 1 s"


@pytest.mark.parametrize("path", ["org/name", "config.json"])
def test_a_server_that_hangs(hub: Hub, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(repository, "ASK_TIMEOUT", 0.05)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    hub.faults = [Fault(path, times=1000, hang=60)]
    with pytest.raises(MachineError) as caught:
        find_model("org/name")
    assert caught.value.what == NOT_FETCHED.replace("o/n", "org/name")
    assert caught.value.where == "timed out"


def test_an_interrupt_says_what_is_kept(hub: Hub, told: Told, tmp_path: Path) -> None:
    def interrupt() -> None:
        if len(told.complete) == 11:
            raise KeyboardInterrupt

    told.when_complete = interrupt
    hub.faults = [Fault(LAST, method="HEAD", hang=60)]
    with pytest.raises(Interrupted) as caught:
        find_model("org/name", told)
    hub.released.set()
    assert caught.value.where == "13 of 14 files are complete in the Hub's cache, and are kept"
    assert caught.value.fix == "the same command again fetches the others"
    assert unfinished(tmp_path) == []


def test_a_gated_model_needs_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("org/name")
    with pytest.raises(InputError) as caught:
        find_model("org/name")
    assert caught.value.what == "`org/name` is gated on the Hub"
    assert caught.value.fix == "accept its licence there and set HF_TOKEN"
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (find_model("org/name") / LAST).is_file()
    stored = [asked for asked in hub.asked if asked.path.startswith("/stored/")]
    assert {asked.token for asked in stored} == {None}  # another host gets no token


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused(hub: Hub, status: int) -> None:
    hub.faults = [Fault("org/name", status=status)]
    with pytest.raises(InputError) as caught:
        find_model("org/name")
    assert caught.value.what == f"the Hub refuses access to `org/name`: the server answers {status}"
    assert caught.value.fix == "set HF_TOKEN to a token that may read it"


def test_a_repository_that_there_is_not(hub: Hub) -> None:
    with pytest.raises(InputError) as caught:
        find_model("org/other")
    assert caught.value.what == "`org/other` is neither a directory nor a repository of the Hub"
    assert caught.value.fix == "check the spelling; a private repository needs HF_TOKEN"


def test_a_revision_that_there_is_not(hub: Hub) -> None:
    with pytest.raises(InputError) as caught:
        find_model("org/name@v9")
    assert caught.value.what == "`org/name` has no revision `v9` on the Hub"
    assert caught.value.fix == "give a branch, a tag or a commit of it"


def test_a_branch_a_tag_and_a_commit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    tagged = make_model(hub.folder / "org" / "name@v1.0", config={"model_type": "older"})
    commit = commit_of(tagged)
    main = find_model("org/name@main")
    assert [find_model(f"org/name@{name}") for name in ("v1.0", commit)] == [main.parent / commit] * 2
    assert main.name == commit_of(hub.folder / "org" / "name") != commit
    assert json.loads((main.parent / commit / "config.json").read_text()) == {"model_type": "older"}
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, folder in {"": main, "@main": main, "@v1.0": tagged, f"@{commit}": tagged}.items():
        assert find_model(f"org/name{name}").name in {folder.name, commit_of(folder)}
    assert hub.asked == []
    with pytest.raises(MachineError, match="neither a directory nor complete in the Hub cache"):
        find_model("org/name@v2")


def test_a_silent_hub_leaves_what_is_cached(hub: Hub, told: Told) -> None:
    folder = find_model("org/name")
    hub.faults = [Fault("org/name", status=502)]
    assert find_model("org/name", told) == folder
    assert told.said[1:] == [
        "the Hub gives no answer (the server answers 502): taking org/name from its cache"
    ]


def test_a_cache_without_all_weights_is_completed_or_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = find_model("org/name")
    (folder / LAST).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="neither a directory nor complete in the Hub cache"):
        find_model("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert (find_model("org/name") / LAST).is_file()


def test_a_model_that_the_disk_has_no_room_for_is_streamed(
    hub: Hub, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    folder = find_model("org/name", told)
    assert told.said[1:] == [
        "streaming org/name: its weights take 16.7 kB, 1.0 kB are free in the Hub's cache",
        "reading the headers of org/name: 2 shards",
    ]
    tensors = scan_checkpoint(folder).tensors
    assert (
        bytes(read_tensor(tensors["layers.2.w.weight"]).view(torch.uint8).flatten())
        == SHARDS[LAST]["layers.2.w.weight"][2]
    )
    assert all(sum(a.sent for a in hub.fetched(name)) < 17_000 for name in SHARDS)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"pytorch_model.bin": b"p"}, "weights are pickle files, such as `pytorch_model.bin`"),
        ({"adapter_model.safetensors": b"s"}, "these are the weights of an adapter, not of a model"),
        ({"model.gguf": b"g"}, "no .safetensors file here"),
        (
            {INDEX: json.dumps({"weight_map": {"a": "gone.safetensors"}})},
            "shard `gone.safetensors` is missing (listed in the index)",
        ),
    ],
    ids=["pickles", "adapter", "gguf", "shard"],
)
def test_what_cannot_be_converted_is_not_fetched(
    hub: Hub, files: dict[str, str | bytes], what: str
) -> None:
    make_model(hub.folder / "org" / "odd", {}, files=files)
    with pytest.raises(InputError) as caught:
        find_model("org/odd")
    assert caught.value.what == what
    assert str(caught.value.where).startswith("org/odd")
    assert {Path(name).name for name in hub.files} <= {"config.json", INDEX}


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/x", "a\\b", "a//b", "a\n"])
def test_a_server_that_lists_hostile_names(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    sibling = SimpleNamespace(rfilename=name, size=1)
    info = SimpleNamespace(sha=COMMIT, siblings=[sibling])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    with pytest.raises(InputError, match="a file whose name is not one inside a folder"):
        find_model("org/name")


# --- headers alone


def test_headers_alone_are_read_like_the_whole_model(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = scan_checkpoint(hub.folder / "org" / "name")
    with find_headers("org/name") as folder:
        checkpoint = scan_checkpoint(folder)
        assert [(s.spec, s.offset) for s in checkpoint.tensors.values()] == [
            (s.spec, s.offset) for s in full.tensors.values()
        ]
        assert (checkpoint.aux, checkpoint.left_out) == (full.aux, full.left_out)
        assert (checkpoint.fingerprint, checkpoint.problems) == (full.fingerprint, full.problems)
        shard = folder / LAST
        assert shard.stat().st_size == (full.path / LAST).stat().st_size
        stored = checkpoint.tensors["layers.2.w.weight"]
        assert torch.equal(read_tensor(stored), read_tensor(full.tensors["layers.2.w.weight"]))
    assert not folder.exists()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError):
        find_model("org/name")


def test_headers_of_a_model_that_is_cached_are_read_there(hub: Hub) -> None:
    folder = find_model("org/name")
    hub.asked.clear()
    with find_headers("org/name") as found:
        assert found == folder
    assert [asked.path for asked in hub.asked] == ["/api/models/org/name"]


def test_headers_are_asked_for_by_ranges(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_GUESS", 64)
    length = int.from_bytes((hub.folder / "org" / "name" / LAST).read_bytes()[:8], "little")
    hub.faults = [Fault(LAST, times=1, cut=30)]
    with find_headers("org/name") as folder:
        assert len(scan_checkpoint(folder).tensors) == 2
    spans = [asked.span for asked in hub.fetched() if asked.path.endswith(LAST)]
    assert spans == ["bytes=0-63", "bytes=30-63", f"bytes=64-{7 + length}"]
    assert sum(asked.sent for asked in hub.fetched(LAST)) == 8 + length


def test_a_server_that_ignores_ranges(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_GUESS", 64)
    hub.faults = [Fault(LAST, times=9, whole=True)]
    with pytest.raises(InputError, match="the server does not support range requests") as caught:
        find_model("hf://org/name")
    assert caught.value.where == f"hf://org/name/{LAST}"


@pytest.mark.parametrize(
    "faults",
    [[Fault(LAST, size=77)], [Fault(LAST), Fault(LAST, etag="other")]],
    ids=["size", "version"],
)
def test_answers_that_do_not_fit_together(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, faults: list[Fault]
) -> None:
    monkeypatch.setattr(mounts, "_GUESS", 64)
    hub.faults = faults
    with pytest.raises(InputError) as caught, find_headers("org/name"):
        pass
    assert caught.value.what == "the model changed while it was read"
    assert caught.value.where == f"org/name/{LAST}"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\xff" * 8 + b"{}", "header length 18446744073709551615 is over the limit"),
        (b"\x10" + b"\0" * 7 + b"{}", "header length 16 is past the end of the file (10 bytes)"),
        (b"abc", "file has 3 bytes; a safetensors file has at least 8"),
        (b"\x02" + b"\0" * 7 + b"{}rest", "bytes belong to no tensor"),
    ],
    ids=["limit", "end", "short", "rest"],
)
def test_damaged_headers_name_the_model(hub: Hub, content: bytes, what: str) -> None:
    make_model(hub.folder / "org" / "bad", {}, files={"model.safetensors": content})
    with pytest.raises(InputError) as caught, find_headers("org/bad") as folder:
        scan_checkpoint(folder)
    assert what in caught.value.what
    assert caught.value.where == "org/bad/model.safetensors"


def test_inspect_fetches_no_weights(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_GUESS", 512)
    done = run_cli("inspect", "org/name", "--json")
    assert done.code == 0
    local = run_cli("inspect", hub.folder / "org" / "name", "--json").json
    assert done.json == local | {"path": "org/name"}
    assert sum(asked.sent for name in SHARDS for asked in hub.fetched(name)) == 2 * 512
    assert done.err.splitlines() == [LOOKING, "reading the headers of org/name: 2 shards"]


# --- names and errors without a server


def offline(home: Path, model: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "quantcli", "inspect", model, *arguments],
        capture_output=True,
        text=True,
        cwd=home,
        env={**env, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
    )


def test_offline_with_an_empty_cache_is_one_clear_sentence(tmp_path: Path) -> None:
    done = offline(tmp_path, "org/name", "--json")
    where = "neither a directory nor complete in the Hub cache"
    problem = f"`org/name` is {where}, and HF_HUB_OFFLINE is set"
    fix = "fetch it where there is a network, or give a directory"
    assert done.returncode == 3
    assert done.stderr == f"{LOOKING}\nerror: {problem}\n  fix: {fix}\n"
    assert json.loads(done.stdout) == {
        "ok": False,
        "schema_version": 1,
        "error": {"what": problem, "where": None, "fix": fix},
        "exit_code": 3,
    }


def test_offline_with_a_filled_cache_works(tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = make_model(cache / "snapshots" / COMMIT, config={"model_type": "tiny"})
    blob = cache / "blobs" / "abc"
    blob.parent.mkdir()
    (snapshot / "model.safetensors").rename(blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    done = offline(tmp_path, "org/name", "--json")
    assert (done.returncode, done.stderr) == (0, LOOKING + "\n")
    account = json.loads(done.stdout)
    assert (account["path"], account["model_type"]) == (str(snapshot), "tiny")
    assert account["bytes"] == 16


@pytest.fixture
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub must not be asked."""

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)


@pytest.mark.usefixtures("nobody_asks")
@pytest.mark.parametrize(
    "model",
    [
        "name", "./org/name", "../org/name", "/org/name", "a/b/c", "", "org/", "-x/y", "a/\0", "name@x",
        "org/name@", "org/name@-x", "org/name@a b", "org@x/name",
    ],
)  # fmt: skip
def test_what_is_no_hub_id_is_a_path(model: str) -> None:
    assert find_model(model) == Path(model)


@pytest.mark.usefixtures("nobody_asks")
def test_a_directory_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "org" / "name")
    assert find_model("org/name") == Path("org/name")
    with find_headers("org/name") as folder:
        assert folder == Path("org/name")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/models/x") == tmp_path / "models" / "x"


@pytest.mark.parametrize(
    ("model", "reason"),
    [("~no-such-user-here/x", "Could not determine home"), ("x/" + "y" * 300, "File name too long")],
)
def test_names_that_no_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, reason: str
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        find_model(model)
    assert caught.value.what.startswith("not the name of a model: ")
    assert reason in caught.value.what
    assert caught.value.where == model[:200]


NOT_FETCHED = "`o/n` is not a directory here, and it cannot be fetched from the Hub"


@pytest.mark.parametrize(
    ("raised", "kind", "what", "where"),
    [
        (
            errors.HFValidationError("bad"),
            InputError,
            "`o/n` is neither a directory nor the name of a repository of the Hub",
            None,
        ),
        (
            OSError(28, "No space left on device"),
            MachineError,
            NOT_FETCHED,
            "[Errno 28] No space left on device",
        ),
        (
            ValueError("\nfirst line of https://host/secret?x " + "x" * 300 + "\nsecond"),
            MachineError,
            NOT_FETCHED,
            ("first line of the Hub " + "x" * 300)[:200],
        ),
        (RuntimeError(), MachineError, NOT_FETCHED, "RuntimeError"),
    ],
    ids=["bad-name", "disk-full", "long", "wordless"],
)
def test_what_the_library_raises_becomes_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    kind: type[QuantError],
    what: str,
    where: str | None,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(kind) as caught:
        find_model("o/n")
    assert type(caught.value) is kind
    assert (caught.value.what, caught.value.where) == (what, where)
    assert caught.value.fix


def test_a_misspelt_path_is_not_blamed_on_the_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    hub.faults = [Fault("models/lama", times=9, status=502)]
    done = run_cli("inspect", "models/lama")
    assert done.code == 2
    assert done.err.splitlines()[-3:] == [
        "error: no such model directory, and no such repository in reach",
        "  --> models/lama",
        "  fix: did you mean `llama` in models?",
    ]
