"""MODEL as the user names it: a directory, a repository of the Hugging Face Hub, or an address."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.checkpoint.remote.address import address_of, public_form
from quantcli.checkpoint.remote.stores import SCHEMES, parse_place
from quantcli.core.errors import InputError, MachineError, QuantError, closest, named
from quantcli.core.events import SILENT, Progress

if TYPE_CHECKING:
    from quantcli.checkpoint.hub.repository import Choice, Repository
    from quantcli.checkpoint.remote.mounts import Mount

HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?"
)


@dataclass(frozen=True)
class Pending:
    """A model of the Hub, given as ORG/NAME, of which files are missing in the cache.

    choice: its files. given: how the user named it. revision: the one in that name.
    """

    repository: Repository
    choice: Choice
    given: str
    revision: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of the missing files."""
        missing = [file for file in self.choice.files if not self.repository.is_cached(file)]
        return self.repository.nbytes(missing)

    @property
    def place(self) -> Path:
        """A folder on the disk of the cache."""
        place = self.repository.snapshot
        while not place.exists():
            place = place.parent
        return place

    def why_streamed(self, others: int = 0) -> str | None:
        """Why the model is read where it is; None if the disk has room for it.

        others: bytes that the disk needs for other files.
        """
        from rich.filesize import decimal

        free = shutil.disk_usage(self.place).free
        if self.nbytes + others <= free:
            return None
        next_to = f" next to {decimal(others)} of other files" if others else ""
        return (
            f"streaming {self.given}: its weights take {decimal(self.nbytes)}{next_to}, "
            f"{decimal(free)} are free in the Hub's cache"
        )

    def fetch(self, progress: Progress) -> Path:
        """Fetch the missing files into the cache. Returns the folder there; raises what `find_model`
        does."""
        from quantcli.checkpoint.hub.download import fetch_model
        from quantcli.checkpoint.hub.repository import remember

        with _our_errors(self.given, Path(self.given)):
            if self.choice.problems:
                raise _named(self.choice.problems[0], self.repository.snapshot, self.given)
            fetch_model(self.repository, self.choice, progress)
            remember(self.repository, self.revision)
        return self.repository.snapshot


@dataclass(frozen=True)
class Located:
    """The folder of a model for headers and configuration. mount: if it is temporary, what is to be
    closed. pending: if it could be fetched into the Hub's cache."""

    folder: Path
    mount: Mount | None = None
    pending: Pending | None = None


def find_model(model: str, progress: Progress = SILENT) -> Path:
    """The directory of `model`; a Hub id is fetched into the Hub's own cache first, if that has room.

    A Hub id may name a branch, a tag or a commit: ORG/NAME@REVISION. Only files that a conversion
    reads or copies are fetched: no pickles, and no weights in another format or twice.
    An address, such as hf://ORG/NAME or s3://BUCKET/FOLDER, becomes a temporary folder with headers and
    small files, until the process ends; all else is read where it is. So is a Hub id without room.
    Honours HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT, as huggingface_hub does. `progress` gets
    a line before the Hub is asked, and the bytes of the download. Raises InputError or MachineError,
    and Interrupted.
    """
    if address := address_of(model):
        return mount(address, progress).folder
    path, asked = _parse(model)
    if asked is None:
        return path
    progress.say(f"no folder {model} here: looking for it on the Hub, or in its cache")
    with _our_errors(model, path):
        found = _locate(*asked, model, progress)
        if isinstance(found, Path):
            return found
        pending = Pending(found, _choose(found, model, progress), model, asked[1])
        if not pending.choice.problems and (why := pending.why_streamed()):
            progress.say(why)
            return _mount_repository(found, model, progress).folder
    return pending.fetch(progress)


@contextmanager
def find_headers(model: str, progress: Progress = SILENT) -> Iterator[Path]:
    """The directory of `model` for the block, which reads its headers and its configuration.

    If a model of the Hub is not in the cache, this is a temporary folder, as for an address: nothing
    else of it is fetched unless it is read. Raises what `find_model` does.
    """
    located = locate(model, progress)
    try:
        yield located.folder
    except QuantError as error:
        raise _named(error, located.folder, model) from None
    finally:
        if located.mount is not None:
            located.mount.close()


