"""The files of a model directory: which there are, and which are not carried along."""

from __future__ import annotations

import codecs
import os
import re
import stat
from pathlib import Path

from quantcli.core.disk import ABSENT
from quantcli.core.errors import InputError, MachineError
from quantcli.core.untrusted.names import printable

# The only index that engines read. Source: vllm 0.32.0,
# model_executor/model_loader/weight_utils.py:476.
INDEX = "model.safetensors.index.json"
PART = "quantcli_part.json"  # in place of a manifest, if a folder holds a part
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
OTHER_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".npz")
WEIGHTS = ".safetensors"  # ends the name of a weight file
STALE = "an index, a signature or a quantization file, true only for the weights it was made for"
_HIDDEN = "not part of the model"
_UNPRINTABLE = "its name has control characters"
# Files that describe the source's own quantization or shards, or sign it: wrong beside new weights.
_STALE = re.compile(
    r".*\.index\.json|.*quant_model_description.*\.json|hf_quant_config\.json"
    r"|quanti?z?e?_config\.json|quantcli_((manifest|part)\.json|(source_)?recipe\.yaml)|model\.sig"
)

_BLOB = re.compile(
    r"[0-9a-f]{40}|[0-9a-f]{64}"
)  # SHA-1 of small files, as in git; SHA-256 of large ones
_SHARED_BLOB = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")
_STORE_MARKER = ".huggingface-shared-blobs"


def list_files(root: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Every file below `root` (relative path -> bytes), and what not to carry along and why.

    Raises InputError for a link out of `root` and for what is neither file nor folder.
    """
    files: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        for name in sorted(folders):
            child = Path(folder) / name
            relative = child.relative_to(root).as_posix() + "/"
            if not name.isprintable():
                folders.remove(name)
                left_out[f"'{printable(relative)}'"] = _UNPRINTABLE
            elif _is_hidden(name):
                folders.remove(name)
                left_out[relative] = _HIDDEN
            elif child.is_symlink():
                _contained(child, root)
                left_out[relative] = "a link to a folder"
        folders.sort()
        for name in sorted(names):
            child = Path(folder) / name
            relative = child.relative_to(root).as_posix()
            if not name.isprintable():
                left_out[f"'{printable(relative)}'"] = _UNPRINTABLE
                continue
            files[relative] = _contained(child, root)
            if reason := why_left_out(relative):
                left_out[relative] = reason
    return files, left_out


def has_byte_order_mark(path: Path) -> bool:
    """Whether a file begins with the UTF-8 byte order mark; no if there is none that we may read.

    We read such JSON; transformers and engines do not. Raises MachineError if the disk fails.
    """
    try:
        with path.open("rb") as file:
            return file.read(3) == codecs.BOM_UTF8
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return False
    except OSError as error:
        raise MachineError(f"cannot read: {error.strerror}", where=str(path)) from None


def _is_hidden(folder: str) -> bool:
    return folder.startswith(".") or folder == "__pycache__"


def why_left_out(name: str) -> str | None:
    """Why a file of a model, by its path, is not carried along; None if it is."""
    *folders, base = name.split("/")
    if any(map(_is_hidden, folders)):
        return _HIDDEN
    if base.lower().endswith(PICKLES):
        return "may hold pickled code, which is never read or passed on"
    if folders:
        return None
    if base.lower().endswith(OTHER_WEIGHTS):
        return "the same weights in another format"
    if base != INDEX and _STALE.fullmatch(base):
        return STALE
    return None


def _unreadable(error: OSError) -> None:
    raise MachineError(f"cannot read: {error.strerror}", where=str(error.filename)) from None


def _contained(file: Path, root: Path) -> int:
    """Bytes of `file`; InputError if it is a link out of the model or not a regular file.

    The one exception is a cache of the Hub: its snapshots link to the sibling folder `blobs`, and any
    folder may link to a blob, see `_is_hub_blob`.
    """
    try:
        target = file.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError) as error:  # pathlib reports a circle of links as RuntimeError
        if isinstance(error, OSError) and error.errno not in ABSENT:
            raise MachineError(f"cannot read: {error.strerror}", where=str(file)) from None
        raise InputError("link leads nowhere", where=str(file), fix="fetch the file again") from None
    if not target.is_relative_to(root) and not hub_blob(target, root):
        raise InputError(
            "link leads out of the model directory",
            where=f"{file} -> {target}",
            fix="replace the link by the file itself",
        )
    if file.is_dir():
        return 0
    if not stat.S_ISREG(status.st_mode):
        raise InputError(
            "not a regular file", where=str(file), fix="remove it from the model directory"
        )
    return status.st_size


def hub_blob(target: Path, root: Path) -> bool:
    """Whether a file, its path resolved, is in the Hub's cache, which `root` may link to: a blob, or
    anything in the folder of the blobs if `root` is a snapshot next to it."""
    of_snapshot = root.parent.name == "snapshots" and target.is_relative_to(
        root.parent.parent / "blobs"
    )
    return of_snapshot or (target.is_file() and _is_hub_blob(target))


def _is_hub_blob(target: Path) -> bool:
    """Whether a file, its path resolved, is a blob in a cache of the Hub.

    CACHE/models--ORG--NAME/blobs/HASH, or CACHE/blobs/HA/HASH in the store that the repositories of a
    cache share.
    """
    # A hostile model may link to any file of the user, which would be copied into OUT and passed on.
    # But it can neither move nor rename that file, nor write outside of its own folder. So the place of
    # the file is the evidence, after all links are resolved: it is named by the hash of its content, in
    # folders that only the Hub's client names so, next to its `snapshots` or its marker. No keys and no
    # documents lie in such a place; a file of another cached model does, for those who know its hash. A
    # cache or a marker that came with the model gives nothing away: what lies in it came along, too.
    # HF_HOME is not asked: at the time of the download it may have been another one.
    folder, name = target.parent, target.name
    if folder.name == "blobs":
        repository = folder.parent
        is_blob = bool(_BLOB.fullmatch(name)) and repository.name.startswith("models--")
        return is_blob and (repository / "snapshots").is_dir()
    store = folder.parent
    if store.name != "blobs" or not _SHARED_BLOB.fullmatch(f"{folder.name}/{name}"):
        return False
    try:
        return stat.S_ISREG((store / _STORE_MARKER).lstat().st_mode)
    except OSError:
        return False


JOURNAL = ".quantcli_journal"

SIGNATURE = "model.sig"  # over all other files, by the name that the reference client uses

MANIFEST = "quantcli_manifest.json"


RECIPE_FILE = "quantcli_recipe.yaml"

CARD = "README.md"  # the model card, by the name that the Hub looks for

SOURCE_RECIPE = "quantcli_source_recipe.yaml"  # of what was packed: for the other format
