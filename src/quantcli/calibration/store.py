"""A calibration on disk: one safetensors file and one report a decoder layer, and a key.

    calibration.json           the key: model, text, what is measured; written first
    layer-00000.safetensors    `stats.MODULE.NAME`, and the vectors of edits: `vector.00000`
    layer-00000.json           tokens and ranges by module, results of methods, edits by tensor
    rotation.safetensors       matrices of a learned rotation, and where learning has come to
    states-00003.safetensors   inputs of the next layer; only while a run is under way, as are outputs
                               of a whole stack and tensors that layers hand on next to these;
                               with `.000001-000004` those of 4 batches, from batch 1 on
    further-0123456789abcdef/  one more calibration of the model, for recipes that ask for other things

A layer counts as done when its report is there: it is written last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.calibration.report import LayerReport, StoredReport, expert_tokens, parse_report
from quantcli.calibration.sets.identity import Key, digest_of, first_other
from quantcli.checkpoint.header import StoredTensor, layout, read_header
from quantcli.checkpoint.spec import FLOATS, TensorSpec, safetensors_dtype
from quantcli.checkpoint.tensors import read_tensor, tensor_bytes
from quantcli.checkpoint.writer import ShardWriter
from quantcli.core.disk import disk_errors, lock, sha256_of, write_file
from quantcli.core.errors import InputError, QuantError, other_version
from quantcli.core.untrusted.names import file_name_fault
from quantcli.core.untrusted.tables import Table, read_table
from quantcli.planning.measured import Basis, Edit, EditFactors, Measured

HEAD = "calibration.json"
_VERSION = 2
_PART = r"(\.\d{6}-\d{6})?"
_STATES = (
    rf"(final-)?states-\d{{5}}{_PART}\.(safetensors|carried\.json)"
    rf"|states-[0-9a-f]{{64}}{_PART}\.safetensors"
)
_FILES = rf"(layer-\d{{5}}\.(safetensors|json)|{_STATES}|rotation\.safetensors|calibration\.json)"
_ATTEMPT = r"(\.[0-9a-f]{16})?"  # of one of several processes
_OURS = re.compile(rf"{_FILES}{_ATTEMPT}|\.{_FILES}{_ATTEMPT}\.writing|\.lock")
_FURTHER = re.compile(r"further-[0-9a-f]{16}")
_BEGUN = frozenset({".lock", f".{HEAD}.writing"})  # files that exist before HEAD names them


def layer_file(index: int) -> str:
    """Name of a layer's tensors."""
    return f"layer-{index:05d}.safetensors"


class Store:
    """The folder of one calibration, locked while it is open."""

    def __init__(
        self, folder: Path, key: Key, layers: int, basis: Basis, *, fresh: bool = False
    ) -> None:
        """Open or begin it.

        InputError if the folder is not a calibration, has another key, or was begun by other versions
        or with other rows of a data set.
        """
        self.folder = folder
        self.layers = layers
        head = read_head(folder, fresh=fresh)
        if head is not None and head[0] != key:
            raise refusal(folder, head[0], key)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            lock(self._fd, folder)
            if fresh:
                self._clear()
            self._same(basis)
            document = {"version": _VERSION, "layers": layers, **asdict(basis), **asdict(key)}
            write_file(folder / HEAD, (json.dumps(document, indent=2) + "\n").encode())
        except BaseException:
            self.close()
            raise

    def _same(self, basis: Basis) -> None:
        if not self._begun:
            return
        before = read_basis(self.folder)
        what = "by other versions of quantcli, torch or transformers"
        if before.tool == basis.tool:
            if before.text in {None, basis.text}:
                return
            what = "with another text: the data set has other rows since"
        raise InputError(
            f"the calibration was begun {what}", where=str(self.folder), fix=_anew(self.folder)
        )

    def _clear(self) -> None:
        with disk_errors(self.folder):
            for path in self.folder.iterdir():
                if path.name not in {HEAD, ".lock"} and not _FURTHER.fullmatch(path.name):
                    path.unlink()

    @property
    def done(self) -> int:
        """How many layers are done, from the first on."""
        return layers_done(self.folder, self.layers)

    @property
    def _begun(self) -> bool:
        """Whether any layer is done."""
        return any(self.has(index) for index in range(self.layers))

    def has(self, index: int) -> bool:
        """Whether a layer is done."""
        return (self.folder / _report(index)).is_file()

    def save(self, index: int, tensors: Mapping[str, Tensor], report: LayerReport) -> None:
        """A layer is done: its tensors by their names in the file, and its report."""
        save_layer(self.folder, index, tensors, report)

    def drop_states(self, keep: Collection[Path] = ()) -> None:
        """Delete all hidden states, but for some files."""
        self.drop("*states-*", keep)

    def tidy(self) -> None:
        """Delete what interrupted runs and lost processes have left, once all layers are done."""
        self.drop_states()
        self.drop("*layer-*.safetensors.*")

    def drop(self, pattern: str, keep: Collection[Path] = ()) -> None:
        """Delete files whose names have a pattern, but for some."""
        with disk_errors(self.folder):
            for path in self.folder.glob(pattern):
                if path not in keep:
                    path.unlink()

    def forget(self) -> None:
        """Delete the folder, if no layer is done and it holds nothing else."""
        if self._begun:
            return
        self.drop_states()
        with suppress(OSError):
            for name in (*_BEGUN, HEAD):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    def close(self) -> None:
        """Release the lock."""
        if self._fd >= 0:
            with disk_errors(self.folder):
                os.close(self._fd)
            self._fd = -1


