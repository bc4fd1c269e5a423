"""A model directory on disk, read strictly, headers only.

Nothing here is trusted: names, indexes and links are checked before a path is built
from them, and no weight is read. Imports no torch.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
import reprlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from quantcli.checkpoint.config.places import QUANTIZATION_KEYS, language_model
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.files import (
    INDEX,
    OTHER_WEIGHTS,
    PART,
    PICKLES,
    has_byte_order_mark,
    list_files,
)
from quantcli.checkpoint.header import StoredTensor, read_header
from quantcli.checkpoint.remote.file import RemoteFile, RemoteFolder, as_remote
from quantcli.checkpoint.spec import FLOATS, TensorSpec
from quantcli.core.disk import ABSENT
from quantcli.core.errors import InputError, MachineError, QuantError
from quantcli.core.events import SILENT, Progress
from quantcli.core.text import count
from quantcli.core.untrusted import tables
from quantcli.core.untrusted.names import file_name_fault, tensor_name_fault
from quantcli.core.untrusted.tables import parse_json, read_bytes

CONFIG = "config.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<part>[0-9]{5,})-of-(?P<total>[0-9]{5,})\.safetensors")
# Files of weights that are not the model's: adapters, other states of training, other layouts.
_ADAPTER = re.compile(r"adapter(_model)?[^/]*\.(safetensors|bin)")
_ADAPTER_CONFIG = "adapter_config.json"
_NOT_THE_MODEL = re.compile(
    r"(consolidated|adapter|optimizer|scheduler|ema|value_head)[^/]*\.safetensors"
)
STAGES = "modules.json"  # of sentence-transformers
STACKED = "experts are stored together"
BELOW = "weights in a folder below the model"
_BELOW = (".safetensors", ".safetensors.index.json", *OTHER_WEIGHTS)
_FEW_SHARDS = 16
_SHORT = 2**19  # bytes of an index or of a header: some 4,000 tensors


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors model directory. `tensors` is in file order, then in the order of the data.

    undecoded: tensors as they are on disk, if `tensors` holds weights decoded from several of them.
    hub_id:    the name by which the user gave it, if it was fetched from the Hub.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    shards: tuple[str, ...]  # weight files, in order
    config: Settings
    aux: dict[str, int]  # every other file to carry along: relative path -> bytes
    left_out: dict[str, str]  # files that are not carried along -> why
    problems: list[QuantError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    undecoded: dict[str, StoredTensor] | None = None
    stamps: dict[str, tuple[int, int]] = field(default_factory=dict)  # file -> bytes, mtime in ns
    hub_id: str | None = None
    in_memory: bool = False  # whether its weights are those of a model in memory
    weight_hashes: dict[str, dict[str, Any]] | None = None  # of weight files: see `planning.files`
    rotation: dict[str, Any] | None = None  # JSON-able: see `checkpoint.rotation.rotation`

    @property
    def on_disk(self) -> dict[str, StoredTensor]:
        """Every tensor that a file holds."""
        return self.tensors if self.undecoded is None else self.undecoded

    @property
    def text_config(self) -> Settings:
        """The part of config.json that describes the language model."""
        return language_model(self.config)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(stored.nbytes for stored in self.on_disk.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every name, dtype, shape, place and file size, and config.json.

        Identifies the model from its headers; a change of weight values alone does not show.
        """
        digest = hashlib.sha256()
        for name, stored in self.on_disk.items():
            spec = stored.spec
            line = f"{stored.file.name}\0{stored.offset}\0{name}\0{spec.dtype}\0{spec.shape}\n"
            digest.update(line.encode())
        for shard in self.shards:
            digest.update(f"{shard}\0{(self.path / shard).stat().st_size}\n".encode())
        config = self.path / CONFIG
        digest.update(read_bytes(config) if config.is_file() else b"")
        return digest.hexdigest()

    def plain_config(self) -> dict[str, bytes]:
        """config.json as `config` has it, without a byte order mark, by its name; empty if it is the
        file as it is."""
        if self.rotation is not None and self.rotation["untied_bytes"]:
            return {CONFIG: f"{json.dumps(self.config.plain(), indent=2)}\n".encode()}
        path = self.path / CONFIG
        marked = has_byte_order_mark(path)
        return {CONFIG: read_bytes(path).removeprefix(codecs.BOM_UTF8)} if marked else {}

    def specs(self) -> Iterator[TensorSpec]:
        """The spec of every tensor, in order."""
        return (stored.spec for stored in self.tensors.values())


def open_checkpoint(path: Path, progress: Progress = SILENT) -> Checkpoint:
    """The checkpoint at `path`. InputError for its first fault."""
    checkpoint = scan_checkpoint(path, progress)
    if checkpoint.problems:
        raise checkpoint.problems[0]
    return checkpoint


