"""MODEL as the user names it: a directory, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quantcli.checkpoint.files import PICKLES
from quantcli.core.errors import InputError, MachineError, closest
from quantcli.core.events import SILENT, Progress

HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[A-Za-z0-9][\w./-]*))?"
)


def find_model(model: str, progress: Progress = SILENT) -> Path:
    """The directory of `model`; a Hub id is fetched into the Hub's own cache first.

    A Hub id may name a branch, a tag or a commit: ORG/NAME@REVISION.
    Honours HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT, as huggingface_hub does. Pickle files
    are never fetched. `progress` gets a line before the Hub is asked. Raises InputError or MachineError
    with one sentence.
    """
    try:
        path = Path(model).expanduser()
        hub_id = HUB_ID.fullmatch(model)
        if hub_id is None or path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name over the limit, an unknown ~user
        raise InputError(f"not the name of a model: {error}", where=model[:200]) from None
    progress.say(f"looking for {model} on the Hub, or in its cache")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if os.isatty(2) else "1")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        ignored = [f"*{suffix}" for suffix in PICKLES]
        return Path(
            huggingface_hub.snapshot_download(
                hub_id["repository"], revision=hub_id["revision"], ignore_patterns=ignored
            )
        )
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
            f"`{hub_id['repository']}` has no revision `{hub_id['revision']}` on the Hub",
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
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise MachineError(
                f"`{model}` is neither a directory nor in the Hub cache, and HF_HUB_OFFLINE is set",
                fix="fetch it where there is a network, or give a directory",
            ) from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix("Got: ")
        raise MachineError(
            f"`{model}` is not a directory here, and it cannot be fetched from the Hub",
            where=reason[:200],
            fix="check the network and the disk, or give a directory",
        ) from None
