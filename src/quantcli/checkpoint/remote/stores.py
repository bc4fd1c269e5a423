"""Object storage: S3, Google Cloud Storage and Azure, by address."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.remote.address import is_server, public_form
from quantcli.core.errors import AccessError, InputError, MachineError, QuantError
from quantcli.core.text import pip_install

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az")
_ADDRESS = re.compile(r"(?P<scheme>s3|gs|az)://(?P<bucket>[A-Za-z0-9][\w.-]*)(/(?P<folder>.*))?")
_STATUS = re.compile(r"status code: (\d{3})")
_LINK = re.compile(r"https?://\S+")
_METADATA = "169.254.169.254"  # where the machines of a cloud ask for credentials
_TIMEOUT = timedelta(minutes=2)  # of one request with its answer
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION (`aws configure "
    "export-credentials --format env` prints those of a profile); AWS_SKIP_SIGNATURE=true if the "
    "bucket is public",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_TOKEN",
}
# where the libraries look for another server than the cloud's
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_SETTINGS = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}


@dataclass(frozen=True)
class Place:
    """A folder in object storage. folder: the beginning of its keys, without a slash at its end."""

    scheme: str
    bucket: str
    folder: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.folder}" if self.folder else "")

    def key(self, name: str) -> str:
        """The key of a file in the folder."""
        return f"{self.folder}/{name}" if self.folder else name


def parse_place(address: str) -> Place:
    """The folder of an address such as `s3://bucket/folder`. InputError for any other text."""
    scheme = address.partition("://")[0]
    if "@" in address.partition("://")[2].partition("/")[0]:
        raise InputError(
            "an address must not hold a key or a password: others would see it",
            where=public_form(address),
            fix=_CREDENTIALS.get(scheme, "leave it out"),
        )
    match = _ADDRESS.fullmatch(address)
    folder = (match["folder"] or "").rstrip("/") if match else ""
    parts = folder.split("/") if folder else []
    if (
        match is None
        or not address.isprintable()
        or {"", ".", ".."} & {*parts}
        or set("?#\\") & {*folder}
    ):
        raise InputError(
            "not an address of object storage",
            where=public_form(address),
            fix=f"give {scheme}://BUCKET/FOLDER",
        )
    return Place(match["scheme"], match["bucket"], folder)


def open_store(place: Place, *, retries: bool = True) -> ObjectStore:
    """The bucket of a place; keys in it are those of `Place.key`.

    Credentials, region and server are what obstore finds: environment variables, files of the cloud's
    own tools, the cloud's machine. retries: whether the library itself repeats requests that fail.
    MachineError if obstore is missing, InputError for settings that it refuses.
    """
    try:
        from obstore.store import from_url
    except ImportError:
        raise MachineError(
            f"{place.scheme}:// needs the package obstore", fix=pip_install("objects")
        ) from None
    _check_settings(place)
    named = filter(None, map(os.environ.get, _ENDPOINTS[place.scheme]))
    plain = next(named, "").startswith("http://")  # the user's own choice, such as a local server
    with store_errors(place):
        return from_url(
            f"{place.scheme}://{place.bucket}",
            client_options={"timeout": _TIMEOUT, **({"allow_http": True} if plain else {})},
            retry_config={} if retries else {"max_retries": 0},
        )


def _check_settings(place: Place) -> None:
    """InputError for settings in the environment at which obstore would break off without an error.
    Their values are not repeated."""
    for name, value in sorted(os.environ.items()):
        if not name.startswith(_SETTINGS[place.scheme]):
            continue
        if name in _ENDPOINTS[place.scheme] and not is_server(value):
            what, fix = "not the address of a server", "set it to https://HOST, or unset it"
            raise InputError(what, where=name, fix=fix)
        is_path = name.endswith(("_FILE", "_CREDENTIALS"))
        if not value.isprintable() or not (value.isascii() or is_path):
            what = "setting of object storage holds a character that it must not have"
            fix = "set it without: perhaps it ends with a line break"
            raise InputError(what, where=name, fix=fix)


@contextmanager
def store_errors(place: Place, name: str = "") -> Iterator[None]:
    """Raise what obstore raises in the block as an InputError or a MachineError. name: of the file."""
    try:
        yield
    except QuantError:
        raise
    except Exception as error:
        if not is_store_error(error):
            raise
        raise our_error(error, place, name) from None


def is_store_error(error: BaseException) -> bool:
    """Whether an error is one of obstore, which raises FileNotFoundError, too."""
    return type(error).__module__.startswith("obstore") or isinstance(error, FileNotFoundError)


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of obstore; None if the server gave no answer."""
    match = _STATUS.search(str(error))
    return int(match[1]) if match else None


def may_pass(error: BaseException) -> bool:
    """Whether an error of obstore is one of the network or of a busy server."""
    if not is_store_error(error) or _lacks_credentials(error):
        return False
    status = status_of(error)
    return status in {408, 429} or status >= 500 if status else "HTTP error" in str(error)


def reason(error: BaseException) -> str:
    """An error of obstore in a few words, without addresses, which may be signed."""
    if status := status_of(error):
        return f"the server answers {status}"
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rpartition(" - ")[2]
    text = text.rpartition("HTTP error: ")[2]
    if "body error" in text:
        return "the connection was cut"
    return "".join(c for c in _LINK.sub("the server", text)[:200] if c.isprintable())


def our_error(error: BaseException, place: Place, name: str = "") -> QuantError:
    """An error of obstore in our words."""
    where = f"{place}/{name}" if name else str(place)
    if "NoSuchBucket" in str(error):
        what = f"bucket `{place.bucket}` does not exist"
        return InputError(what, where=str(place), fix="check the spelling, and the region")
    if "redirect without LOCATION" in str(error):  # how S3 answers for a bucket of another region
        what = f"bucket `{place.bucket}` is in another region"
        return InputError(what, where=str(place), fix="set AWS_REGION to the region of the bucket")
    if isinstance(error, FileNotFoundError) or status_of(error) == 404:
        return InputError("no such file in object storage", where=where, fix="check the address")
    if _lacks_credentials(error):
        what = "no credentials for object storage were found"
        return AccessError(what, where=where, fix=_CREDENTIALS[place.scheme])
    if "ExpiredToken" in str(error):
        what = "credentials for object storage have expired"
        return AccessError(what, where=where, fix="get new ones; then the same command again")
    if status_of(error) in {401, 403}:
        what = f"object storage refuses access ({reason(error)})"
        return AccessError(what, where=where, fix=_CREDENTIALS[place.scheme])
    if status_of(error) in {301, 307, 400}:
        what, fix = f"object storage refuses the request ({reason(error)})", "check region and server"
        return InputError(what, where=where, fix=f"{fix}: AWS_REGION, AWS_ENDPOINT_URL")
    if type(error).__name__ == "UnknownConfigurationKeyError" or not may_pass(error):
        what, fix = f"object storage cannot be used: {reason(error)}", _CREDENTIALS[place.scheme]
        return InputError(what, where=where, fix=fix)
    what = f"object storage gives no answer: {reason(error)}"
    return MachineError(what, where=where, fix="check the network; then the same command again")


def _lacks_credentials(error: BaseException) -> bool:
    first: Any = str(error).partition("\n")[0]
    return _METADATA in first or "Account must be specified" in first