def must_be_unchanged(checkpoint: Checkpoint) -> None:
    """InputError if a file of the checkpoint has changed since it was opened.

    Sizes and times of all files are compared, and the headers and config.json are read again.
    """
    if isinstance(checkpoint.path, RemoteFolder):
        from quantcli.checkpoint.remote.mounts import changed_files  # imports this module

        for name in changed_files(checkpoint.path, checkpoint.stamps):
            raise _changed(checkpoint.path / name)
        return
    for name, stamp in checkpoint.stamps.items():
        file = checkpoint.path / name
        try:
            changed = _stamp(file) != stamp
        except OSError as error:
            if error.errno not in ABSENT:
                raise MachineError(f"cannot read: {error.strerror}", where=str(file)) from None
            changed = True
        if changed:
            raise _changed(file)
    if scan_checkpoint(checkpoint.path).fingerprint != checkpoint.fingerprint:
        raise _changed(checkpoint.path)


def restamped(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as it is on another machine, where its files may have other times."""
    stamps = {name: _stamp(checkpoint.path / name) for name in checkpoint.stamps}
    return replace(checkpoint, stamps=stamps)


def _stamp(file: Path) -> tuple[int, int]:
    if isinstance(file, RemoteFile) and file.place is not None:
        return file.place.stamp
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _changed(path: Path) -> InputError:
    return InputError(
        "the model changed while it was read",
        where=str(path),
        fix="let nobody write to the model, and run again with --fresh",
    )


def scan_checkpoint(path: Path, progress: Progress = SILENT) -> Checkpoint:
    """The checkpoint at `path`; its faults are listed in `problems`.

    progress: gets a line before many headers are read.

    Raises InputError only if nothing can be shown: no directory, no weights, a damaged header.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise InputError("no such model directory", where=str(path), fix="check the path") from None
    except OSError as error:
        raise MachineError(f"cannot read: {error.strerror}", where=str(path)) from None
    if not stat.S_ISDIR(status.st_mode):
        raise InputError(
            "MODEL must be a directory with safetensors files",
            where=str(path),
            fix="give the folder that holds config.json",
        )
    root = as_remote(path.resolve())
    problems: list[QuantError] = []
    notes: list[str] = [*root.notes] if isinstance(root, RemoteFolder) else []
    files, left_out = list_files(root)
    stamps = {name: _stamp(root / name) for name in files}
    if PART in files:
        raise _is_part(read_json_file(root / PART), root)
    if not isinstance(root, RemoteFolder) and _is_large(root, files):
        progress.say(f"reading the headers of {path}")
    index, shards = choose_files(root, files, left_out, problems)
    tensors = _read_tensors(root, shards, problems)
    if index is not None:
        _compare(index, tensors, shards, problems, notes)
    config = _read_config(root, files, problems)
    notes += [*_odd(config, tensors), *_notes_below(left_out, files)]
    gone = {*shards, *left_out, INDEX}  # the index is made anew
    aux = {name: size for name, size in files.items() if name not in gone}
    marked = [name for name in aux if name.endswith(".json") and has_byte_order_mark(root / name)]
    notes += [
        f"`{n}` begins with a byte order mark, at which engines stop" for n in marked if n != CONFIG
    ]
    stamps = {name: stamp for name, stamp in stamps.items() if name in aux or name in shards}
    if not problems:  # else tensors may be missing
        problems += _contradictions(config, tensors)
    return Checkpoint(
        root, tensors, tuple(shards), config, aux, left_out, problems, notes, None, stamps
    )


def _contradictions(config: Settings, tensors: dict[str, StoredTensor]) -> list[InputError]:
    """What config.json says otherwise than the headers, and sizes in it that are not numbers."""
    from quantcli.checkpoint.config.sizes import contradictions  # imports this module

    try:
        return list(contradictions(config, (stored.spec for stored in tensors.values())))
    except InputError as error:
        return [error]


def _is_large(root: Path, files: dict[str, int]) -> bool:
    """Whether headers may take longer to read than a user waits without a word: more than a few files,
    or thousands of tensors."""
    shards = [name for name in files if name.endswith(".safetensors")]
    if len(shards) > _FEW_SHARDS or INDEX in files:
        return len(shards) > _FEW_SHARDS or files[INDEX] > _SHORT
    return any(_SHORT < _header_nbytes(root / name) < files[name] for name in shards)


def _header_nbytes(file: Path) -> int:
    """Bytes of a header as the file says; more than the file has, if it is damaged."""
    try:
        with file.open("rb") as stream:
            return int.from_bytes(stream.read(8), "little")
    except OSError as error:
        raise MachineError(f"cannot read: {error.strerror}", where=str(file)) from None


def _odd(config: Settings, tensors: dict[str, StoredTensor]) -> Iterator[str]:
    """Notes: not errors, but worth reading."""
    if config and "model_type" not in config:
        yield f"{CONFIG} names no model_type: engines may not know what this is"
    floats = all(stored.spec.dtype in FLOATS for stored in tensors.values())
    for level in (config, *(inner for _, inner in config.inner())):
        for key in QUANTIZATION_KEYS:
            if floats and key in level:
                yield f"`{level.key_path(key)}` in {CONFIG} is stale: the weights are float"
    for name, stored in tensors.items():
        if len(stored.spec.shape) >= 3 and "experts" in name.split("."):
            yield f"{STACKED}, such as `{name}` {stored.spec}"
            return


def read_json_file(path: Path) -> dict[str, Any]:
    """A JSON object that came with a model: see `read_table` of core/untrusted."""
    return dict(tables.read_table(path).value)


def read_table(path: Path) -> Settings:
    """The same, as a table whose values are read by type."""
    return Settings(read_json_file(path), path.name, str(path))


def _is_part(entry: dict[str, Any], root: Path) -> InputError:
    numbers = [entry.get(key) for key in ("part", "of")]
    which = "part {} of {}".format(*numbers) if all(type(n) is int for n in numbers) else "a part"
    fix = "put the parts together first: quantcli pack --merge OUT.part-* --out OUT"
    return InputError(f"this is {which} of a conversion", where=str(root), fix=fix)


def _read_index(root: Path, files: dict[str, int]) -> dict[str, Any] | None:
    if INDEX not in files:
        return None
    where = str(root / INDEX)
    index = read_json_file(root / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError("index has no `weight_map` of tensor names to files", where=where)
    if not weight_map:
        raise InputError("`weight_map` of the index is empty", where=where)
    sound: set[str] = set()
    for tensor, shard in weight_map.items():
        if fault := tensor_name_fault(tensor):
            raise InputError(fault, where=where)
        if isinstance(shard, str) and shard in sound:
            continue
        place, shard_text = f"{where}, tensor `{tensor}`", reprlib.repr(shard)
        if not isinstance(shard, str):
            raise InputError(f"{shard_text} is not the name of a file", where=place)
        if fault := file_name_fault(shard, folders=False):
            raise InputError(fault, where=place)
        if shard.lower().endswith(PICKLES):
            raise InputError(f"`{shard}` is a pickle file", where=place, fix=_PICKLE_FIX)
        if not shard.endswith(".safetensors"):
            raise InputError(f"`{shard}` is not a safetensors file", where=place)
        sound.add(shard)
    return index


_PICKLE_FIX = (
    "pickle files can run code when they are read: get the model as safetensors, or convert it "
    "in a sandbox you trust"
)


def choose_files(
    root: Path, files: dict[str, int], left_out: dict[str, str], problems: list[QuantError]
) -> tuple[dict[str, Any] | None, list[str]]:
    """The index, and the weight files of a model whose files are `files` (path -> bytes).

    root: holds the index and `modules.json`, if `files` has them. left_out gets the weights that are
    not the model's, and why; problems those that are missing. InputError if no weights can be read.
    """
    index = _read_index(root, files)
    shards = _choose_shards(root, files, index, problems, left_out)
    for name in _weights_below(root, files):
        left_out[name] = f"{BELOW}, {decimal(files[name])}"
    return index, shards


def _choose_shards(
    root: Path,
    files: dict[str, int],
    index: dict[str, Any] | None,
    problems: list[QuantError],
    left_out: dict[str, str],
) -> list[str]:
    """The weight files: those of the index; else `model.safetensors` alone, as transformers reads it;
    else every .safetensors file that does not belong to something else, as vLLM reads them."""
    present = sorted(name for name in files if "/" not in name and name.endswith(".safetensors"))
    if any(_ADAPTER.match(name) for name in files) and _ADAPTER_CONFIG in files:
        left_out[_ADAPTER_CONFIG] = "of an adapter, whose weights are left out"
    if index is not None:
        listed = dict.fromkeys(sorted(set(index["weight_map"].values())))
        for shard in listed:
            if shard not in files:
                problems.append(_missing(root, shard, "listed in the index"))
        for name in present:
            if name not in listed:
                left_out[name] = f"not listed in {INDEX}"
        return [shard for shard in listed if shard in files]
    if not present:
        pickles = [name for name in files if name.lower().endswith(PICKLES)]
        if pickles:
            raise InputError(
                f"weights are pickle files, such as `{pickles[0]}`",
                where=str(root),
                fix=_PICKLE_FIX,
            )
        raise InputError(
            "no .safetensors file here", where=str(root), fix="MODEL is the folder with config.json"
        )
    if all(map(_ADAPTER.match, present)):
        raise InputError(
            "these are the weights of an adapter, not of a model",
            where=f"{root}, {present[0]}",
            fix="merge the adapter into its model first",
        )
    whole = [name for name in present if name == "model.safetensors"]
    others = [name for name in present if not _NOT_THE_MODEL.match(name)]
    shards = whole or others or present
    for name in present:
        if name not in shards:
            left_out[name] = _why_no_shard(name, shards)
    # Without an index the names are all that tells how many shards there should be.
    matches = filter(None, map(_NUMBERED.fullmatch, shards))
    for stem, width, total in dict.fromkeys((m["stem"], len(m["part"]), m["total"]) for m in matches):
        names = (f"{stem}-{n:0{width}d}-of-{total}.safetensors" for n in range(1, int(total) + 1))
        absent = itertools.islice((name for name in names if name not in files), 10)
        problems += [_missing(root, name, "the other shards' names call for it") for name in absent]
    return shards


def _why_no_shard(name: str, shards: list[str]) -> str:
    if name.startswith("consolidated"):
        return "the same weights in another layout"
    if _ADAPTER.match(name):
        return "weights of an adapter"
    return f"the model is in {shards[0]}" if len(shards) == 1 else "not among the model's shards"


def _weights_below(root: Path, files: dict[str, int]) -> list[str]:
    """Weights in folders below the model's, which no engine loads as the model, and their indexes.

    Folders that modules.json names are parts of a pipeline of sentence embeddings, and stay.
    """
    path = root / STAGES
    stages = parse_json(read_bytes(path), str(path)) if STAGES in files else []
    entries = stages if isinstance(stages, list) else []
    kept = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    folders = {name: name.rpartition("/")[0] for name in files if name.lower().endswith(_BELOW)}
    return [name for name, folder in folders.items() if folder and folder not in kept]


def _notes_below(left_out: dict[str, str], files: dict[str, int]) -> Iterator[str]:
    """A note for each folder of such weights."""
    names = [name for name in files if left_out.get(name, "").startswith(BELOW)]
    for folder, group in itertools.groupby(names, key=lambda name: name.rpartition("/")[0]):
        sizes = [files[name] for name in group]
        yield f"left out {count(sizes, 'file')} of `{folder}/`: {BELOW}, {decimal(sum(sizes))}"


def _missing(root: Path, shard: str, why: str) -> InputError:
    return InputError(
        f"shard `{shard}` is missing ({why})", where=str(root), fix="fetch the model again"
    )


def _read_tensors(root: Path, shards: list[str], problems: list[QuantError]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for stored in read_header(root / shard)[0]:
            name = stored.spec.name
            if name in tensors:
                problems.append(
                    InputError(
                        f"tensor `{name}` stands in two shards",
                        where=f"{tensors[name].file.name} and {shard} in {root}",
                        fix="engines would load whichever comes last: remove the stale file",
                    )
                )
                continue
            tensors[name] = stored
    return tensors


def _compare(
    index: dict[str, Any],
    tensors: dict[str, StoredTensor],
    shards: list[str],
    problems: list[QuantError],
    notes: list[str],
) -> None:
    weight_map = index["weight_map"]
    for name, shard in weight_map.items():
        if shard not in shards:
            continue  # the missing shard is a problem already
        if name not in tensors:
            problems.append(_disagrees(f"lists tensor `{name}`, which no shard holds"))
        elif tensors[name].file.name != shard:
            file = tensors[name].file.name
            problems.append(_disagrees(f"says `{name}` is in `{shard}`; it is in `{file}`"))
    for name, stored in tensors.items():
        if name not in weight_map:
            problems.append(_disagrees(f"does not list `{name}`, which `{stored.file.name}` holds"))
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    real = sum(stored.spec.nbytes for stored in tensors.values())
    if isinstance(total, int) and total != real and not problems:
        notes.append(f"{INDEX} says total_size {total}; the tensors take {real} bytes")


def _disagrees(what: str) -> InputError:
    return InputError(f"index {what}", where=INDEX, fix="fetch the index and the shards again")


def _read_config(root: Path, files: dict[str, int], problems: list[QuantError]) -> Settings:
    if CONFIG not in files:
        problems.append(
            InputError("model has no config.json", where=str(root), fix="fetch the whole model folder")
        )
        return Settings({})
    return read_table(root / CONFIG)