def save_layer(
    folder: Path, index: int, tensors: Mapping[str, Tensor], report: LayerReport, attempt: str = ""
) -> None:
    """A layer is done: its tensors by their names in the file, and its report. The folder is locked by
    this process, or by the one that it works for.

    attempt: tells the unfinished file from those of other processes, such as `.0123456789abcdef`.
    """
    specs = [
        TensorSpec(name, safetensors_dtype(t.dtype), tuple(t.shape))
        for name, t in sorted(tensors.items())
    ]
    writer = ShardWriter(folder, layer_file(index) + attempt, layout(specs))
    try:
        for name, tensor in tensors.items():
            if tensor.numel():
                writer.write(name, 0, tensor_bytes(tensor))
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    document = report.document()
    signed = {**document, "sha256": seal_of(writer.path, document)}
    with disk_errors(writer.path):
        writer.path.rename(folder / layer_file(index))
    text = json.dumps(signed, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_file(folder / _report(index), text.encode())


def _report(index: int) -> str:
    return f"layer-{index:05d}.json"


def seal_of(tensors: Path, report: Mapping[str, Any]) -> str:
    """sha256 of a layer's tensors and its report together: neither may change without the other."""
    content = {key: value for key, value in report.items() if key != "sha256"}
    return digest_of([sha256_of(tensors), content])


def layers_done(folder: Path, layers: int) -> int:
    """How many layers are done, from the first on."""
    there = (i for i in range(layers) if not (folder / _report(i)).is_file())
    return next(there, layers)


def read_head(folder: Path, *, fresh: bool = False) -> tuple[Key, int] | None:
    """The key and the number of layers of the calibration in `folder`; None if there is none, and if
    it is to be made `fresh`.

    InputError if the folder is something else, or damaged, or of another version.
    """
    if not os.path.lexists(folder):
        return None
    if not folder.is_dir():
        raise InputError("exists and is not a directory", where=str(folder), fix="move it away")
    with disk_errors(folder):
        names = {entry.name for entry in folder.iterdir()}
    names = {name for name in names if not _FURTHER.fullmatch(name)}
    if names <= _BEGUN:
        return None
    strange = sorted(name for name in names if not _OURS.fullmatch(name))
    if strange or HEAD not in names:
        what = "the folder is not a calibration" + (f": it holds `{strange[0]}`" if strange else "")
        raise InputError(what, where=str(folder), fix="give another folder")
    if fresh:
        return None
    head = _read(folder / HEAD)
    version = head.value.get("version")
    if type(version) is int and version < _VERSION:
        what = "the calibration there is of an earlier version, which kept other things"
        raise InputError(what, where=str(folder), fix=_anew(folder))
    if type(version) is not int or version != _VERSION:
        raise other_version("calibration", version, _VERSION, str(folder))
    return Key.parse(head), head.integer("layers")


def read_basis(folder: Path) -> Basis:
    """What the calibration in `folder` was made of, as far as it says. InputError for hashes that are
    none, and for names that a manifest cannot have."""
    head = _read(folder / HEAD)
    files = head.table("tokenizer", Table({}, head.where))
    if fault := next(filter(None, map(file_name_fault, files)), None):
        raise InputError(fault, where=head.where, fix=head.fix)
    tokenizer = {name: files.digest(name) for name in files}
    tool = head.text("tool", "")
    if not tool.isprintable():
        head.refuse("tool", "has control characters")
    return Basis(head.digest("text", None), tokenizer, tool)


def further_folders(folder: Path) -> list[Path]:
    """The folders of further calibrations in that of one."""
    if not os.path.isdir(folder):  # noqa: PTH112 - false for a name that is too long
        return []
    with disk_errors(folder):
        return sorted(path for path in folder.iterdir() if _FURTHER.fullmatch(path.name))


def further_folder(folder: Path, key: Key) -> Path:
    """The folder of one more calibration in that of another."""
    return folder / f"further-{key.digest[:16]}"


def refusal(folder: Path, stored: Key, key: Key) -> InputError:
    """The error for a calibration in `folder` that cannot serve `key`."""
    other = stored.difference(key)
    if other is None:
        name = first_other(stored.options, key.options)
        other = "another recipe" if name is None else f"another recipe: {name} differs"
    return InputError(
        f"the calibration there is of {other}",
        where=str(folder),
        fix=f"give another folder; or {_anew(folder)}, if no other recipe uses it",
    )


def check_free(folder: Path) -> None:
    """MachineError if another run is at work in `folder`."""
    path = folder / ".lock"
    if path.is_file():
        with disk_errors(path), path.open("rb") as file:
            lock(file.fileno(), folder, shared=True)


def load_measured(folder: Path, layers: int, modules: Collection[str] | None = None) -> Measured:
    """A finished calibration. modules: whose statistics are wanted; None: all.

    InputError if a file is missing or damaged.
    """
    folder = folder.absolute()  # processes in other folders read it, too
    stats: dict[str, dict[str, StoredTensor]] = {}
    edits: dict[str, Edit] = {}
    edited, no_tokens = Counter[str](), list[str]()
    taken_from, experts = dict[str, str](), dict[str, Any]()
    for index in range(layers):
        report, tensors = _sealed_layer(folder, index)
        vectors = {}
        for stored in tensors:
            kind, _, rest = stored.spec.name.partition(".")
            if kind == "stats":
                module, _, name = rest.rpartition(".")
                if modules is None or module in modules:
                    stats.setdefault(module, {})[name] = stored
            else:
                vectors[rest] = stored
        for name, kinds in report.edits.items():
            if lost := [place for place in kinds.values() if place not in vectors]:
                what = f"edit of `{name}` names `vector.{lost[0]}`, which {layer_file(index)} has not"
                where = str(folder / _report(index))
                raise InputError(what, where=where, fix=_anew(folder))
            edits[name] = Edit(**{kind: vectors[place] for kind, place in kinds.items()})
        edited.update({how: len(groups) for how, groups in report.groups.items()})
        no_tokens += (name for name, module in report.modules.items() if not module["tokens"])
        taken_from |= {
            module: donor
            for module, donor in report.taken_from.items()
            if modules is None or module in modules
        }
        experts |= expert_tokens(report.modules)
    unreached, basis = tuple(sorted(no_tokens)), read_basis(folder)
    return Measured(stats, edits, edited, unreached, taken_from, experts, basis, folder)


def _sealed_layer(folder: Path, index: int) -> tuple[StoredReport, list[StoredTensor]]:
    """The report of a layer and its tensors. InputError if a file is missing or damaged, and for a
    tensor that holds NaN or Inf."""
    table, path = _read(folder / _report(index)), folder / layer_file(index)
    report = parse_report(table)
    with _whole(path):
        tensors = read_header(path)[0]
        sealed = table.text("sha256", "") == seal_of(path, table.value)
    if not sealed:
        raise InputError(
            "a layer has changed since it was measured, or the report next to it has",
            where=str(path),
            fix=_anew(folder),
        )
    for stored in tensors:
        if stored.spec.dtype in FLOATS and not bool(torch.isfinite(read_tensor(stored)).all()):
            what = f"`{stored.spec.name}` holds a value that is not finite"
            raise InputError(what, where=str(path), fix=_anew(folder))
    return report, tensors


def reports(folder: Path, layers: int) -> Iterator[StoredReport]:
    """The report of every layer. InputError if one is missing or damaged."""
    for index in range(layers):
        yield parse_report(_read(folder / _report(index)))


def _read(path: Path) -> Table:
    """The object in a file. InputError if it is missing or damaged."""
    with _whole(path):
        return read_table(path, _anew(path.parent))


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Around the reading of a file: errors get the fix for a damaged calibration."""
    fix = _anew(path.parent)
    if not path.is_file():
        raise InputError("a file of the calibration is missing", where=str(path), fix=fix)
    try:
        yield
    except QuantError as error:
        raise type(error)(error.what, where=error.where, fix=fix) from None


def _anew(folder: Path) -> str:
    return f"delete {folder} to make it anew"


def pack_edits(edits: Mapping[str, EditFactors]) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """The vectors of a layer's edits, each once however many tensors share it; their places."""
    vectors: dict[str, Tensor] = {}
    places: dict[bytes, str] = {}
    table: dict[str, dict[str, str]] = {}
    for name, factors in sorted(edits.items()):
        for kind in ("rows", "columns", "value"):
            tensor = getattr(factors, kind)
            if tensor is not None:
                raw = bytes(tensor_bytes(tensor)) + str(tensor.dtype).encode()
                place = places.setdefault(hashlib.sha256(raw).digest(), f"{len(places):05d}")
                vectors[f"vector.{place}"] = tensor
                table.setdefault(name, {})[kind] = place
    return vectors, table
