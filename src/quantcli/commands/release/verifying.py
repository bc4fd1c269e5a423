"""The verification of a release: what it asks for is checked before the work, and done at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.checkpoint.checkpoint import Checkpoint, scan_checkpoint
from quantcli.checkpoint.hub import find_headers
from quantcli.core.disk import check_file, disk_errors
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.recipe.release import WrittenRelease
from quantcli.verification.options import VerifyOptions

if TYPE_CHECKING:
    from quantcli.calibration.text.dataset import TextSource
    from quantcli.convert.destination import Destination


def verify_options(
    written: WrittenRelease, page: Path | None, workers: int | None, model: str
) -> VerifyOptions | None:
    """How the checkpoints are verified, without their names; None: they are not.

    page: to be written. model: the name of the release's model. InputError for options that contradict
    each other.
    """
    block = written.file.verify
    if block is None:
        return None if page is None else VerifyOptions("", page=page)
    against = block.against if isinstance(block.against, str) else model if block.against else None
    try:
        return VerifyOptions(
            "",
            full=block.full,
            against=against,
            run=block.run,
            data=None if block.data is None else [*map(written.path, block.data)],
            samples=block.samples,
            length=block.length,
            tp=block.tp,
            min_sqnr=block.min_sqnr,
            max_ppl_ratio=block.max_ppl_ratio,
            max_kl=block.max_kl,
            page=page,
            workers=workers,
        )
    except InputError as error:
        where, fix = written.document.where(("verify",)), error.fix
        raise InputError(_keys(error.what), where=where, fix=fix and _keys(fix)) from None


def _keys(text: str) -> str:
    """Options of `verify` as the keys that a release has for them: --min-sqnr is `min_sqnr`."""
    return re.sub(r"--([a-z-]+)( MODEL| FILE)?", lambda m: f"`{m[1].replace('-', '_')}`", text)


def check_verification(
    options: VerifyOptions,
    written: WrittenRelease,
    checkpoint: Checkpoint,
    places: Sequence[Destination],
    progress: Progress,
) -> None:
    """Refuse before the work what the verification would refuse after it: a page that cannot be
    written, a model to compare with that is not there, text that is not.

    checkpoint: the release's model. places: of the checkpoints. InputError or MachineError.
    """
    if options.page is not None:
        _check_page(options.page, [place.folder for place in places if place.folder is not None])
    block = written.file.verify
    if block is not None and isinstance(block.against, str):
        with find_headers(block.against, progress) as folder:
            scan_checkpoint(folder)
    if options.run:
        from quantcli.calibration.text.dataset import check_length, check_source, model_limits

        for source in _sources(options, written):
            check_source(source, checkpoint.path)
            check_length(source, model_limits(checkpoint.text_config)[0])


def check_text(
    options: VerifyOptions, written: WrittenRelease, checkpoint: Checkpoint, progress: Progress
) -> None:
    """InputError if the text to run is too short, or cannot be read; before hours of other work."""
    from quantcli.verification.on_text.corpus import read_texts

    sources, trust = _sources(options, written), options.trust_remote_code
    read_texts(sources, checkpoint, progress, trust=trust)


def _sources(options: VerifyOptions, written: WrittenRelease) -> list[TextSource]:
    """The texts to run."""
    from quantcli.verification.on_text.corpus import text_sources

    return text_sources(options, written.document.where(("verify", "data")), "verify.")


def _check_page(page: Path, folders: Sequence[Path]) -> None:
    """InputError for a page that could not be written, or would be part of a checkpoint."""
    with disk_errors(page):
        place, outs = page.resolve(), [folder.resolve() for folder in folders]
    if any(place.is_relative_to(out) for out in outs):
        what = "the page would become part of a checkpoint of the release"
        raise InputError(what, where=f"--report {page}", fix="give a file outside of it")
    if not any(out.is_relative_to(place.parent) for out in outs):  # else the run makes the folder
        check_file("--report", page)
    elif place.is_dir():
        raise InputError(f"`{page}` is a directory", where=f"--report {page}", fix="give a file")