def locate(model: str, progress: Progress = SILENT) -> Located:
    """What `find_headers` gives, until it is closed or the process ends."""
    if address := address_of(model):
        opened = mount(address, progress)
        return Located(opened.folder, opened)
    folder, asked = _parse(model)
    if asked is None:
        return Located(folder)
    from quantcli.checkpoint.hub.repository import choose

    progress.say(f"no folder {model} here: looking for it on the Hub, or in its cache")
    with _our_errors(model, folder):
        found = _locate(*asked, model, progress)
        if isinstance(found, Path):
            return Located(found)
        if _is_cached(found):
            return Located(found.snapshot)
        opened = _mount_repository(found, model, progress)
        choice = choose(found.sizes, opened.folder)
        return Located(opened.folder, opened, Pending(found, choice, model, asked[1]))


def mount(address: str, progress: Progress = SILENT) -> Mount:
    """The model at an address, of which headers and small files are fetched.

    Raises InputError for what is not there, not a model or not allowed, and MachineError.
    """
    from quantcli.checkpoint.remote.mounts import Mount
    from quantcli.checkpoint.remote.origin import Origin
    from quantcli.checkpoint.remote.reading import listed

    scheme, _, rest = address.partition("://")
    origin: Origin
    if scheme == "hf":
        return _mount_hub(rest, address, progress)
    if scheme in {"http", "https"}:
        from quantcli.checkpoint.remote.http_folder import parse_folder

        origin = parse_folder(address)
    elif scheme in SCHEMES:
        from quantcli.checkpoint.remote.objects import ObjectFolder

        origin = ObjectFolder(parse_place(address))
    else:
        raise InputError(
            f"nothing can be read from {scheme}://",
            where=public_form(address),
            fix="give a folder, ORG/NAME, or an address: hf://, s3://, gs://, az://, https:// or http://",
        )
    progress.say(f"looking for {origin.address}")
    return Mount(origin, listed(origin, progress), progress)


def _mount_hub(name: str, address: str, progress: Progress) -> Mount:
    from huggingface_hub import constants

    from quantcli.checkpoint.hub.download import patiently
    from quantcli.checkpoint.hub.repository import look_up

    match = HUB_ID.fullmatch(name.removesuffix("/"))
    if match is None:
        what = "not the address of a repository of the Hub"
        raise InputError(
            what, where=public_form(address), fix="give hf://ORG/NAME or hf://ORG/NAME@REVISION"
        )
    if constants.HF_HUB_OFFLINE:
        what = "hf:// reads from the Hub, and HF_HUB_OFFLINE is set"
        raise MachineError(what, where=address, fix="unset it, or give ORG/NAME if it is in the cache")
    progress.say(f"looking for {address}")
    with _our_errors(match[0], None):
        found = patiently(lambda: look_up(match["repository"], match["revision"]), match[0], progress)
        return _mount_repository(found, address, progress)


def _mount_repository(found: Repository, given: str, progress: Progress) -> Mount:
    from huggingface_hub import constants

    from quantcli.checkpoint.remote.hub_folder import HubFolder, listing_of
    from quantcli.checkpoint.remote.mounts import Mount

    origin = HubFolder(found.name, found.commit, given, constants.ENDPOINT)
    return Mount(origin, listing_of(found), progress)


def _is_cached(repository: Repository) -> bool:
    """Whether the cache has every file of a commit that a conversion needs."""
    from quantcli.checkpoint.hub.repository import FIRST, choose

    if not all(repository.is_cached(file) for file in FIRST if file in repository.sizes):
        return False
    try:
        choice = choose(repository.sizes, repository.snapshot)
    except QuantError:
        return False
    return all(map(repository.is_cached, choice.files))


def display_name(folder: Path) -> str:
    """The name for people of a folder that `find_model` or `find_headers` gave."""
    return named(str(folder))


