"""A folder on a web server: its files by links of its page, or by the names that models have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from urllib.parse import quote, unquote, urljoin, urlsplit

from quantcli.checkpoint.files import INDEX, MANIFEST, RECIPE_FILE, SIGNATURE, SOURCE_RECIPE
from quantcli.checkpoint.remote.address import is_server, public_form
from quantcli.checkpoint.remote.origin import MAX_FILES, Listing, Origin, PassingError, Version
from quantcli.checkpoint.remote.ranges import (
    PLAIN,
    is_strong,
    range_header,
    read_answer,
    refused,
    tag_of,
)
from quantcli.checkpoint.remote.web import (
    asked_wait,
    content_length,
    drain,
    followed,
    is_passing,
    read_all,
)
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.text import count
from quantcli.core.untrusted.names import file_name_fault
from quantcli.core.untrusted.tables import parse_table

_WORKERS = 8
_MOST_PAGE = 4 * 2**20  # bytes of a page with links
_MOST_INDEX = 64 * 2**20
_MOST_PAGES = 64
_DEPTH = 3  # folders below the model's
_KNOWN = (
    "config.json", INDEX, "model.safetensors", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "modules.json", "README.md", "LICENSE", "LICENSE.txt", "quantize_config.json",
    "quantization_config.json", "hf_quant_config.json", "quant_model_description.json",
    MANIFEST, RECIPE_FILE, SOURCE_RECIPE, SIGNATURE,
)  # fmt: skip


@dataclass(frozen=True)
class WebFolder(Origin):
    """A folder behind an address of HTTP(S), without a slash at its end."""

    url: str

    @property
    def address(self) -> str:
        """The address, which holds nothing secret."""
        return self.url

    def list(self, progress: Progress) -> Listing:
        """The files that pages link to, or those of known names, each with its size."""
        page = _page(self, self.url + "/")
        linked, skipped = _linked(self, page) if page is not None else ([], [])
        notes: list[str] = []
        by_links = any(name.endswith(".safetensors") for name in linked)
        if not by_links:
            notes.append(
                f"the server lists no weight files at {self.address}, so quantcli asked for the usual "
                "file names"
            )
        files = self._versions(linked if by_links else dict.fromkeys([*linked, *_KNOWN]))
        if not by_links and INDEX in files:
            files |= self._versions(self._in_index(files[INDEX]))
        if skipped:
            notes.append(
                f"{self.address} has too many folders, or too deep ones: {count(skipped, 'folder')} "
                f"left out, such as {skipped[0]!a}"
            )
        if gone := [name for name in linked if name not in files]:
            notes.append(
                f"{self.address} links to {count(gone, 'file')} that the server does not have, such as "
                f"{gone[0]!a}"
            )
        if not files:
            what = "no file of a model at this address"
            raise InputError(what, where=self.address, fix="give the address of the folder")
        if blind := [name for name, version in files.items() if not version.tag]:
            notes.append(
                f"the server gives neither ETag nor Last-Modified for {count(blind, 'file')}, such as "
                f"{blind[0]!a}: a change during the run is noticed only if it changes the size"
            )
        elif loose := [name for name, version in files.items() if not is_strong(version.tag)]:
            progress.detail(
                f"the server gives no strong ETag for {count(loose, 'file')}, such as `{loose[0]}`: a "
                "change is noticed by its size, and its time or its weak ETag"
            )
        return Listing(files, tuple(notes))

    def ask(self, name: str, version: Version, first: int, block: memoryview) -> None:
        """Fill `block` by one request; see the base class."""
        condition = {"If-Match": version.tag} if is_strong(version.tag) else {}
        headers = {**PLAIN, **range_header(first, len(block)), **condition}
        with followed("GET", self._url(name), headers, self.where(name)) as response:
            if response.status in {200, 206} and version.tag not in {"", tag_of(response.headers)}:
                raise self.changed(name)
            read_answer(response, self, name, version, first, block)

    def _url(self, name: str) -> str:
        return f"{self.url}/{quote(name)}"

    def _versions(self, names: Iterable[str]) -> dict[str, Version]:
        """Size and tag of each file that exists."""
        with ThreadPoolExecutor(_WORKERS, "quantcli-sizes") as pool:
            found = pool.map(lambda name: (name, self._version(name)), names)
            return {name: version for name, version in found if version is not None}

    def _version(self, name: str) -> Version | None:
        with followed("HEAD", self._url(name), PLAIN, self.where(name)) as response:
            status, headers = response.status, response.headers
            drain(response)
        nbytes = content_length(headers)
        if status == 200 and nbytes is not None:
            return Version(nbytes, tag_of(headers))
        if status in {404, 410} or (status == 403 and name in _KNOWN):
            return None  # some servers answer 403 for what is not there
        if is_passing(status):
            raise PassingError(f"the server answers {status}", 0, asked_wait(headers))
        if status in {200, 405, 501}:
            what = "the server does not say how many bytes a file has"
            raise InputError(what, where=self.where(name), fix="take another server")
        raise refused(self, name, status)

    def _in_index(self, version: Version) -> Sequence[str]:
        """The weight files that the index names; its reader refuses what is not a name."""
        if version.nbytes > _MOST_INDEX:
            return []
        block = bytearray(version.nbytes)
        self.ask(INDEX, version, 0, memoryview(block))
        try:
            table = parse_table(bytes(block), self.where(INDEX)).table("weight_map")
        except InputError:
            return []
        files = {name for name in table.value.values() if isinstance(name, str)}
        return sorted(name for name in files if file_name_fault(name, folders=False) is None)[
            :MAX_FILES
        ]


def parse_folder(address: str) -> WebFolder:
    """The folder behind an address. InputError for one with a password, a query or a fragment."""
    where = public_form(address)
    usable = is_server(address)
    parts = urlsplit(address if usable else "")
    if parts.username is not None or parts.password is not None:
        what = "an address must not hold a password: others would see it"
        raise InputError(what, where=where, fix="leave it out")
    if parts.query or parts.fragment:
        what = "the address of a folder has no `?` and no `#`: files are looked for below it"
        raise InputError(what, where=where, fix="give the address of the folder")
    if not usable:
        raise InputError("not an address", where=where, fix="give https://HOST/FOLDER")
    return WebFolder(address.rstrip("/"))


class _Links(HTMLParser):
    """The addresses that a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a link."""
        if tag == "a":
            self.found += [value for key, value in attrs if key == "href" and value]

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Pass over `<![...>`: the base class raises AssertionError for what it does not know."""
        return self.rawdata.find(">", i) + 1 or -1


