"""A plain web server on this machine, for tests: a folder with ranges, ETags and pages of links.

It also answers as S3 does for reading: folders of its folder are buckets. By hand:

    python -m tests.web_server FOLDER --port 8000
`Hub.faults` makes it fail on purpose, `Hub.asked` is what it was asked, as in `hub_server`.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from quantcli.checkpoint.remote import reading
from tests.hub_server import Fault, Handler, Hub, by_hand, serve, sha256_of


class Pages(Handler):
    """Answers with the files of a folder. listed: whether pages link to them; tagged: ETags."""

    listed = True
    tagged = True

    def _answer(self) -> None:
        path = self._path = unquote(urlsplit(self.path).path)
        fault = self.hub.fault(self.command, path) or Fault("")
        place = self.hub.folder / path.strip("/")
        query = parse_qs(urlsplit(self.path).query)
        if fault.hang:
            self.hub.released.wait(fault.hang)
            self.close_connection = True
        elif fault.location:
            self._send(302, b"", {"Location": fault.location})
        elif fault.status:
            self._send(
                fault.status, b"<h1>nothing</h1>", {"Content-Type": "text/html", **fault.headers}
            )
        elif "list-type" in query:
            self._send(200, self._listed(place, query["prefix"][0]).encode())
        elif place.is_dir() and path.endswith("/") and self.listed:
            kind = {"Content-Type": "text/html; charset=utf-8"}
            self._send(200, self._page(place).encode(), kind, fault.cut)
        elif place.is_file():
            tag = tag_of(place)
            condition = self.headers.get("If-Match")
            if self.tagged and condition not in {None, f'"{tag}"'}:
                self._send(412, b"")
                return
            headers = {"Last-Modified": self.date_time_string(place.stat().st_mtime)}
            self._send_file(place, headers | ({"ETag": f'"{tag}"'} if self.tagged else {}), fault)
        else:
            self._send(404, b"no such page")

    def _listed(self, bucket: Path, prefix: str) -> str:
        """The objects of a bucket, which is a folder, as S3 lists them."""
        entries = [
            f"<Contents><Key>{html.escape(path.relative_to(bucket).as_posix())}</Key>"
            f"<Size>{path.stat().st_size}</Size><ETag>&quot;{tag_of(path)}&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for path in sorted(bucket.rglob("*"))
            if path.is_file() and path.relative_to(bucket).as_posix().startswith(prefix)
        ]
        head = f"<Name>x</Name><KeyCount>{len(entries)}</KeyCount><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{head}{''.join(entries)}</ListBucketResult>"

    def _page(self, folder: Path) -> str:
        names = [f"{path.name}/" if path.is_dir() else path.name for path in sorted(folder.iterdir())]
        links = ["../", "?C=M;O=A", "https://example.org/model.safetensors", *map(quote, names)]
        odd = "<![nobody[knows]]>"
        return odd + "".join(f'<a href="{html.escape(link)}">x</a>\n' for link in links)


def tag_of(path: Path) -> str:
    """An ETag, without its quotes."""
    status = path.stat()
    return sha256_of(path, status.st_size, status.st_mtime_ns)[:32]


@contextmanager
def served(folder: Path, *, listed: bool = True, tagged: bool = True) -> Iterator[Hub]:
    """A web server of a folder. Whoever reads from it in this process waits for nothing."""
    handler = type("Own", (Pages,), {"listed": listed, "tagged": tagged})
    with serve(folder, handler=handler) as web, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "sleep", lambda _: None)
        yield web


if __name__ == "__main__":
    by_hand(__doc__, "see ", Pages)
