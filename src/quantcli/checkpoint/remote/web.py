"""Requests by HTTP: connections that are kept, and bodies that are read into memory that is there.

http.client reads into a buffer of the caller, which costs a quarter of a second of CPU time for a GiB.
"""

from __future__ import annotations

import atexit
import http.client
import itertools
import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from functools import cache
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from quantcli.checkpoint.remote.address import is_server
from quantcli.checkpoint.remote.origin import PassingError
from quantcli.core.errors import InputError, MachineError

_TIMEOUT = 30.0  # seconds until a server has to send something
MOST_REDIRECTS = 5
_MOST_IDLE = 8  # connections to one server that are kept
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # name files of certificates
_BROKEN = (OSError, http.client.HTTPException)


class _Idle:
    """Connections that nobody uses, by scheme and server."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
        self._mutex = threading.Lock()
        self._process = os.getpid()

    def take(self, server: tuple[str, str]) -> http.client.HTTPConnection | None:
        """One to that server, if there is one."""
        with self._mutex:
            if self._process != os.getpid():  # a fork has no right to its parent's connections
                self._kept, self._process = {}, os.getpid()
            kept = self._kept.get(server)
            return kept.pop() if kept else None

    def put(self, server: tuple[str, str], connection: http.client.HTTPConnection) -> None:
        """Keep one for later."""
        with self._mutex:
            kept = self._kept.setdefault(server, [])
            if len(kept) < _MOST_IDLE:
                kept.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close all of them."""
        with self._mutex:
            for connection in itertools.chain(*self._kept.values()):
                connection.close()
            self._kept.clear()


_idle = _Idle()
atexit.register(_idle.close)


@cache
def _tls() -> ssl.SSLContext:
    bundle = next(filter(None, map(os.environ.get, _BUNDLES)), None)
    try:
        context = ssl.create_default_context(cafile=bundle)
    except OSError as error:  # no such file, or no certificates in it
        what, fix = f"certificates cannot be read: {reason(error)}", "check SSL_CERT_FILE"
        raise MachineError(what, where=bundle, fix=fix) from None
    if not context.cert_store_stats()["x509_ca"] and not context.get_ca_certs():
        import certifi  # of huggingface_hub: for systems without certificates of their own

        context.load_verify_locations(certifi.where())
    return context


def _connect(url: SplitResult) -> http.client.HTTPConnection:
    """A new connection, through the proxy that the environment names."""
    host, port = url.hostname or "", url.port
    secure = url.scheme == "https"
    proxy = _proxy(url)
    if proxy is not None:
        through, at = proxy.hostname or "", proxy.port or 80
        if not secure:
            return http.client.HTTPConnection(through, at, timeout=_TIMEOUT)
        connection = http.client.HTTPSConnection(through, at, timeout=_TIMEOUT, context=_tls())
        connection.set_tunnel(host, port or 443, _proxy_headers(proxy))
        return connection
    if secure:
        return http.client.HTTPSConnection(host, port, timeout=_TIMEOUT, context=_tls())
    return http.client.HTTPConnection(host, port, timeout=_TIMEOUT)


