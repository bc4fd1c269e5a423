"""Files that are elsewhere: what is asked of servers, and what happens if they fail."""

from __future__ import annotations

import os
import pickle
import ssl
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from quantcli.calibration.text.dataset import TextSource, source_digest
from quantcli.checkpoint.checkpoint import must_be_unchanged, open_checkpoint
from quantcli.checkpoint.columns import Columns, strip_bytes
from quantcli.checkpoint.hub import find_model, mount
from quantcli.checkpoint.remote import ahead, mounts
from quantcli.checkpoint.remote import web as requests
from quantcli.checkpoint.remote.ahead import Reader
from quantcli.checkpoint.remote.file import RemoteFile
from quantcli.checkpoint.remote.origin import Listing, Origin, Version
from quantcli.checkpoint.tensors import read_tensor, will_read
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import Progress
from tests.builders import Tensor, make_model
from tests.hub_server import Fault, Hub, serve, used
from tests.object_server import Objects
from tests.web_server import Pages, served

FILE = "model.safetensors"


class Told(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.details: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def detail(self, text: str) -> None:
        self.details.append(text)


def drawn(*shape: int, seed: int) -> Tensor:
    random = np.random.default_rng(seed)
    return "I16", shape, random.integers(-1000, 1000, shape, np.int16).tobytes()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """org/name: matrices of 200 kB, and vectors between them."""
    tensors = {}
    for n in range(6):
        tensors[f"layers.{n}.norm.weight"] = drawn(100, seed=n)
        tensors[f"layers.{n}.w.weight"] = drawn(500, 200, seed=100 + n)
    return make_model(
        tmp_path / "served" / "org" / "name",
        {FILE: tensors},
        config={"model_type": "tiny"},
        files={"tokenizer.json": " " * 1_200_000, "tokenizer_config.json": "{}"},
    )


@pytest.fixture
def web(model: Path) -> Iterator[Hub]:
    with served(model.parents[1]) as web:
        yield web


@pytest.fixture
def told() -> Told:
    return Told()


class Gated(Origin):
    """One file, whose bytes come when they may. asked: the ranges."""

    def __init__(self, nbytes: int) -> None:
        self.content = np.random.default_rng(0).bytes(nbytes)
        self.version = Version(nbytes, "tag")
        self.asked: list[tuple[int, int]] = []
        self.open = threading.Event()

    @property
    def address(self) -> str:
        return "memory://x"

    def list(self, progress: Progress) -> Listing:
        return Listing({"x": self.version})

    def ask(self, name: str, version: Version, first: int, block: memoryview) -> None:
        self.asked.append((first, first + len(block)))
        assert self.open.wait(60)
        block[:] = self.content[first : first + len(block)]

    def want(self, reader: Reader, begin: int, end: int) -> None:
        reader.want(self, "x", self.version, begin, end)

    def read(self, reader: Reader, begin: int, end: int, bound: int = 0) -> None:
        block = bytearray(end - begin)
        reader.read(self, "x", self.version, begin, memoryview(block), bound)
        assert bytes(block) == self.content[begin:end]


def values(folder: Path) -> dict[str, list[int]]:
    tensors = open_checkpoint(folder).tensors
    return {name: read_tensor(stored).flatten().tolist() for name, stored in tensors.items()}


# --- addresses


@pytest.mark.parametrize("address", ["hf://name", "hf://a/b/c", "hf://org/name@", "hf://a b/c\x1b"])
def test_addresses_of_no_repository(address: str) -> None:
    with pytest.raises(InputError, match="not the address of a repository") as caught:
        find_model(address)
    assert "\x1b" not in str(caught.value)


# --- reading


def test_a_model_is_read_as_from_its_folder(web: Hub, model: Path, told: Told) -> None:
    folder = find_model(f"{web.address}/org/name", told)
    assert told.said == [
        f"looking for {web.address}/org/name",
        f"reading the headers of {web.address}/org/name: 1 shard",
    ]
    checkpoint = open_checkpoint(folder)
    local = open_checkpoint(model)
    assert (checkpoint.fingerprint, checkpoint.aux) == (local.fingerprint, local.aux)
    assert values(folder) == values(model)
    assert (checkpoint.path / "tokenizer.json").read_bytes() == b" " * 1_200_000
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
    assert on_disk < 200_000 < (model / FILE).stat().st_size


def test_a_file_is_read_where_its_folder_does_not_exist(web: Hub, model: Path) -> None:
    opened = mount(f"{web.address}/org/name")
    sent = pickle.dumps(open_checkpoint(opened.folder).tensors["layers.3.w.weight"])
    opened.close()
    assert not opened.folder.exists()
    stored = pickle.loads(sent)
    assert isinstance(stored.file, RemoteFile)
    expected = read_tensor(open_checkpoint(model).tensors["layers.3.w.weight"])
    assert torch.equal(read_tensor(stored), expected)


def test_what_is_announced_is_fetched_once(
    web: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "_GUESS", 1024)
    tensors = open_checkpoint(find_model(f"{web.address}/org/name")).tensors
    web.asked.clear()
    for stored in tensors.values():
        will_read(stored, 0, stored.nbytes)
    assert {n: read_tensor(s).flatten().tolist() for n, s in tensors.items()} == values(model)
    data = sum(stored.nbytes for stored in tensors.values())
    pages = 2 * 6 * ahead.PAGE  # of vectors that are announced alone
    assert data <= sum(asked.sent for asked in web.fetched(FILE)) <= data + pages


def test_short_tensors_share_a_page(web: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_GUESS", 1024)
    tensors = open_checkpoint(find_model(f"{web.address}/org/name")).tensors
    web.asked.clear()
    for name, stored in tensors.items():
        if "norm" in name:
            read_tensor(stored)
    assert len(web.fetched(FILE)) == 6  # 200 kB lie between them
    for name, stored in tensors.items():
        if "norm" in name:
            read_tensor(stored)
    assert len(web.fetched(FILE)) == 6


def test_columns_are_read_by_whole_rows(web: Hub, model: Path) -> None:
    stored = open_checkpoint(find_model(f"{web.address}/org/name")).tensors["layers.4.w.weight"]
    expected = read_tensor(open_checkpoint(model).tensors["layers.4.w.weight"]).t()
    web.asked.clear()
    with Columns(stored) as columns:
        for start in range(0, 200, 20):
            assert torch.equal(columns.columns(start, start + 20), expected[start : start + 20])
    assert sum(asked.sent for asked in web.fetched(FILE)) <= stored.nbytes + ahead.PAGE
    assert strip_bytes(stored) > strip_bytes(open_checkpoint(model).tensors["layers.4.w.weight"])


def test_other_libraries_get_whole_files(web: Hub, model: Path, tmp_path: Path) -> None:
    folder = find_model(f"{web.address}/org/name")
    (tmp_path / "text").write_text("some text")
    source = TextSource(str(tmp_path / "text"), "", 1, 8, None, True, 8)
    assert (folder / "tokenizer.json").stat().st_blocks == 0
    assert source_digest(source, folder) == source_digest(source, model)
    assert Path(folder, "tokenizer.json").read_bytes() == b" " * 1_200_000


# --- servers that fail


def test_a_cut_body_goes_on_where_it_stopped(web: Hub, model: Path, told: Told) -> None:
    folder = find_model(f"{web.address}/org/name", told)
    web.asked.clear()
    web.faults = [Fault(FILE, cut=20_000), Fault(FILE, cut=1)]
    stored = open_checkpoint(folder).tensors["layers.2.w.weight"]
    will_read(stored, 0, stored.nbytes)
    expected = read_tensor(open_checkpoint(model).tensors["layers.2.w.weight"])
    assert torch.equal(read_tensor(stored), expected)
    assert [asked.sent for asked in web.fetched(FILE)] == [20_000, 1, stored.nbytes - 20_001]
    place = stored.offset + 20_000
    assert told.details == [
        f"`{FILE}`: the connection was cut; going on at byte {place:,}",
        f"`{FILE}`: the connection was cut; going on at byte {place + 1:,}",
    ]


def test_a_busy_server_is_asked_again_after_the_time_that_it_names(
    web: Hub, model: Path, told: Told
) -> None:
    folder = find_model(f"{web.address}/org/name", told)
    web.faults = [Fault(FILE, status=503, retry_after=7), Fault(FILE, status=429), Fault(FILE, cut=0)]
    told.said.clear()
    assert values(folder) == values(model)
    assert told.said == [
        f"`{FILE}`: the server answers 503; trying again in 7 s",
        f"`{FILE}`: the server answers 429; trying again in 2 s",
        f"`{FILE}`: the connection was cut; trying again in 4 s",
    ]


@pytest.mark.parametrize(
    ("fault", "kind", "what"),
    [
        (Fault(FILE, times=9, status=500), MachineError, "cannot be read: the server answers 500"),
        (Fault(FILE, times=1000, cut=1), MachineError, "cannot be read: the connection was cut"),
        (Fault(FILE, status=403), InputError, "the server refuses access: it answers 403"),
        (Fault(FILE, status=404), InputError, "no such file on the server"),
        (Fault(FILE, whole=True), InputError, "the server does not support range requests"),
        (Fault(FILE, etag="other"), InputError, "the model changed while it was read"),
        (Fault(FILE, size=5), InputError, "the model changed while it was read"),
        (
            Fault(FILE, location="file:///etc/passwd"),
            InputError,
            "redirects to another kind of address",
        ),
        (Fault(FILE, times=9, location="/org/name/" + FILE), InputError, "redirects without end"),
    ],
    ids=["500", "cuts", "403", "404", "whole", "etag", "size", "redirect", "loop"],
)
def test_what_no_patience_helps(web: Hub, fault: Fault, kind: type[Exception], what: str) -> None:
    stored = open_checkpoint(find_model(f"{web.address}/org/name")).tensors["layers.1.w.weight"]
    web.faults = [fault]
    with pytest.raises(kind, match=what) as caught:
        read_tensor(stored)
    assert caught.value.where == f"{web.address}/org/name/{FILE}"


def test_a_change_is_noticed_while_reading_and_at_the_end(web: Hub, model: Path) -> None:
    checkpoint = open_checkpoint(find_model(f"{web.address}/org/name"))
    must_be_unchanged(checkpoint)
    with (model / FILE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    with pytest.raises(InputError, match="changed while it was read") as caught:
        read_tensor(checkpoint.tensors["layers.1.w.weight"])
    assert caught.value.where == f"{web.address}/org/name/{FILE}"
    with pytest.raises(InputError, match="changed while it was read"):
        must_be_unchanged(checkpoint)


def test_stamps_are_those_of_the_content(objects: Objects, model: Path) -> None:
    address = objects.bucket("stamps") + "/m"
    objects.upload(model, "stamps", "m")
    first, second = (open_checkpoint(find_model(address)).stamps for _ in range(2))
    assert first == second
    objects.client.put_object(Bucket="stamps", Key="m/tokenizer_config.json", Body=b"[]")
    third = open_checkpoint(find_model(address)).stamps
    assert [name for name in first if first[name] != third[name]] == ["tokenizer_config.json"]


def test_a_server_that_names_no_files(model: Path) -> None:
    with served(model.parents[1], listed=False, tagged=False) as web:
        told = Told()
        checkpoint = open_checkpoint(find_model(f"{web.address}/org/name", told))
        assert len(checkpoint.tensors) == 12
        assert "so quantcli asked for the usual file names" in checkpoint.notes[0]
        assert "the server gives no strong ETag for 4 files" in told.details[0]
        must_be_unchanged(checkpoint)
        os.utime(model / FILE, (1, 1))
        with pytest.raises(InputError, match="changed while it was read"):
            must_be_unchanged(checkpoint)


def certificate(folder: Path) -> tuple[Path, Path]:
    """The files of a certificate for this machine, and of its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate", folder / "key"
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    files[0].write_bytes(made.public_bytes(form[0]))
    files[1].write_bytes(key.private_bytes(*form))
    return files


def test_certificates_are_checked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(trusted, key)
    with serve(model.parents[1], handler=Pages, tls=tls) as hub:
        address = hub.store.replace("http:", "https:") + "/org/name"
        for bundle, what in (
            (key, "certificates cannot be read"),
            (tmp_path / "none", "cannot be read"),
        ):
            requests._tls.cache_clear()
            monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
            with pytest.raises(MachineError, match=what):
                find_model(address)
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(MachineError, match="the certificate of the server is not trusted"):
            find_model(address)
        requests._tls.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        assert values(find_model(address)) == values(model)
    requests._tls.cache_clear()


def test_the_token_goes_to_the_hub_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with used(model.parents[1], tmp_path / "cache") as hub:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        assert values(find_model("hf://org/name")) == values(model)
        stored = [asked.token for asked in hub.asked if asked.path.startswith("/stored/")]
        others = [asked.token for asked in hub.asked if "/org/name" in asked.path]
    assert stored
    assert set(stored) == {None}
    assert set(others) == {"Bearer hf_secret"}


def test_an_address_that_has_expired_is_asked_for_again(model: Path, tmp_path: Path) -> None:
    with used(model.parents[1], tmp_path / "cache") as hub:
        folder = find_model("hf://org/name")
        hub.asked.clear()
        hub.faults = [Fault(FILE, status=403)]
        assert values(folder) == values(model)
        statuses = [asked.status for asked in hub.asked]
        assert statuses.count(403) == 1
        assert 302 in statuses[statuses.index(403) :]


@pytest.mark.parametrize("key", ["m/../../x", "m//x", "m/a\x1b[2J"])
def test_names_that_lead_out_of_the_folder(
    monkeypatch: pytest.MonkeyPatch, key: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(mounts.tempfile, "tempdir", str(tmp_path))

    class Hostile(Origin):
        @property
        def address(self) -> str:
            return "s3://bucket/m"

        def list(self, progress: Progress) -> Listing:
            return Listing({key.removeprefix("m/"): Version(1, "")})

        def ask(self, name: str, version: Version, first: int, block: memoryview) -> None:
            raise AssertionError("nothing is asked for")

    with pytest.raises(InputError, match="not one inside a folder") as caught:
        mounts.Mount(Hostile(), Hostile().list(Progress()), Progress())
    assert "\x1b" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# --- blocks in memory

K, M = 2**10, 2**20


def test_neighbours_are_fetched_together() -> None:
    origin, reader = Gated(20 * M), Reader(connections=1)
    origin.want(reader, 0, 200 * K)  # a thread begins with it
    wait_for(lambda: origin.asked)
    for begin in range(200 * K, 3 * M, 100 * K):  # a matrix, and a scale of it
        origin.want(reader, begin, begin + 99 * K)
        origin.want(reader, begin + 99 * K, begin + 100 * K)
    origin.open.set()
    for begin in range(0, 3 * M - 100 * K, 50 * K):
        origin.read(reader, begin, begin + 50 * K)
    assert origin.asked == [(0, 200 * K), (200 * K, 3100 * K)]


def test_memory_is_limited_and_used_again() -> None:
    origin, reader = Gated(40 * M), Reader(limit=9 * M, connections=3)
    origin.want(reader, 0, 40 * M)
    wait_for(lambda: len(origin.asked) == 2)
    origin.open.set()
    for begin in range(0, 40 * M, M):
        assert reader.nbytes <= 9 * M
        origin.read(reader, begin, begin + M)
    assert sorted(origin.asked) == [(begin, begin + 4 * M) for begin in range(0, 40 * M, 4 * M)]
    assert reader.nbytes == 0


def test_small_pieces_take_no_more_memory_than_their_bytes() -> None:
    origin, reader = Gated(40 * M), Reader(limit=9 * M)
    origin.open.set()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for begin in range(0, 40 * M, M):
            origin.want(reader, begin, begin + 300 * K)
        wait_for(lambda: len(origin.asked) == 9 * M // (300 * K))
        assert tracemalloc.get_traced_memory()[0] - before < 10 * M
    finally:
        tracemalloc.stop()


def test_blocks_that_nobody_reads_make_room_in_the_end() -> None:
    origin, reader = Gated(80 * M), Reader(limit=9 * M)
    origin.open.set()
    origin.want(reader, 0, 8 * M)
    wait_for(lambda: len(origin.asked) == 2)
    for begin in range(8 * M, 48 * M, 4 * M):
        origin.read(reader, begin, begin + 4 * M)
    origin.want(reader, 60 * M, 64 * M)
    wait_for(lambda: (60 * M, 64 * M) in origin.asked)


def test_a_run_of_reads_is_fetched_ahead_up_to_its_bound() -> None:
    origin, reader = Gated(20 * M), Reader()
    origin.open.set()
    for begin in range(0, 5 * M, 512 * K):
        origin.read(reader, begin, begin + 512 * K, bound=5 * M)
    assert max(end for _, end in origin.asked) == 5 * M
    assert sum(end - begin for begin, end in origin.asked) == 5 * M
    assert len(origin.asked) < 8  # of 10 reads


def test_an_error_of_a_block_reaches_its_reader_and_no_later_one() -> None:
    class Refusing(Gated):
        def ask(self, name: str, version: Version, first: int, block: memoryview) -> None:
            if not self.asked:
                self.asked.append((first, first))
                raise self.changed(name)
            super().ask(name, version, first, block)

    origin, reader = Refusing(M), Reader()
    origin.open.set()
    origin.want(reader, 0, M)
    with pytest.raises(InputError, match="changed while it was read"):
        origin.read(reader, 0, M)
    origin.read(reader, 0, M)


def wait_for(condition: Callable[[], object]) -> None:
    """Until a condition holds, for as long as it takes."""
    while not condition():
        time.sleep(0.001)


def test_what_arrives_after_an_error_is_not_kept(
    web: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was under way when another one failed."""
    fetched, late, written = threading.Event(), threading.Event(), threading.Event()
    whole, write = mounts.Mount._whole, mounts.Mount._write

    def failing(self: mounts.Mount, name: str) -> None:
        assert name != "y.txt" or fetched.wait(60)
        whole(self, name)

    def held(self: mounts.Mount, name: str, content: bytes) -> None:
        if name == "z.txt":
            fetched.set()
            assert late.wait(60)
            write(self, name, content)
            written.set()
        else:
            write(self, name, content)

    for name in ("y.txt", "z.txt"):
        (model / name).write_text("text")
    monkeypatch.setattr(mounts.Mount, "_whole", failing)
    monkeypatch.setattr(mounts.Mount, "_write", held)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(mounts.tempfile, "tempdir", str(temporary))
    web.faults = [Fault("y.txt", status=404)]
    with pytest.raises(InputError, match="no such file"):
        find_model(f"{web.address}/org/name")
    late.set()
    assert written.wait(60)
    assert [*temporary.iterdir()] == []
