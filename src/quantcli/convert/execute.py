"""Carry out a plan: a directory that is atomic, resumable, and has the same bytes each time."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from quantcli.checkpoint.checkpoint import must_be_unchanged
from quantcli.checkpoint.files import JOURNAL, MANIFEST, PART
from quantcli.checkpoint.manifest import encode_manifest
from quantcli.convert.journal import Journal, discard, remove_folder
from quantcli.convert.publish import check_destination, publish
from quantcli.convert.shards import ShardRun
from quantcli.core.disk import disk_errors, file_entry, sync_folder, write_file
from quantcli.core.errors import InputError, QuantError
from quantcli.core.events import SILENT, Progress
from quantcli.core.kernels.machine import announced, problem
from quantcli.core.place import partial_folder
from quantcli.core.threads import thread_pool
from quantcli.planning.parts import Part, part_head
from quantcli.planning.plan import Plan, Work
from quantcli.verification.structure import verified

_CHUNK = 2**20  # bytes


P = TypeVar("P")
W = TypeVar("W", bound=Work)


@dataclass(frozen=True)
class RunOptions:
    """How a plan is carried out; none of it changes a byte of the weights.

    workers:        threads that convert.
    fresh:          start again, without what an interrupted run left.
    force:          replace an output that exists.
    checksum:       hash every file for the manifest.
    block_elements: elements of a row block; None: see `elements_of`.
    """

    workers: int
    fresh: bool = False
    force: bool = False
    checksum: bool = True
    block_elements: int | None = None


@dataclass(frozen=True)
class Written(Generic[P]):
    """A finished directory. plan: what was carried out; None for parts that were joined."""

    out: Path
    files: dict[str, dict[str, Any]]  # name -> {"bytes": n, "sha256": hex or None}
    shards_reused: int  # of an interrupted run
    plan: P
    notes: tuple[str, ...]  # faults that the source has too, and why it took longer

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())


def run_head(plan: Work, *, checksum: bool) -> dict[str, Any]:
    """The head of the journal: a later run continues with these shards only if it has the same."""
    source = {shard: list(plan.checkpoint.stamps[shard]) for shard in plan.checkpoint.shards}
    return {"plan": plan.digest, "checksum": checksum, "source": source}


def execute(
    plan: W,
    out: Path,
    options: RunOptions,
    *,
    progress: Progress = SILENT,
    part: Part | None = None,
    final: bool = False,
) -> Written[W]:
    """Write the planned checkpoint, or a part of it, to `out`, which appears whole or not at all.

    An interrupted run leaves `out`.partial; the same call continues after its last whole shard.
    final: delete `out`.partial if a value is refused: no other run could continue with it.
    InputError for NaN or Inf in a weight and for a plan that still needs data, MachineError for a full
    or unwritable disk.
    """
    if isinstance(plan, Plan) and plan.needs_data:
        raise InputError(
            f"the inputs of {len(plan.needs_data)} modules have not been measured",
            where=f"`{plan.needs_data[0]}`",
            fix="run `quantcli calibrate` with this recipe and model first",
        )
    partial, checksum = partial_folder(out), options.checksum
    if options.fresh:
        remove_folder(partial)
    journal = Journal(partial, run_head(plan, checksum=checksum))
    useless = False
    try:
        run = ShardRun(plan, partial, journal, progress, checksum, options.block_elements)
        try:
            with thread_pool(options.workers) as pool, announced(progress.say):
                run.write(part.shards(plan) if part else plan.shards, pool, options.workers)
        except InputError:
            useless = final
            raise
        files = run.files
        if part is None or part.carries:
            for name, content in plan.sidecars.items():
                write_file(partial / name, content)
                files[name] = file_entry(partial / name, checksum=checksum)
            for name in plan.copies:
                source = plan.checkpoint.path / name
                files[name] = copy_file(source, partial / name, checksum=checksum)
        must_be_unchanged(plan.checkpoint)
        head = plan.manifest()
        notes: tuple[str, ...] = ()
        if part is None:
            close_folder(partial, MANIFEST, head, files)
            ours, notes = verified(partial)
            assert not ours, f"{ours[0].check}: {ours[0].what} ({ours[0].where}), in {partial}"
        else:
            close_folder(partial, PART, part_head(plan, part, head, checksum=checksum), files)
        # again: OUT may exist by now, and without the journal no later run could reuse the shards
        check_destination(out, plan.checkpoint.path, force=options.force)
        journal.remove()
        publish(partial, out, force=options.force)
    finally:
        journal.close()
        if useless:
            with suppress(QuantError):  # the error that is reported is the refusal
                discard(partial)
    notes = tuple(note.replace(str(partial), str(out)) for note in notes)  # its name by now
    if missing := problem():
        notes += (f"compiled kernels are not used ({missing}): the conversion takes longer",)
    return Written(out, files, run.reused, plan, notes)


def close_folder(
    folder: Path, listing: str, head: dict[str, Any], files: dict[str, dict[str, Any]]
) -> None:
    """Remove strange files from a folder and write its listing; all of it is durable on the disk."""
    _remove_strangers(folder, {*files, JOURNAL})
    write_file(folder / listing, encode_manifest({**head, "files": dict(sorted(files.items()))}))
    with disk_errors(folder):
        sync_folder(folder)


def _remove_strangers(folder: Path, expected: set[str]) -> None:
    """Delete files in OUT.partial that an earlier run left and this plan does not name."""
    with disk_errors(folder):
        for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(file.startswith(f"{name}/") for file in expected):
                    path.rmdir()
            elif name not in expected:
                path.unlink()


def copy_file(source: Path, destination: Path, *, checksum: bool) -> dict[str, Any]:
    """Copy a file's bytes, with the permissions of a new file. Returns its entry of the manifest."""
    temporary = destination.with_name(f".{destination.name}.writing")
    with disk_errors(source):
        reader = source.open("rb")
    with reader, disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as writer:
            while chunk := reader.read(_CHUNK):
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
        temporary.rename(destination)
    return file_entry(destination, checksum=checksum)
