"""MODEL as the user names it: a directory, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.checkpoint.files import HEADERS_ONLY
from quantcli.core.errors import InputError, MachineError, QuantError, closest
from quantcli.core.events import SILENT, Progress

if TYPE_CHECKING:
    from quantcli.checkpoint.hub.repository import Choice, Repository

HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?"
)


def find_model(model: str, progress: Progress = SILENT) -> Path:
    """The directory of `model`; a Hub id is fetched into the Hub's own cache first.

    A Hub id may name a branch, a tag or a commit: ORG/NAME@REVISION. Only files that a conversion
    reads or copies are fetched: no pickles, and no weights in another format or twice.
    Honours HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT, as huggingface_hub does. `progress` gets
    a line before the Hub is asked, and the bytes of the download. Raises InputError or MachineError,
    and Interrupted.
    """
    path, asked = _parse(model)
    if asked is None:
        return path
    progress.say(f"looking for {model} on the Hub, or in its cache")
    with _our_errors(model, path):
        found = _locate(*asked, model, progress)
        if isinstance(found, Path):
            return found
        from quantcli.checkpoint.hub.download import fetch_model
        from quantcli.checkpoint.hub.repository import remember

        choice = _choose(found, model, progress)
        if choice.problems:
            raise _named(choice.problems[0], found.snapshot, model)
        fetch_model(found, choice, progress)
        remember(found, asked[1])
        return found.snapshot


@contextmanager
def find_headers(model: str, progress: Progress = SILENT) -> Iterator[Path]:
    """The directory of `model` for the block, which may read its headers and its configuration.

    If a model of the Hub is not in the cache, this is a temporary folder: weights are not fetched, and
    to read them is an InputError. Raises what `find_model` does; errors in the block name the model.
    """
    path, asked = _parse(model)
    if asked is None:
        yield path
        return
    progress.say(f"looking for {model} on the Hub, or in its cache")
    with tempfile.TemporaryDirectory(prefix="quantcli-") as temporary:
        with _our_errors(model, path):
            folder = _locate(*asked, model, progress)
            if not isinstance(folder, Path):
                from quantcli.checkpoint.hub.headers import write_headers

                choice = _choose(folder, model, progress)
                if all(map(folder.is_cached, choice.files)):
                    folder = folder.snapshot
                else:
                    place = Path(temporary).resolve() / f"{path.name}{HEADERS_ONLY}"
                    place.mkdir()
                    write_headers(folder, choice, place, progress)
                    folder = place
        try:
            yield folder
        except QuantError as error:
            raise _named(error, folder, model) from None


def display_name(folder: Path, model: str) -> str:
    """The name for people of a folder that `find_headers` gave: `model` for a temporary one."""
    return model if folder.name.endswith(HEADERS_ONLY) else str(folder)


def _parse(model: str) -> tuple[Path, tuple[str, str | None] | None]:
    """`model` as a path, and as repository and revision if it is a Hub id and no such path exists."""
    try:
        path = Path(model).expanduser()
        hub_id = HUB_ID.fullmatch(model)
        if hub_id is None or path.exists():
            return path, None
    except (OSError, RuntimeError) as error:  # a name over the limit, an unknown ~user
        raise InputError(f"not the name of a model: {error}", where=model[:200]) from None
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
        return choose(repository, repository.snapshot)
    except QuantError as error:
        raise _named(error, repository.snapshot, model) from None


def _named(error: QuantError, folder: Path, model: str) -> QuantError:
    """The same error with the name of the model in place of a folder that the user does not know."""
    if error.where:
        error.where = error.where.replace(str(folder), model)
    return error


@contextmanager
def _our_errors(model: str, path: Path) -> Iterator[None]:
    """What huggingface_hub raises, in one sentence. path: `model` as a path."""
    from huggingface_hub import errors

    from quantcli.checkpoint.hub.download import reason, status_of

    repository, _, revision = model.partition("@")
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
            f"`{model}` is neither a directory nor a repository of the Hub",
            fix="check the spelling; a private repository needs HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(
            f"`{repository}` has no revision `{revision}` on the Hub",
            fix="give a branch, a tag or a commit of it",
        ) from None
    except errors.HFValidationError:
        raise InputError(
            f"`{model}` is neither a directory nor the name of a repository of the Hub",
            fix="names look like organisation/model",
        ) from None
    except Exception as error:  # the library lets through what its HTTP client raises
        if path.parent.is_dir():  # rather a misspelt path than a repository
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
            f"`{model}` is not a directory here, and it cannot be fetched from the Hub",
            where=reason(error),
            fix="check the network and the disk, or give a directory",
        ) from None