def _proxy(url: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for an address. MachineError for one that is not usable."""
    named = None if proxy_bypass(url.hostname or "") else getproxies().get(url.scheme)
    if not named:
        return None
    try:
        proxy = urlsplit(named if "://" in named else f"http://{named}")
        usable = proxy.scheme in {"http", "https"} and proxy.hostname and proxy.port != 0
    except ValueError:  # a port that is not a number: perhaps of a password with a slash
        usable = False
    if not usable:
        what = "the proxy that the environment names is not an address of HTTP"
        fix = "give http://HOST:PORT; write special characters of a password as %XX"
        raise MachineError(what, where=f"{url.scheme.upper()}_PROXY", fix=fix)
    return proxy


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    from base64 import b64encode

    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(user.encode()).decode()}"}


def _target(url: SplitResult) -> tuple[str, dict[str, str]]:
    """What is asked of the server, and headers for a proxy between."""
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    proxy = None if url.scheme == "https" else _proxy(url)
    return (f"http://{url.netloc}{path}", _proxy_headers(proxy)) if proxy else (path, {})


@contextmanager
def request(
    method: str, url: str, headers: Mapping[str, str], body: bytes | None = None, wait: float = _TIMEOUT
) -> Iterator[http.client.HTTPResponse]:
    """The answer to one request; redirects are answers, too. PassingError if there is none.

    body: that is sent. wait: seconds until the server has to send something.
    """
    parts = urlsplit(url)
    server = (parts.scheme, parts.netloc)
    target, more = _target(parts)
    connection = _idle.take(server)
    response = None
    if connection is not None:
        try:
            _wait_for(connection, wait)
            connection.request(method, target, body, {**headers, **more})
            response = connection.getresponse()
        except _BROKEN:  # the server has closed it meanwhile
            connection.close()
    if response is None:
        connection = _connect(parts)
        try:
            _wait_for(connection, wait)
            connection.request(method, target, body, {**headers, **more})
            response = connection.getresponse()
        except ssl.SSLCertVerificationError:
            connection.close()
            raise MachineError(
                "the certificate of the server is not trusted",
                where=f"{parts.scheme}://{parts.hostname}",
                fix="set SSL_CERT_FILE to a file with the certificates that you trust",
            ) from None
        except _BROKEN as error:
            connection.close()
            raise PassingError(reason(error, wait)) from None
    assert connection is not None
    try:
        yield response
    finally:
        if response.isclosed() and not response.will_close:
            _idle.put(server, connection)
        else:
            connection.close()


def _wait_for(connection: http.client.HTTPConnection, seconds: float) -> None:
    """Set how long the server may send nothing."""
    connection.timeout = seconds
    if connection.sock is not None:
        connection.sock.settimeout(seconds)


def reason(error: Exception, wait: float = _TIMEOUT) -> str:
    """Why there is no answer, in a few words, without addresses. wait: the time limit in seconds."""
    if isinstance(error, TimeoutError):
        return f"the server sent nothing for {wait:g} s"
    if isinstance(error, ssl.SSLError):
        return f"no safe connection: {error.reason or error.strerror or 'TLS failed'}"[:200]
    if isinstance(error, http.client.HTTPException):
        return "the server broke off" if isinstance(error, ConnectionError) else "no answer in HTTP"
    # a proxy's refusal has a text in place of a number
    text = getattr(error, "strerror", None) or f"{error}" or type(error).__name__
    return "".join(c for c in text[:200].lower() if c.isprintable())


@contextmanager
def followed(
    method: str, url: str, headers: Mapping[str, str], where: str
) -> Iterator[http.client.HTTPResponse]:
    """The answer behind redirects. InputError, with `where`, for more than a few, and for others than
    to HTTP(S)."""
    for _ in range(MOST_REDIRECTS):
        with request(method, url, headers) as response:
            if response.status not in REDIRECTS:
                yield response
                return
            url = redirected(url, response, where)
            drain(response)
    raise InputError("the server redirects without end", where=where, fix="check the address")


def redirected(url: str, response: http.client.HTTPResponse, where: str) -> str:
    """The address that a redirect names. InputError unless it is HTTPS, or HTTP from HTTP."""
    allowed = ("https",) if url.startswith("https:") else ("http", "https")
    try:
        location = urljoin(url, response.headers.get("Location", ""))
        scheme = urlsplit(location).scheme
    except ValueError:  # such as a bracket without its other half
        location, scheme = "", allowed[0]
    if scheme not in allowed:
        what = f"the server redirects to another kind of address: {scheme!r:.40}"
    elif not is_server(location):
        what = "the server redirects to what is not an address"
    else:
        return location
    raise InputError(what, where=where, fix="take a server that you trust")


def drain(response: http.client.HTTPResponse) -> None:
    """Read the rest of a short body, so that the connection can be used again."""
    try:
        response.read(2**16)
    except _BROKEN:
        response.close()


def read_body(response: http.client.HTTPResponse, block: memoryview) -> None:
    """Fill `block` from a body. PassingError, with the bytes that arrived, if it ends before."""
    done = 0
    while done < len(block):
        try:
            n = response.readinto(block[done:])
        except _BROKEN as error:
            raise PassingError(reason(error), done) from None
        if n == 0:
            raise PassingError("the connection was cut", done)
        done += n
    if response.length == 0 or response.chunked:
        drain(response)


def read_all(response: http.client.HTTPResponse, most: int) -> bytes | None:
    """A body of up to `most` bytes; None for a longer one. PassingError if it is cut off."""
    try:
        content = response.read(most + 1)
    except _BROKEN as error:
        raise PassingError(reason(error)) from None
    if len(content) > most:
        return None
    if response.length:  # http.client takes what is there for all
        raise PassingError("the connection was cut")
    return content


def content_length(headers: Message) -> int | None:
    """The size of a body as the server says it; None if it does not."""
    text = headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def asked_wait(headers: Message) -> float:
    """Seconds that a busy server asks to wait."""
    text = headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0


def is_passing(status: int) -> bool:
    """Whether a status is that of a busy server."""
    return status in {408, 429} or status >= 500
