"""A server between object storage and its user, which fails on purpose."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.object_server import HOST, Objects

CUT = 0  # in place of a status: the connection ends after half of the request
LOST = -1  # the request is carried out, and its answer is lost
Fault = Callable[[str, str], int | None]  # method, path with query -> status, CUT, LOST or None


@dataclass
class Proxy:
    """fault: says what goes wrong with a request. asked: every request, and what went wrong."""

    fault: Fault = lambda method, path: None
    asked: list[tuple[str, str, int | None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def failures(self, kind: int) -> int:
        """Requests that failed in this way."""
        return sum(fault == kind for _, _, fault in self.asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer in two pieces waits 40 ms for the second
    proxy: Proxy
    behind: str

    def _pass(self) -> None:
        nbytes = int(self.headers.get("Content-Length") or 0)
        with self.proxy.lock:
            fault = self.proxy.fault(self.command, self.path)
            self.proxy.asked.append((self.command, self.path, fault))
        body = self.rfile.read(nbytes // 2 if fault == CUT else nbytes)
        if fault == CUT:
            self.close_connection = True
            return
        if fault is not None and fault > 0:
            self._answer(fault, {}, b"<Error><Code>%s</Code></Error>" % _CODES.get(fault, b"Tests"))
            return
        connection = http.client.HTTPConnection(self.behind)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        if fault == LOST:
            self.close_connection = True
        else:
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in _OWN}
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self._answer(answer.status, kept, content, length)
        connection.close()

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, length: str | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass


_CODES = {400: b"ExpiredToken"}
_OWN = {"content-length", "connection", "transfer-encoding"}


@contextmanager
def between(objects: Objects) -> Iterator[Proxy]:
    """What obstore finds in this process in place of the server, for buckets not used before."""
    proxy = Proxy()
    handler = type("Own", (_Handler,), {"proxy": proxy, "behind": urlsplit(objects.address).netloc})
    server = ThreadingHTTPServer((HOST, 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{HOST}:{server.server_address[1]}")
        try:
            yield proxy
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