def _parse(model: str) -> tuple[Path, tuple[str, str | None] | None]:
    """`model` as a path, and as repository and revision if it is a Hub id and no such path exists."""
    try:
        path = Path(model).expanduser()
        hub_id = HUB_ID.fullmatch(model)
        if hub_id is None or path.exists():
            return path, None
    except (OSError, RuntimeError) as error:  # a name over the limit, an unknown ~user
        raise InputError(f"not the name of a model: {error}", where=public_form(model)) from None
    return path, (hub_id["repository"], hub_id["revision"])


def _locate(name: str, revision: str | None, model: str, progress: Progress) -> Repository | Path:
    """What the Hub has; without a Hub in reach, the folder in the cache."""
    from huggingface_hub import constants, errors

    from quantcli.checkpoint.hub.download import patiently, reason
    from quantcli.checkpoint.hub.repository import cached, is_complete, look_up

    folder = cached(name, revision)
    if folder is not None and not is_complete(folder):
        folder = None
    if constants.HF_HUB_OFFLINE:
        if folder is None:
            raise MachineError(
                f"`{model}` is neither a directory nor complete in the Hub cache, and HF_HUB_OFFLINE "
                "is set",
                fix="fetch it where there is a network, or give a directory",
            )
        return folder
    if folder is None:
        return patiently(lambda: look_up(name, revision), model, progress)
    try:
        return look_up(name, revision)
    except (errors.RevisionNotFoundError, QuantError):
        raise
    except Exception as error:
        progress.say(f"the Hub gives no answer ({reason(error)}): taking {model} from its cache")
        return folder


def _choose(repository: Repository, model: str, progress: Progress) -> Choice:
    from quantcli.checkpoint.hub.download import fetch
    from quantcli.checkpoint.hub.repository import FIRST, choose

    fetch(repository, [file for file in FIRST if file in repository.sizes], progress)
    try:
        return choose(repository.sizes, repository.snapshot)
    except QuantError as error:
        raise _named(error, repository.snapshot, model) from None


def _named(error: QuantError, folder: Path, model: str) -> QuantError:
    """The same error with the name of the model in place of a folder that the user does not know."""
    if error.where:
        error.where = error.where.replace(str(folder), model)
    return error


@contextmanager
def _our_errors(model: str, path: Path | None) -> Iterator[None]:
    """What huggingface_hub raises, in one sentence. path: `model` as a path, if it may be one."""
    from huggingface_hub import errors

    from quantcli.checkpoint.hub.download import reason, status_of

    repository, _, revision = model.partition("@")
    neither = "is neither a directory nor" if path else "is not"
    try:
        yield
    except QuantError:
        raise
    except errors.GatedRepoError:
        raise InputError(
            f"`{model}` is gated on the Hub", fix="accept its licence there and set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"`{model}` {neither} a repository of the Hub",
            fix="check the spelling; a private repository needs HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"`{repository}` has no revision `{revision}` on the Hub",
            fix="give a branch, a tag or a commit of it",
        ) from None
    except errors.HFValidationError:
        raise InputError(
            f"`{model}` {neither} the name of a repository of the Hub",
            fix="names look like organisation/model",
        ) from None
    except Exception as error:  # the library lets through what its HTTP client raises
        if path and path.parent.is_dir():  # rather a misspelt path than a repository
            near = closest(path.name, [e.name for e in path.parent.iterdir() if e.is_dir()])
            raise InputError(
                "no such model directory, and no such repository in reach",
                where=model,
                fix=f"did you mean {near} in {path.parent}?" if near else "check the path",
            ) from None
        if status_of(error) in {401, 403}:
            raise InputError(
                f"the Hub refuses access to `{model}`: {reason(error)}",
                fix="set HF_TOKEN to a token that may read it",
            ) from None
        raise MachineError(
            f"`{model}` is not a directory here, and it cannot be fetched from the Hub"
            if path
            else f"`{model}` cannot be read from the Hub",
            where=reason(error),
            fix="check the network and the disk, or give a directory",
        ) from None
