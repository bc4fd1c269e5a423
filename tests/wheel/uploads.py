"""A stand-in for the Hub that takes uploads: what `hf upload` sends becomes a model that it serves."""

from __future__ import annotations

import base64
import json

from tests.hub_server import Handler, Hub


class Uploads(Handler):
    """Answers as the Hub does without its own store of chunks (HF_HUB_DISABLE_XET)."""

    hub: Hub

    def do_PUT(self) -> None:
        """A large file: kept by its hash until a commit names it."""
        kept = self.hub.folder.parent / "uploaded"
        kept.mkdir(exist_ok=True)
        (kept / self.path.rpartition("/")[2]).write_bytes(self._body())
        self._send(200, b"{}")

    def do_POST(self) -> None:
        body, path = self._body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") is None:
            self._refuse(401, "Unauthorized", "Invalid credentials")
            return
        document: dict = {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            document = {"url": f"{self.hub.address}/{asked['organization']}/{asked['name']}"}
        elif "/preupload/" in path:
            document["files"] = [
                {
                    "path": file["path"], "shouldIgnore": False, "oid": None,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                }
                for file in json.loads(body)["files"]
            ]  # fmt: skip
        elif path.endswith("/info/lfs/objects/batch"):
            document = {"transfer": "basic", "objects": []}
            for wanted in json.loads(body)["objects"]:
                upload = {"href": f"{self.hub.address}/put/{wanted['oid']}"}
                document["objects"].append(
                    {**wanted, "authenticated": True, "actions": {"upload": upload}}
                )
        elif "/commit/" in path:
            repository = "/".join(path.split("/")[3:5])
            self._commit(repository, body)
            url = f"{self.hub.address}/{repository}/commit/{'0' * 40}"
            document = {"commitUrl": url, "commitOid": "0" * 40, "success": True}
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _commit(self, repository: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                continue
            target = self.hub.folder / repository / value["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "lfsFile":
                (self.hub.folder.parent / "uploaded" / value["oid"]).rename(target)
            else:
                target.write_bytes(base64.b64decode(value["content"]))

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))
