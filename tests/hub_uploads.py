"""A stand-in for the Hub that takes uploads: what huggingface_hub commits, it serves.

It answers as the Hub does without its own store of chunks (HF_HUB_DISABLE_XET): a large file is
announced by its hash, put whole or in parts, verified, and named by a commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.hub_server import LARGE, Handler, Hub, commit_of, files_of, used

FIRST = ".first"  # the revision that a new repository begins with
ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
TOKEN = "hf_secret"
_REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
_ASKED = re.compile(
    rf"/api/models/{_REPOSITORY}/(?P<what>refs|commits|auth-check|preupload|commit|branch)"
    r"(/(?P<rest>[^/]+))?"
)
_BATCH = re.compile(rf"/{_REPOSITORY}\.git/info/lfs/objects/batch")


@dataclass(frozen=True)
class Commit:
    """One commit, and the files of the branch after it."""

    branch: str
    title: str
    files: tuple[str, ...]


@dataclass
class Shelf(Hub):
    """A running server that takes uploads.

    rights:     what each organisation lets the token do, in place of "write".
    role:       of the token itself.
    part_bytes: larger files are put in parts of that size.
    """

    commits: list[Commit] = field(default_factory=list)
    private: set[str] = field(default_factory=set)  # repositories that were created as private
    tags: list[str] = field(default_factory=list)
    rights: dict[str, str] = field(default_factory=dict)
    role: str = "write"
    name: str = "org"  # of the user
    part_bytes: int | None = None
    most_commits: float = float("inf")  # further ones fail
    ignored: str = ""  # a file that the repository's .gitignore leaves out
    puts: list[str] = field(default_factory=list)  # hashes of the files that were put whole
    commits_one_by_one: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def uploads(folder: Path, cache: Path) -> Iterator[Shelf]:
    """A server that huggingface_hub asks in this process, as somebody who may write to `org`."""
    with used(folder, cache, handler=Uploads) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        yield hub


class Uploads(Handler):
    """Takes uploads of everybody with a token."""

    kind = Shelf
    hub: Shelf

    def do_GET(self) -> None:
        path = self._path = urlsplit(self.path).path
        if path == "/api/whoami-v2":
            self._upload(b"")
        elif match := _ASKED.fullmatch(path.removesuffix("/write")):
            if self._root(match["repository"], "main"):
                self._upload(b"")
        else:
            super().do_GET()

    def do_PUT(self) -> None:
        self._upload(self._body())

    def do_POST(self) -> None:
        self._upload(self._body())

    def _body(self) -> bytes:
        if (length := self.headers["Content-Length"]) is not None:
            return self.rfile.read(int(length))
        pieces = []  # a file of which the client does not know the size
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _upload(self, body: bytes) -> None:
        """Answer, unless a fault is to happen. One without a status is an answer that gets lost."""
        path = self._path = urlsplit(self.path).path
        fault = self.hub.fault(self.command, path)
        if fault is not None and fault.status:
            self._send(fault.status, b"not now", fault.headers)
            return
        if not path.startswith("/stored") and self.headers.get("Authorization") is None:
            self._refuse(401, "Unauthorized", "Invalid credentials")
            return
        with self.hub.commits_one_by_one:
            try:
                status, document, headers = self._outcome(path, body)
            except _Refused as refused:
                status, document, headers = refused.status, {"error": str(refused)}, {}
                headers["X-Error-Message"] = str(refused)
        cut = None if fault is None else 0
        self._send(
            status, json.dumps(document).encode(), {"Content-Type": "application/json", **headers}, cut
        )

    def _outcome(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        if path == "/api/whoami-v2":
            organisations = [{"name": n, "roleInOrg": r} for n, r in self.hub.rights.items()]
            token = {"accessToken": {"role": self.hub.role}}
            return 200, {"name": self.hub.name, "orgs": organisations, "auth": token}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}, {}
        if _BATCH.fullmatch(path):
            return 200, {"transfer": "basic", "objects": self._batch(json.loads(body))}, {}
        if path.startswith("/stored-"):
            return self._keep(path, body)
        if match := _ASKED.fullmatch(path.removesuffix("/write")):
            self._may_write(match["repository"])
            answer = getattr(self, f"_{match['what'].replace('-', '_')}")
            return answer(match["repository"], unquote(match["rest"] or ""), body)
        raise _Refused(404, "no such address")

    def _may_write(self, repository: str) -> None:
        rights = self.hub.rights.get(repository.split("/")[0], "write")
        if rights != "write" or self.hub.role != "write":
            raise _Refused(403, f"you may not write to {repository}")

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        repository = f"{asked['organization']}/{asked['name']}"
        self._may_write(repository)
        url = {"url": f"{self.hub.address}/{repository}"}
        root = self.hub.folder / repository
        if root.is_dir():
            return 409, url, {}
        for folder in (root, root.with_name(f"{root.name}@{FIRST}")):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".gitattributes").write_text(ATTRIBUTES)
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repository)
        return 200, url, {}

    def _auth_check(self, repository: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        return 200, {}, {}

    def _branches(self, repository: str) -> dict[str, Path]:
        root = self.hub.folder / repository
        places = {p.name.partition("@")[2]: p for p in root.parent.glob(f"{root.name}@*")}
        return {"main": root, **{name: p for name, p in places.items() if name != FIRST}}

    def _refs(self, repository: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_of(root)}
            for name, root in self._branches(repository).items()
            if name not in self.hub.tags
        ]
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": "0" * 40}
            for name in self.hub.tags
        ]
        return 200, {"branches": branches, "tags": tags, "converts": []}, {}

    def _commits(self, repository: str, rest: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        roots = [self._branches(repository)[rest]]
        roots += [self.hub.root(repository, FIRST) or roots[0]]
        entry = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "title": "", "message": ""}
        return 200, [{"id": commit_of(root), **entry} for root in roots], {}

    def _branch(self, repository: str, branch: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        start = self.hub.root(repository, json.loads(body).get("startingPoint", "main"))
        place = self.hub.folder / f"{repository}@{branch}"
        if place.exists():
            return 409, {"error": "branch exists"}, {}
        shutil.copytree(start or self.hub.folder / repository, place)
        return 200, {}, {}

    def _preupload(self, repository: str, branch: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        files = [
            {
                "path": file["path"], "oid": None,
                "shouldIgnore": file["path"] == self.hub.ignored,
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
            }
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        return 200, {"files": files}, {}

    @property
    def _kept(self) -> Path:
        folder = self.hub.folder.parent / "uploaded"
        folder.mkdir(exist_ok=True)
        return folder

    def _batch(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        objects = []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size, "authenticated": True}
            if not (self._kept / oid).is_file():
                upload: dict[str, Any] = {"href": f"{self.hub.address}/stored-put/{oid}"}
                part = self.hub.part_bytes
                if part is not None and size > part:
                    upload["href"] = f"{self.hub.address}/stored-complete/{oid}"
                    names = range(1, -(-size // part) + 1)
                    parts = {f"{n:05}": f"{self.hub.address}/stored-part/{oid}/{n}" for n in names}
                    upload["header"] = {"chunk_size": str(part), **parts}
                verify = {"href": f"{self.hub.address}/stored-verify/{oid}"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return objects

    def _keep(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Take a large file, or a part of one, under its hash."""
        how, oid, *number = path.removeprefix("/stored-").split("/")
        place = self._kept / oid
        if how == "part":
            place.with_name(f"{oid}.{number[0]}").write_bytes(body)
            return 200, {}, {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'}
        if how == "verify":
            return (200 if place.is_file() else 404), {}, {}
        if how == "complete":
            parts = json.loads(body)["parts"]
            body = b"".join(
                place.with_name(f"{oid}.{part['partNumber']}").read_bytes() for part in parts
            )
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "content does not match its hash")
        place.write_bytes(body)
        self.hub.puts.append(oid)
        return 200, {}, {}

    def _commit(self, repository: str, branch: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        root = self._branches(repository)[branch]
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if len(self.hub.commits) >= self.hub.most_commits:
            raise _Refused(500, "out of order")
        if header.get("parentCommit") not in {None, commit_of(root)}:
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            target = root / line["value"]["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            if line["key"] == "lfsFile":
                os.link(self._kept / line["value"]["oid"], target)
            elif line["key"] == "file":
                target.write_bytes(base64.b64decode(line["value"]["content"]))
        self.hub.commits.append(Commit(branch, header["summary"], tuple(files_of(root))))
        url = f"{self.hub.address}/{repository}/commit/{commit_of(root)}"
        return 200, {"commitUrl": url, "commitOid": commit_of(root), "success": True}, {}


class _Refused(Exception):
    """An answer that is not the one hoped for."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
