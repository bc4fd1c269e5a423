"""A repository of the Hub at one commit: its files, and which of them are the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quantcli.checkpoint.checkpoint import CONFIG, STAGES, choose_files
from quantcli.checkpoint.files import INDEX, JOURNAL, PART, STALE, why_left_out
from quantcli.checkpoint.remote.origin import MAX_FILES, is_inside, unfinished
from quantcli.core.errors import InputError, QuantError
from quantcli.core.place import expanded

FIRST = (CONFIG, INDEX, STAGES, PART)  # say which of the other files are needed
ASK_TIMEOUT = 10.0  # seconds until the Hub has to answer
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """One commit of a repository."""

    name: str  # organisation/model
    commit: str
    sizes: dict[str, int]  # file -> bytes
    hashes: dict[str, str]  # file -> hash of its content: git's of a small one, sha256 of a large one

    @property
    def snapshot(self) -> Path:
        """Where the Hub's cache keeps the files of this commit."""
        return _home(self.name) / "snapshots" / self.commit

    def nbytes(self, files: Iterable[str]) -> int:
        """Bytes of some of its files."""
        return sum(self.sizes[file] for file in files)

    def is_cached(self, file: str) -> bool:
        """Whether the cache has a file. Its link there is made once it is complete."""
        return (self.snapshot / file).exists()


@dataclass(frozen=True)
class Choice:
    """The files of a repository that a conversion reads or copies, and the others with the reason."""

    weights: list[str]
    others: list[str]
    left_out: dict[str, str]
    problems: list[QuantError]

    @property
    def files(self) -> list[str]:
        """All that are needed, weights last: with them, the rest is there."""
        return [*self.others, *self.weights]


def look_up(name: str, revision: str | None) -> Repository:
    """Ask the Hub for a revision of a repository. Raises what huggingface_hub raises, and InputError
    for an answer that cannot be used and for an unfinished checkpoint."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=ASK_TIMEOUT)
    siblings = info.siblings or []
    if not _COMMIT.fullmatch(info.sha or "") or len(siblings) > MAX_FILES:
        what = f"the Hub's answer is not usable: commit {info.sha!r:.60}, {len(siblings)} files"
        raise InputError(what, where=name, fix="check HF_ENDPOINT")
    sizes = {sibling.rfilename: max(0, sibling.size or 0) for sibling in siblings}
    if odd := [file for file in sizes if not is_inside(file)]:
        what = f"the Hub lists a file whose name is not one inside a folder: {odd[0]!r:.200}"
        raise InputError(what, where=name, fix="take a model that you trust")
    if JOURNAL in sizes:
        raise unfinished(f"hf://{name}" + (f"@{revision}" if revision else ""))
    large = {sibling.rfilename: sibling.lfs for sibling in siblings if sibling.lfs}
    hashes = {s.rfilename: s.blob_id or "" for s in siblings}
    hashes |= {file: str(lfs.sha256) for file, lfs in large.items()}
    return Repository(name, str(info.sha), sizes, hashes)


def choose(sizes: dict[str, int], folder: Path) -> Choice:
    """What of some files (path -> bytes) is the model. folder: holds those of `FIRST` among them.

    InputError if they hold no model that can be read: only pickles, an adapter, a damaged index.
    """
    left_out = {file: reason for file in sizes if (reason := why_left_out(file))}
    problems: list[QuantError] = []
    _, shards = choose_files(folder, sizes, left_out, problems)
    # what describes the source's own quantization is read, though not copied
    needed = [file for file in sizes if left_out.get(file, STALE) == STALE and not _of_pickles(file)]
    others = [file for file in needed if file not in shards]
    not_needed = {file: left_out.get(file, STALE) for file in sizes if file not in {*others, *shards}}
    return Choice(shards, others, not_needed, problems)


def _of_pickles(file: str) -> bool:
    """Whether a file is an index of weights that are never read."""
    return file.endswith(".index.json") and not file.endswith(INDEX)


def cached(name: str, revision: str | None) -> Path | None:
    """The folder of a revision in the Hub's cache, complete or not; None if there is none."""
    home = _home(name)
    try:
        commit = (home / "refs" / (revision or "main")).read_text().strip()
    except (OSError, ValueError):
        commit = revision or ""
    folder = home / "snapshots" / commit
    return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None


def is_complete(folder: Path) -> bool:
    """Whether a folder of the cache holds all the weights that its index or names call for."""
    sizes = {p.relative_to(folder).as_posix(): 0 for p in folder.rglob("*") if p.is_file()}
    problems: list[QuantError] = []
    try:
        choose_files(folder, sizes, {}, problems)
    except QuantError:
        return False
    return CONFIG in sizes and not problems


def remember(repository: Repository, revision: str | None) -> None:
    """Note in the cache which commit a branch or a tag is, for a time without a network.

    That comes last: what the cache knows by name is complete. A cache that several users share may be
    read-only; then nothing is noted.
    """
    reference = _home(repository.name) / "refs" / (revision or "main")
    if revision == repository.commit or ".." in reference.parts:
        return
    with suppress(OSError):
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(repository.commit)


def _home(name: str) -> Path:
    from huggingface_hub import constants

    return expanded(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
