"""A repository of the Hub at one commit as an origin of files, whose bytes come from its storage."""

from __future__ import annotations

import http.client
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from quantcli.checkpoint.remote.origin import Listing, Origin, PassingError, Version
from quantcli.checkpoint.remote.ranges import PLAIN, range_header, read_answer, tag_of
from quantcli.checkpoint.remote.web import MOST_REDIRECTS, REDIRECTS, drain, redirected, request
from quantcli.core.errors import AccessError, InputError
from quantcli.core.events import Progress

if TYPE_CHECKING:
    from quantcli.checkpoint.hub.repository import Repository

_FRESH = 240.0  # seconds for which an address of the storage is used: its signature expires
_REFUSALS = frozenset({400, 401, 403, 404, 410})  # also of a signature that has expired
_locations: dict[tuple[HubFolder, str], tuple[str, float]] = {}  # of files in storage; since when
_tags: dict[tuple[HubFolder, str, str], str] = {}  # of files, by the host that answers
_mutex = threading.Lock()


def listing_of(repository: Repository) -> Listing:
    """The files of a repository, whose hashes are their versions."""
    sizes, hashes = repository.sizes, repository.hashes
    return Listing({name: Version(nbytes, hashes[name]) for name, nbytes in sizes.items()})


@dataclass(frozen=True)
class HubFolder(Origin):
    """A commit of a repository. given: how the user named it. endpoint: the address of the Hub."""

    repository: str
    commit: str
    given: str
    endpoint: str
    immutable = True

    @property
    def address(self) -> str:
        """As the user gave it."""
        return self.given

    @property
    def name(self) -> str:
        """The name of the repository, without its organisation."""
        return self.repository.rpartition("/")[2]

    def list(self, progress: Progress) -> Listing:
        """The files of the commit. Raises what huggingface_hub raises."""
        from quantcli.checkpoint.hub.repository import look_up

        return listing_of(look_up(self.repository, self.commit))

    def ask(self, name: str, version: Version, first: int, block: memoryview) -> None:
        """Fill `block`, from where the storage has the file; see the base class."""
        headers = {**PLAIN, **range_header(first, len(block))}
        location, since = _locations.get((self, name), ("", 0.0))
        if location and time.monotonic() < since + _FRESH:
            try:
                with request("GET", location, headers) as response:
                    if response.status not in _REFUSALS:
                        self._take(response, location, name, version, first, block)
                        return
                    drain(response)
            except PassingError:
                _locations.pop((self, name), None)  # the Hub may know another
                raise
        self._ask_hub(name, version, first, block, headers)

    def _ask_hub(
        self, name: str, version: Version, first: int, block: memoryview, headers: dict[str, str]
    ) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.repository, name, revision=self.commit, endpoint=self.endpoint)
        home = urlsplit(url).netloc
        own = {**build_hf_headers(), **headers}
        for _ in range(MOST_REDIRECTS):
            at_home = urlsplit(url).netloc == home  # nobody else gets the token
            with request("GET", url, own if at_home else headers) as response:
                if response.status in REDIRECTS:
                    url = redirected(url, response, self.where(name))
                    drain(response)
                    continue
                if response.status in {401, 403}:
                    raise self._refused(name, response)
                if not at_home:
                    _locations[self, name] = url, time.monotonic()
                self._take(response, url, name, version, first, block)
                return
        raise InputError(
            "the Hub redirects without end", where=self.where(name), fix="check HF_ENDPOINT"
        )

    def _take(
        self,
        response: http.client.HTTPResponse,
        url: str,
        name: str,
        version: Version,
        first: int,
        block: memoryview,
    ) -> None:
        if response.status in {200, 206}:
            tag = tag_of(response.headers)
            with _mutex:
                before = _tags.setdefault((self, name, urlsplit(url).netloc), tag)
            if before != tag:
                raise self.changed(name)
        read_answer(response, self, name, version, first, block)

    def _refused(self, name: str, response: http.client.HTTPResponse) -> AccessError:
        if response.headers.get("X-Error-Code") == "GatedRepo":
            what = f"`{self.repository}` is gated on the Hub"
            fix = "set HF_TOKEN to a token of somebody who has accepted its licence there"
            return AccessError(what, fix=fix)
        what = f"the Hub refuses access: it answers {response.status}"
        fix = "set HF_TOKEN to a token that may read it"
        return AccessError(what, where=self.where(name), fix=fix)
