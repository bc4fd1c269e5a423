"""Checkpoints in object storage: the bytes of a folder, and nothing that looks done before it is."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantcli
from quantcli.checkpoint.files import INDEX, JOURNAL, MANIFEST, SIGNATURE
from quantcli.checkpoint.remote import reading
from quantcli.convert.destination import Start
from quantcli.convert.objects import bucket as buckets
from quantcli.convert.objects.bucket import Bucket
from quantcli.convert.objects.draft import ObjectDraft
from quantcli.convert.objects.place import object_place
from quantcli.core.errors import MachineError
from tests.builders import make_model
from tests.e2e.conftest import CONFIG, RECIPE, Result, llama, run_cli, snapshot
from tests.object_faults import CUT, LOST, between
from tests.object_server import Objects
from tests.signing import write_key

COLUMNS = """\
target: gptq
rules: [{match: "*_proj", scheme: {name: w4a16, group_size: 32}}]
"""
BUCKET = "outputs"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, tensors of odd sizes and of none, a card and a file in a folder."""
    tensors = llama(layers=2, side=128)
    tensors |= {
        "odd.bytes": ("U8", (7,), bytes(range(7))),
        "nothing": ("BF16", (0, 4), b""),
        "one": ("F32", (), np.float32(1).tobytes()),
    }
    files = {"tokenizer.json": '{"version": "1.0"}', "assets/ein Bild [1] ü%20~.png": "png"}
    folder = tmp_path_factory.mktemp("object-output") / "model"
    return make_model(folder, {"model.safetensors": tensors}, config=CONFIG, files=files)


class Place:
    """A folder in a bucket, and a recipe for it."""

    def __init__(self, objects: Objects, model: Path, recipe: Path) -> None:
        self.objects, self.model, self.recipe = objects, model, recipe
        self.bucket, self.prefix = BUCKET, f"team/out-{next(_numbers)}"
        recipe.write_text(RECIPE + "max_shard: 100KB\n")

    @property
    def address(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def run(self, *more: object) -> Result:
        return run_cli("quantize", self.recipe, "--model", self.model, "--out", self.address, *more)

    def content(self) -> dict[str, str]:
        """What is there: name -> hash, as in a snapshot of a folder."""
        names = self.objects.names(self.bucket, f"{self.prefix}/")
        return {
            name.removeprefix(f"{self.prefix}/"): hashlib.sha256(
                self.objects.content(self.bucket, name)
            ).hexdigest()
            for name in names
        }

    def uploads(self) -> list[str]:
        """Uploads that nobody has completed or given up."""
        answer = self.objects.client.list_multipart_uploads(Bucket=self.bucket)
        return [upload["Key"] for upload in answer.get("Uploads", [])]

    def put(self, name: str, content: bytes) -> None:
        self.objects.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=content)


@pytest.fixture(scope="module")
def bucket(objects: Objects) -> Objects:
    objects.bucket(BUCKET)
    return objects


@pytest.fixture
def place(bucket: Objects, model: Path, tmp_path: Path) -> Place:
    return Place(bucket, model, tmp_path / "recipe.yaml")


def local(place: Place, folder: Path) -> dict[str, str]:
    """The files of the same conversion to a folder."""
    done = run_cli("quantize", place.recipe, "--model", place.model, "--out", folder)
    assert done.code == 0, done.err
    return {name: digest for name, digest in snapshot(folder).items() if digest != "folder"}


