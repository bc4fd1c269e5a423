"""The figures of a verification in the checkpoint's own model card, and the manifest sealed again."""

from __future__ import annotations

import hashlib
import os
import statistics
from pathlib import Path
from typing import Any

from quantcli.checkpoint.files import CARD, MANIFEST, SIGNATURE
from quantcli.checkpoint.hub import HUB_ID
from quantcli.checkpoint.manifest import encode_manifest, read_manifest, read_sealed
from quantcli.core.disk import Hashes, disk_errors, sync_folder, write_file
from quantcli.core.errors import InputError
from quantcli.core.text import count
from quantcli.planning.card.figures import replaced
from quantcli.planning.card.markdown import code, plain, table
from quantcli.planning.card.source import is_card
from quantcli.recipe.recipe import name_of_data
from quantcli.verification.options import VerifyOptions
from quantcli.verification.report import words

_AGAIN = "convert the model again, without `card: false` in the recipe"
_WAITING = f".{MANIFEST}.sealed"  # next to the manifest, until the card is in its place


def check_card(folder: Path) -> None:
    """InputError if figures cannot be written into the card of `folder`. Called before the work.

    Completes what an interrupted run left between the card and the manifest.
    """
    _recover(folder)
    with disk_errors(folder):
        missing = [name for name in (MANIFEST, CARD) if not (folder / name).is_file()]
    if os.path.lexists(folder / SIGNATURE):
        what = f"--card would change files that {SIGNATURE} signs"
        raise InputError(what, where=str(folder), fix="write the card first, then sign the checkpoint")
    if missing:
        what = f"there is no {missing[0]}: --card writes into checkpoints of quantcli that have a card"
        raise InputError(what, where=str(folder), fix=_AGAIN)
    if CARD not in read_manifest(folder)["files"] or not is_card(folder / CARD):
        raise InputError(f"{CARD} is not a card of quantcli", where=str(folder), fix=_AGAIN)
    _with_figures(folder, "")


def write_card(folder: Path, figures: str) -> None:
    """Replace the figures in the card of a checkpoint, and seal its manifest with the new hashes."""
    manifest = read_manifest(folder)
    content = _with_figures(folder, figures)
    entry: dict[str, Any] = {"bytes": len(content)}
    if "sha256" in manifest["files"][CARD]:
        hashes = Hashes()
        hashes.update(memoryview(content))
        entry |= hashes.hex()
    files = {**manifest["files"], CARD: entry}
    write_file(folder / _WAITING, encode_manifest({**manifest, "files": files}))
    write_file(folder / CARD, content)
    _seal(folder)


def _with_figures(folder: Path, figures: str) -> bytes:
    """The card with these figures. InputError if it is not as the manifest says."""
    with disk_errors(folder / CARD):
        content = (folder / CARD).read_bytes()
    sha256 = read_manifest(folder)["files"][CARD].get("sha256")
    if sha256 is not None and sha256 != hashlib.sha256(content).hexdigest():
        what = f"{CARD} was changed since it was written"
        raise InputError(what, where=str(folder), fix=f"copy the checkpoint's own {CARD} again")
    try:
        card = replaced(content.decode(), figures)
    except UnicodeDecodeError:
        card = None
    if card is None:
        what = f"{CARD} has no section for figures, or more than one"
        raise InputError(what, where=str(folder), fix=_AGAIN)
    return card.encode()


def _recover(folder: Path) -> None:
    """Take over the manifest that waits for the card which is there; delete any other."""
    waiting = folder / _WAITING
    with disk_errors(waiting):
        if not waiting.is_file():
            return
        try:
            table = read_sealed(waiting, "manifest", "remove it")
            content = (folder / CARD).read_bytes()
            sha256 = table.table("files").table(CARD).text("sha256")
            is_its_card = sha256 == hashlib.sha256(content).hexdigest()
        except (InputError, FileNotFoundError):
            is_its_card = False
        if is_its_card:
            _seal(folder)
        else:
            waiting.unlink()


def _seal(folder: Path) -> None:
    with disk_errors(folder):
        (folder / _WAITING).rename(folder / MANIFEST)
        sync_folder(folder)


def figures(report: dict[str, Any], options: VerifyOptions) -> str:
    """The outcome of a verification that passed, in Markdown, without paths.

    options: as the user gave them; of a model or a text in a folder, only its name is taken.
    """
    depths = ", ".join(report["depths"])
    checks = count(report["checks"], "check")
    notes = count(words.notes(report), "note")
    rows = []
    if options.against is not None:
        rows.append(["compared with", _reference(report, options.against)])
    levels = [(m["sqnr_db"], m["module"]) for m in report["modules"] if m["sqnr_db"] is not None]
    if levels:
        worst, module = min(levels)
        median = words.decibels(statistics.median(level for level, _ in levels))
        of = f"SQNR of {count(levels, 'weight')}"
        rows.append([of, f"median {median}, worst {words.decibels(worst)} ({code(module)})"])
    if report["run"] is not None:
        windows = f"up to {count(options.samples, 'window')} of {options.length} tokens"
        rows += [["text", f"{code(name_of_data(data))}, {windows}"] for data in options.data or ()]
    rows += [[plain(what), plain(value)] for what, value in words.run_facts(report)]
    texts = [f"`quantcli verify` of {plain(report['tool'])} passed: {depths}; {checks}, {notes}."]
    if rows:
        texts.append(table(["figure", "value"], rows))
    if missing := words.not_reached(report):
        texts.append(f"Not checked: {plain('; '.join(missing))}.")
    return "\n\n".join(texts)


def _reference(report: dict[str, Any], against: str) -> str:
    if HUB_ID.fullmatch(against) and not Path(against).exists():
        return code(against)
    recomputed = any(check["name"] == "recomputed" and check["checked"] for check in report["checks"])
    return "its source, from which it was computed again" if recomputed else "a model in a folder"
