"""A server on this machine that speaks the Hub's API, as huggingface_hub asks it.

It serves a folder of models, ORG/NAME, and other revisions of them, ORG/NAME@REVISION. By hand:

    python -m tests.hub_server FOLDER --port 8000
    HF_ENDPOINT=http://127.0.0.1:8000 quantcli inspect ORG/NAME

Large files are answered as on the Hub: the first address redirects to another host, and has the size
and the hash of the file. `Hub.faults` makes it fail on purpose, `Hub.asked` is what it was asked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

from quantcli.checkpoint.hub import download
from quantcli.checkpoint.remote import reading

HOST = "127.0.0.1"
STORE = "localhost"  # the same machine under another name: where large files are
LARGE = (".safetensors", ".bin", ".gguf", ".pth")
_REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
_API = re.compile(
    rf"/api/models/{_REPOSITORY}(/(?P<what>revision|tree)/(?P<revision>[^/]+))?(?P<below>/.*)?"
)
_FILE = re.compile(rf"/{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_STORED = re.compile(r"/stored/(?P<digest>[0-9a-f]{64})")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Fault:
    """What goes wrong with requests whose path ends with `path`, `times` times.

    cut: bytes of the body after which the connection ends. status: an answer in place of the file.
    hang: seconds without an answer. whole: whether a range is ignored. etag, size: false ones.
    location: a redirect to it.
    """

    path: str
    times: int = 1
    method: str = "GET"
    cut: int | None = None
    status: int | None = None
    retry_after: int | None = None
    hang: float = 0.0
    whole: bool = False
    etag: str | None = None
    size: int | None = None
    location: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Those of the answer in place of the file."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


@dataclass(frozen=True)
class Asked:
    """One request, and what was sent."""

    method: str
    path: str
    span: str | None  # the header Range
    token: str | None
    status: int
    sent: int  # bytes of the body


@dataclass
class Hub:
    """A running server."""

    folder: Path
    address: str = ""
    store: str = ""  # the address of large files
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    gated: set[str] = field(default_factory=set)  # repositories whose files need a token
    released: threading.Event = field(default_factory=threading.Event)  # ends what hangs
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def fetched(self, name: str = "") -> list[Asked]:
        """Answers that carried bytes of a file of that name; of any file if none is given."""
        return [a for a in self.asked if a.method == "GET" and a.sent and a.path.endswith(name)]

    @property
    def files(self) -> set[str]:
        """Names of the files of which bytes were sent."""
        return {a.path for a in self.fetched() if not a.path.startswith("/api/")}

    def fault(self, method: str, path: str) -> Fault | None:
        """The first fault of a request, which is used up by one."""
        with self._mutex:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and path.endswith(fault.path):
                    fault.times -= 1
                    return fault
        return None

    def note(self, asked: Asked) -> None:
        """Keep a request."""
        with self._mutex:
            self.asked.append(asked)

    def root(self, repository: str, revision: str) -> Path | None:
        """The folder of a revision; None if there is none."""
        if ".." in repository.split("/") or not (self.folder / repository).is_dir():
            return None
        places = [self.folder / repository]
        places += sorted(places[0].parent.glob(f"{places[0].name}@*"))
        names = {place.name.partition("@")[2] or "main": place for place in places}
        names |= {commit_of(place): place for place in places}
        return names.get(revision)


@cache
def sha256_of(path: Path, nbytes: int, mtime: int) -> str:
    """The hash of a file that has a size and a time, by which it is remembered."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def etag_of(path: Path) -> str:
    """The hash by which the Hub knows a file: git's of a small one, sha256 of a large one."""
    status = path.stat()
    if path.name.endswith(LARGE):
        return sha256_of(path, status.st_size, status.st_mtime_ns)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def files_of(root: Path) -> list[str]:
    """The files of a revision, by name."""
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def commit_of(root: Path) -> str:
    """The commit of a revision: a hash of its files."""
    listed = json.dumps({name: etag_of(root / name) for name in files_of(root)})
    return hashlib.sha1(listed.encode(), usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer in two pieces waits 40 ms for the second
    kind = Hub  # of server
    hub: Hub
    _path: str  # of the request; that of a stored file ends with its name

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: `Hub.asked` has it."""

    def _answer(self) -> None:
        path = self._path = urlsplit(self.path).path
        stored = self._find(match["digest"]) if (match := _STORED.fullmatch(path)) else None
        if stored:
            self._path += f"/{stored.name}"
        redirected = _FILE.fullmatch(path) and path.endswith(LARGE) and self.command == "GET"
        fault = (None if redirected else self.hub.fault(self.command, self._path)) or Fault("")
        if fault.hang:
            self.hub.released.wait(fault.hang)
            self.close_connection = True
        elif fault.status:
            self._send(fault.status, b"try again later", fault.headers)
        elif stored:
            self._send_file(stored, {"ETag": f'"{etag_of(stored)}"'}, fault)
        elif match := _API.fullmatch(path):
            self._api(match["repository"], unquote(match["revision"] or "main"), match["what"])
        elif match := _FILE.fullmatch(path):
            self._file(match["repository"], unquote(match["revision"]), unquote(match["file"]), fault)
        else:
            self._send(404, b"no such address")

    def _find(self, digest: str) -> Path | None:
        """The large file with that hash."""
        large = (path for path in self.hub.folder.rglob("*") if path.name.endswith(LARGE))
        return next((path for path in large if etag_of(path) == digest), None)

    def _api(self, repository: str, revision: str, what: str | None) -> None:
        root = self._root(repository, revision)
        if root is None:
            return
        entries = [self._entry(root, name) for name in files_of(root)]
        if what == "tree":
            document: object = entries
        else:
            siblings = [
                {"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]}
                | ({"lfs": {**e["lfs"], "sha256": e["lfs"]["oid"]}} if "lfs" in e else {})
                for e in entries
            ]
            document = {
                "id": repository, "sha": commit_of(root), "siblings": siblings,
                "gated": "manual" if repository in self.hub.gated else False,
            }  # fmt: skip
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _entry(self, root: Path, name: str) -> dict[str, Any]:
        path = root / name
        entry = {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag_of(path)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": etag_of(path), "size": entry["size"], "pointerSize": 134}
            entry["oid"] = etag_of(path)[:40]
        return entry

    def _root(self, repository: str, revision: str) -> Path | None:
        """The folder of a revision; None after an answer that there is none."""
        if not (self.hub.folder / repository).is_dir():
            self._refuse(404, "RepoNotFound", "Repository not found")
            return None
        root = self.hub.root(repository, revision)
        if root is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return root

    def _file(self, repository: str, revision: str, name: str, fault: Fault) -> None:
        root = self._root(repository, revision)
        if root is None:
            return
        if repository in self.hub.gated and not self.headers.get("Authorization"):
            self._refuse(401, "GatedRepo", f"Access to model {repository} is restricted.")
            return
        if name not in files_of(root):
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit_of(root)})
            return
        path, etag = root / name, etag_of(root / name)
        headers = {"X-Repo-Commit": commit_of(root), "ETag": f'"{etag}"'}
        if not name.endswith(LARGE):
            self._send_file(path, headers, fault)
            return
        headers |= {
            "X-Linked-ETag": f'"{etag}"',
            "X-Linked-Size": str(path.stat().st_size),
            "Location": f"{self.hub.store}/stored/{etag}?name={quote(name)}",
        }
        self._send(302, b"", headers)

    def _send_file(self, path: Path, headers: dict[str, str], fault: Fault) -> None:
        size, first, status = path.stat().st_size, 0, 200
        last = size - 1
        if fault.etag:
            headers["ETag"] = f'"{fault.etag}"'
        span = _RANGE.fullmatch(self.headers.get("Range", ""))
        if span and not fault.whole:
            first, status = int(span[1]), 206
            last = min(last, int(span[2]) if span[2] else last)
            if first >= size:
                self._send(416, b"", {"Content-Range": f"bytes */{size}"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{fault.size or size}"
        with path.open("rb") as file:
            file.seek(first)
            self._send(status, file.read(last + 1 - first), headers, fault.cut)

    def _refuse(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        error = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
        self._send(status, json.dumps({"error": message}).encode(), error)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        sent = b"" if self.command == "HEAD" else body if cut is None else body[:cut]
        # before the answer: who has it may look at once
        self.hub.note(
            Asked(
                self.command, self._path, self.headers.get("Range"), self.headers.get("Authorization"),
                status, len(sent),
            )
        )  # fmt: skip
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        try:
            self.wfile.write(sent)
            self.wfile.flush()
        except OSError:  # who asked has gone
            self.close_connection = True
        if cut is not None:
            self.close_connection = True


@contextmanager
def serve(
    folder: Path,
    port: int = 0,
    handler: type[Handler] = Handler,
    tls: ssl.SSLContext | None = None,
) -> Iterator[Hub]:
    """A server of a folder of models, at a free port unless one is given."""
    hub = handler.kind(folder)
    server = ThreadingHTTPServer((HOST, port), type("Own", (handler,), {"hub": hub}))
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    hub.address, hub.store = (f"http://{host}:{server.server_port}" for host in (HOST, STORE))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def used(folder: Path, cache: Path, handler: type[Handler] = Handler) -> Iterator[Any]:
    """A server that huggingface_hub asks in this process, without its waits; its cache is `cache`."""
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    swift = SimpleNamespace(sleep=lambda _: None, time=time.time)
    with serve(folder, handler=handler) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.delenv("HF_TOKEN", raising=False)
        for module in (file_download, _http, download):
            patch.setattr(module, "time", swift)
        patch.setattr(reading, "sleep", lambda _: None)
        try:
            yield hub
        finally:
            huggingface_hub.close_session()


def by_hand(about: str, what: str, handler: type[Handler] = Handler) -> None:
    """Serve a folder until Ctrl-C. about: for --help. what: to do with the address."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=form)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--gated", action="append", default=[], metavar="ORG/NAME")
    arguments = parser.parse_args()
    with serve(arguments.folder.resolve(), arguments.port, handler) as hub:
        hub.gated.update(arguments.gated)
        print(f"serving {arguments.folder}: {what}{hub.address}", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    by_hand(__doc__, "export HF_ENDPOINT=")