@pytest.fixture(scope="module")
def wanted(bucket: Objects, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("wanted")
    return local(Place(bucket, model, root / "recipe.yaml"), root / "out")


@pytest.mark.parametrize("recipe", [RECIPE + "max_shard: 100KB\n", COLUMNS], ids=["rows", "columns"])
def test_the_bytes_are_those_of_a_folder(place: Place, tmp_path: Path, recipe: str) -> None:
    place.recipe.write_text(recipe)
    files = local(place, tmp_path / "out")
    done = place.run("--json")
    assert done.code == 0, done.err
    assert place.content() == files
    assert place.uploads() == []
    document = done.json
    assert document["out"] == document["plan"]["out"] == place.address
    assert (document["plan"]["disk_needed"], document["plan"]["disk_free"]) == (0, None)
    checked = run_cli("verify", place.address, "--full", "--against", place.model)
    assert checked.code == 0, checked.out + checked.err


def interrupted(place: Place, shards: int, monkeypatch: pytest.MonkeyPatch) -> Result:
    """A run that is interrupted when this many shards are in the journal."""
    record = ObjectDraft.record

    def stopping(self: ObjectDraft, *args: Any) -> None:
        if self.done == shards:
            raise KeyboardInterrupt
        record(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectDraft, "record", stopping)
        stopped = place.run("--workers", 1)
    assert stopped.code == 130, stopped.err
    return stopped


@pytest.mark.parametrize("shards", [0, 2])
def test_an_interrupted_run_is_continued(
    place: Place, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    stopped = interrupted(place, shards, monkeypatch)
    assert f"{shards} of 5 shards" in stopped.err
    there = place.content()
    assert JOURNAL in there
    assert not {MANIFEST, INDEX, "config.json"} & there.keys()
    assert place.uploads() == []
    looked = run_cli("inspect", place.address)
    assert (looked.code, "is not finished" in looked.err) == (2, True), looked.err
    again = place.run("--json")
    assert again.code == 0, again.err
    assert again.json["shards_reused"] == shards
    assert place.content() == wanted


def test_another_recipe_does_not_continue(
    place: Place, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(place, 1, monkeypatch)
    first = place.recipe.read_text()
    place.recipe.write_text(first.replace("100KB", "60KB"))
    refused = place.run()
    assert refused.code == 2
    assert "unfinished work of another run: the recipe or version has changed" in refused.err
    place.recipe.write_text(first)
    assert place.run("--fresh").code == 0
    assert place.content() == wanted


def test_an_object_that_changed_is_written_again(
    place: Place, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(place, 2, monkeypatch)
    shard = next(name for name in place.content() if name.endswith(".safetensors"))
    place.put(shard, b"not what was uploaded")
    again = place.run("--json")
    assert again.json["shards_reused"] == 1
    assert place.content() == wanted


def test_an_object_that_someone_changes_at_the_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = ObjectDraft.verified

    def overwrite(self: ObjectDraft) -> Any:
        result = verified(self)
        place.put("tokenizer.json", b"{}")
        return result

    monkeypatch.setattr(ObjectDraft, "verified", overwrite)
    refused = place.run()
    assert refused.code == 3
    assert f"someone else has changed it\n  --> {place.address}/tokenizer.json" in refused.err
    assert MANIFEST not in place.content()


def test_the_later_of_two_runs_wins(
    place: Place, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first one writes, a second run ends; the first one sees that and stops."""
    later: list[Any] = []
    record = ObjectDraft.record

    def interfere(self: ObjectDraft, *args: Any) -> None:
        record(self, *args)
        if not later:
            later.append(None)
            later[0] = quantcli.quantize(place.recipe, model=place.model, out=place.address)

    monkeypatch.setattr(ObjectDraft, "record", interfere)
    first = place.run("--workers", 1)
    assert first.code == 3
    assert "another run is writing here" in first.err
    assert (later[0].shards_reused, later[0].out) == (1, place.address)
    assert {name: there for name, there in place.content().items() if name != JOURNAL} == wanted


def test_a_run_that_was_overtaken_deletes_nothing(place: Place) -> None:
    start = Start({"plan": "a", "checksum": True, "source": {}}, ["a.txt"])
    first, second = (object_place(place.address).begin(start) for _ in range(2))
    second.put("a.txt", b"text", checksum=True)
    with pytest.raises(MachineError, match="another run is writing here"):
        first.discard()
    assert place.content().keys() == {JOURNAL, "a.txt"}
    second.discard()
    assert place.content() == {}


def test_force_replaces_a_checkpoint(place: Place, wanted: dict[str, str]) -> None:
    first = place.recipe.read_text()
    place.recipe.write_text(first.replace("100KB", "60KB"))
    assert place.run().code == 0
    smaller = place.content()
    assert len(smaller) > len(wanted)
    place.recipe.write_text(first)
    refused = place.run()
    assert (refused.code, place.content()) == (2, smaller)
    assert "error: output exists" in refused.err
    planned = place.run("--plan", "--force")
    assert f"replaces     {place.address}, which is gone as soon as" in planned.out
    assert place.content() == smaller
    assert place.run("--force").code == 0
    assert place.content() == wanted


@pytest.mark.parametrize("option", [(), ("--force",)], ids=["plain", "force"])
def test_objects_of_others_are_kept(place: Place, option: tuple[str, ...]) -> None:
    place.put("notes.txt", b"mine")
    refused = place.run(*option)
    assert refused.code == 2
    assert "objects are there that quantcli did not write, such as `notes.txt`" in refused.err
    assert place.content().keys() == {"notes.txt"}


def test_what_is_refused(place: Place) -> None:
    for address, words in {
        "s3://outputs": "a folder of its own in the bucket",
        "s3://no-such-bucket/a": "bucket `no-such-bucket` does not exist",
        "ftp://outputs/a": "nothing can be written to ftp://",
        "s3://key:secret@outputs/a": "must not hold a key",
    }.items():
        refused = run_cli("quantize", place.recipe, "--model", place.model, "--out", address)
        assert (refused.code, words in refused.err) == (2, True), refused.err
        assert "secret@" not in refused.err
    assert "parts are written to folders" in place.run("--part", "1/2").err


def test_a_store_without_conditional_requests(
    place: Place, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(self: Bucket, name: str, content: bytes, known: object) -> None:
        raise buckets.CannotCompareError

    monkeypatch.setattr(Bucket, "replace", cannot)
    done = place.run()
    assert (done.code, place.content()) == (0, wanted)
    assert "note: s3:// of this server has no conditional requests" in done.err


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads of a shard take several parts; the server takes small ones."""
    monkeypatch.setattr(buckets, "part_nbytes", lambda nbytes: 32_768)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1024)


@pytest.mark.usefixtures("small_parts")
def test_requests_that_fail_are_repeated(
    place: Place, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fifth request is cut, refused for a while, or loses its answer."""
    monkeypatch.setattr(reading, "sleep", lambda _: None)
    place.bucket = "shaky-outputs"
    place.objects.bucket(place.bucket)
    kinds = itertools.cycle([CUT, 503, LOST])

    def fault(method: str, path: str) -> int | None:
        kind = next(kinds) if len(proxy.asked) % 5 == 4 else None
        # this server has forgotten a completed upload; that of Amazon completes it twice
        return 503 if kind == LOST and method == "POST" else kind

    with between(place.objects) as proxy:
        proxy.fault = fault
        done = place.run()
    assert done.code == 0, done.err
    assert all(proxy.failures(kind) >= 2 for kind in (CUT, 503, LOST))
    assert sum("partNumber" in path for _, path, _ in proxy.asked) > 6
    assert place.content() == wanted


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "refuses access (the server answers 403)"),
        (400, "credentials for object storage have expired"),
    ],
    ids=["refused", "expired"],
)
def test_a_store_that_refuses(place: Place, status: int, words: str) -> None:
    place.bucket = f"refusing-{status}"
    place.objects.bucket(place.bucket)
    with between(place.objects) as proxy:
        proxy.fault = lambda method, path: status if "partNumber=2" in path else None
        stopped = place.run()
    assert stopped.code == 2, stopped.err
    assert words in stopped.err
    assert "secret-of-tests" not in stopped.err
    assert place.uploads() == []
    assert not {MANIFEST, INDEX, "config.json"} & place.content().keys()


@pytest.mark.usefixtures("small_parts")
def test_credentials_that_end_cost_no_work(place: Place, tmp_path: Path) -> None:
    """`pack` deletes its draft if a weight is refused, but not for this."""
    local(place, tmp_path / "out")
    place.bucket = "expiring"
    place.objects.bucket(place.bucket)
    with between(place.objects) as proxy:
        proxy.fault = lambda method, path: 400 if "partNumber=2" in path else None
        to = ("--target", "compressed-tensors", "--out", place.address)
        stopped = run_cli("pack", tmp_path / "out", *to)
    assert "credentials for object storage have expired" in stopped.err
    assert JOURNAL in place.content()


def test_parts_are_joined_in_object_storage(
    place: Place, wanted: dict[str, str], tmp_path: Path
) -> None:
    for number in (1, 2):
        out = ("--out", tmp_path / "out", "--part", f"{number}/2")
        assert run_cli("quantize", place.recipe, "--model", place.model, *out).code == 0
    parts = [tmp_path / f"out.part-{number}-of-2" for number in (1, 2)]
    joined = run_cli("pack", "--merge", *parts, "--out", place.address, "--json")
    assert joined.code == 0, joined.err
    assert joined.json["plan"]["linked"] is False
    assert place.content() == wanted


def test_the_journal_holds_no_secret(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(place, 1, monkeypatch)
    text = place.objects.content(place.bucket, f"{place.prefix}/{JOURNAL}").decode()
    first, shard = map(json.loads, text.splitlines())
    assert first.keys() == {"run", "files", "plan", "checksum", "source"}
    assert shard["entry"].keys() == {"bytes", "sha256", "blake3"}
    assert "secret-of-tests" not in text


def test_a_release_into_a_bucket(place: Place, tmp_path: Path) -> None:
    """Several checkpoints side by side: the bytes of folders; those that are done are recognised."""
    release = tmp_path / "release.yaml"
    release.write_text(f"checkpoints: [{{recipe: {place.recipe}, name: int8}}, vllm_fp8_dynamic]\n")
    words = ("release", release, "--model", place.model, "--json")
    local = run_cli(*words, "--out", tmp_path / "local")
    assert local.code == 0, local.err
    for status in ("written", "done"):
        result = run_cli(*words, "--out", place.address)
        assert result.code == 0, result.err
        assert {c["status"] for c in result.json["checkpoints"]} == {status}
    expected = {name: h for name, h in snapshot(tmp_path / "local").items() if h != "folder"}
    assert place.content() == expected
    assert place.uploads() == []
    place.objects.client.delete_object(
        Bucket=place.bucket, Key=f"{place.prefix}/int8/model-00001-of-00005.safetensors"
    )
    damaged = run_cli(*words, "--out", place.address)
    assert damaged.code == 2
    assert "holds something else, or a damaged checkpoint" in damaged.err.replace("\n  ", " ")


def test_a_signature_comes_before_the_manifest_and_goes_with_its_checkpoint(place, tmp_path):
    write_key(tmp_path / "key.pem")
    assert place.run("--sign", tmp_path / "key.pem").code == 0
    assert SIGNATURE in place.content()
    verify = ["verify", place.address, "--identity", tmp_path / "key.pub", "--json"]
    result = run_cli(*verify)
    assert result.code == 0
    counts = {check["name"]: check["checked"] for check in result.json["checks"]}
    assert counts["signature"] == len(place.content()) - 1
    assert place.run("--force").code == 0
    assert SIGNATURE not in place.content()