def _page(folder: WebFolder, url: str) -> str | None:
    """The text of a page of HTML; None if there is none."""
    with followed("GET", url, PLAIN, folder.address) as response:
        if is_passing(response.status):
            wait = asked_wait(response.headers)
            raise PassingError(f"the server answers {response.status}", 0, wait)
        is_page = "html" in response.headers.get("Content-Type", "").lower()
        if response.status == 401:
            raise refused(folder, "", response.status)
        if response.status != 200 or not is_page:
            drain(response)
            return None
        content = read_all(response, _MOST_PAGE)
        if content is None:
            what = f"the page of the folder has over {_MOST_PAGE:,} bytes: this is not a model"
            raise InputError(what, where=url, fix="give the address of the folder of a model")
        return content.decode("utf-8", errors="replace")


def _linked(folder: WebFolder, page: str) -> tuple[list[str], list[str]]:
    """The files that a page links to, and those that the pages of folders below it link to; then the
    folders below it that were not looked at."""
    names: dict[str, None] = {}
    skipped: list[str] = []
    pages, number = [("", page)], 1
    while pages:
        below, text = pages.pop(0)
        links = _Links()
        links.feed(text)
        for link in dict.fromkeys(links.found):
            name = _below(f"{folder.url}/{quote(below)}", link)
            if name is None:
                continue
            if not name.endswith("/"):
                names[below + name] = None
            elif (below + name).count("/") > _DEPTH or number == _MOST_PAGES:
                skipped.append(below + name)
            else:
                number += 1
                deeper = _page(folder, f"{folder.url}/{quote(below + name)}")
                pages += [(below + name, deeper)] if deeper is not None else []
        if len(names) > MAX_FILES:
            break
    return [*names], skipped


def _below(base: str, link: str) -> str | None:
    """The name that a link gives a file, or with a slash a folder, right below a page; else None."""
    try:
        parts = urlsplit(urljoin(base, link))
    except ValueError:
        return None
    own = urlsplit(base)
    if (parts.scheme, parts.netloc) != (own.scheme, own.netloc) or parts.query or parts.fragment:
        return None
    path, above = unquote(parts.path), unquote(own.path)
    name = path.removeprefix(above)
    if name == path or file_name_fault(name.removesuffix("/"), folders=False) is not None:
        return None
    return name
