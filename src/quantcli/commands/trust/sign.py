"""`sign` as a function: a signature over all files of a checkpoint, in a file next to them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quantcli.checkpoint.files import JOURNAL, MANIFEST, PART, SIGNATURE
from quantcli.checkpoint.manifest import read_manifest
from quantcli.checkpoint.remote.address import address_of
from quantcli.checkpoint.signature.bundle import IGNORED, bundle_bytes, is_ignored, statement_bytes
from quantcli.checkpoint.signature.keys import Signer, load_signer
from quantcli.checkpoint.signature.listing import file_names, why_no_file
from quantcli.commands.keywords import PathLike, takes
from quantcli.commands.results import Result
from quantcli.commands.steps import OnProgress, progress_of
from quantcli.core.disk import sha256_of, write_file
from quantcli.core.errors import AnswerNo, InputError
from quantcli.core.events import SILENT, Progress
from quantcli.core.text import count
from quantcli.core.threads import default_workers
from quantcli.core.untrusted.names import file_name_fault, printable, utf8_fault

_COPY = "copy the checkpoint again, or convert the model again"


@dataclass(frozen=True, kw_only=True)
class Signature(Result):
    """A signature that was written.

    signature: its file.
    signer:    who signed: the subject of the certificate, or the beginning of the key's sha256.
    files:     number of files that are signed.
    bytes:     of these files.
    notes:     remarks, such as on files that the manifest does not list.
    """

    signature: Path
    signer: str
    files: int
    bytes: int
    notes: list[str]


@takes()
def sign(
    checkpoint: PathLike,
    key: PathLike,
    *,
    certificate: PathLike | None = None,
    chain: PathLike | None = None,
    force: bool = False,
    workers: int | None = None,
    on_progress: OnProgress = None,
) -> Signature:
    """Sign all files of a checkpoint, whoever wrote it.

    checkpoint:  a folder. The signature becomes its file `model.sig`, in the format of OpenSSF Model
                 Signing.
    key:         a private key in PEM, of the curve P-256, P-384 or P-521. Its password is in the
                 environment variable QUANTCLI_PASSWORD.
    certificate: of the key, in PEM. chain: the certificates above it. Both may be in the key's file.
    force:       replace a signature that is there.
    workers:     threads; by default one for each core.
    on_progress: as of `quantize`.

    Raises AnswerNo if a file is not what the manifest lists, and InputError for a key that cannot sign
    and for a folder with links.
    """
    paths = (None if path is None else Path(path) for path in (certificate, chain))
    signer = load_signer(Path(key), *paths)
    return sign_folder(str(checkpoint), signer, force, workers, progress_of(on_progress))


def sign_folder(
    checkpoint: str,
    signer: Signer,
    force: bool = False,
    workers: int | None = None,
    progress: Progress = SILENT,
) -> Signature:
    """What `sign` does once there is a signer."""
    root = _folder(checkpoint)
    if os.path.lexists(root / SIGNATURE) and not force:
        fix = "give --force to replace it"
        raise InputError("the checkpoint is signed already", where=str(root / SIGNATURE), fix=fix)
    listed = read_manifest(root)["files"] if (root / MANIFEST).is_file() else {}
    names = [name for name in file_names(root) if not is_ignored(name, IGNORED)]
    _must_be_files(root, names)
    if missing := sorted(listed.keys() - set(names)):
        raise _not_as_listed(f"`{missing[0]}` is missing", root)
    sizes = {name: (root / name).stat().st_size for name in names}
    progress.say(f"signing {count(names, 'file')} as {signer.name}")
    digests = _digests(root, sizes, workers or default_workers(), progress)
    for name, entry in listed.items():
        if entry.get("sha256") not in {None, digests[name]} or entry.get("bytes") != sizes[name]:
            raise _not_as_listed(f"`{name}` is not what was written", root)
    content = bundle_bytes(signer.sign(statement_bytes(root.name, digests)))
    write_file(root / SIGNATURE, content)
    others = sorted(set(names) - listed.keys() - {MANIFEST}) if listed else []
    notes = [f"signed, though the manifest does not list it: {name}" for name in others]
    return Signature(
        signature=root / SIGNATURE,
        signer=signer.name,
        files=len(names),
        bytes=sum(sizes.values()),
        notes=notes,
    )


def _folder(checkpoint: str) -> Path:
    """The folder of a checkpoint. InputError for anything else."""
    if address_of(checkpoint) is not None:
        raise InputError(
            "`quantcli sign` writes into a folder on this machine",
            where=checkpoint,
            fix="sign the folder before it is uploaded, or give --sign to `quantcli quantize`",
        )
    root = Path(checkpoint).resolve()
    if not root.is_dir():
        raise InputError("no such folder", where=checkpoint, fix="give the folder of a checkpoint")
    for name, what in {PART: "a part of a conversion", JOURNAL: "an unfinished checkpoint"}.items():
        if (root / name).exists():
            raise InputError(f"this is {what}", where=checkpoint, fix="complete it first")
    if not any(root.glob("*.safetensors")):
        what = "no .safetensors file here"
        raise InputError(what, where=checkpoint, fix="give the folder of a checkpoint")
    return root


def _must_be_files(root: Path, names: Iterable[str]) -> None:
    for name in names:
        fault = utf8_fault(name) or file_name_fault(name) or why_no_file(root, name)
        if fault is not None:
            where = f"{root}/{printable(name)}"
            fix = "make it a file with another name, or remove it"
            raise InputError(f"cannot be signed: {fault}", where=where, fix=fix)


def _digests(root: Path, sizes: dict[str, int], workers: int, progress: Progress) -> dict[str, str]:
    """sha256 of each file in hex. The largest are read first, so that threads end together."""

    def digest(name: str) -> tuple[str, str]:
        found = sha256_of(root / name)
        progress.shard(name, sizes[name], reused=False)
        progress.advance(sizes[name])
        return name, found

    progress.begin(sum(sizes.values()), len(sizes), "file")
    pool = ThreadPoolExecutor(workers, "quantcli")
    try:
        return dict(pool.map(digest, sorted(sizes, key=lambda name: (-sizes[name], name))))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _not_as_listed(what: str, root: Path) -> AnswerNo:
    return AnswerNo(f"{what}, so nothing is signed", where=f"{root / MANIFEST}", fix=_COPY)
