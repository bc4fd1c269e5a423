"""The files of a model directory: which there are, and which are not carried along. Reads none."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from quantcli.core.errors import InputError, MachineError

# The only index that engines read. Source: vllm 0.32.0,
# model_executor/model_loader/weight_utils.py:476.
INDEX = "model.safetensors.index.json"
PART = "quantcli_part.json"  # in place of a manifest, if a folder holds a part
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_OTHER_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".npz")
STALE = "an index or a quantization file, true only for the weights it was made for"
_UNPRINTABLE = "its name has control characters"
# Files that describe the source's own quantization or shards: wrong beside new weights.
_STALE = re.compile(
    r".*\.index\.json|.*quant_model_description.*\.json|hf_quant_config\.json"
    r"|quanti?z?e?_config\.json|quantcli_((manifest|part)\.json|(source_)?recipe\.yaml)"
)


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
                left_out[ascii(relative)] = _UNPRINTABLE
            elif name.startswith(".") or name == "__pycache__":
                folders.remove(name)
                left_out[relative] = "not part of the model"
            elif child.is_symlink():
                _contained(child, root)
                left_out[relative] = "a link to a folder"
        folders.sort()
        for name in sorted(names):
            child = Path(folder) / name
            relative = child.relative_to(root).as_posix()
            if not name.isprintable():
                left_out[ascii(relative)] = _UNPRINTABLE
                continue
            files[relative] = _contained(child, root)
            if reason := _why_not(relative):
                left_out[relative] = reason
    return files, left_out


def _why_not(name: str) -> str | None:
    base = name.rpartition("/")[2]
    if base.lower().endswith(PICKLES):
        return "may hold pickled code, which is never read or passed on"
    if "/" in name:
        return None
    if base.lower().endswith(_OTHER_WEIGHTS):
        return "the same weights in another format"
    if base != INDEX and _STALE.fullmatch(base):
        return STALE
    return None


def _unreadable(error: OSError) -> None:
    raise MachineError(f"cannot read: {error.strerror}", where=str(error.filename)) from None


def _contained(file: Path, root: Path) -> int:
    """Bytes of `file`; InputError if it is a link out of the model or not a regular file.

    The one exception is the Hub cache, whose snapshots link to the sibling folder `blobs`.
    """
    try:
        target = file.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError):
        raise InputError("link leads nowhere", where=str(file), fix="fetch the file again") from None
    if not target.is_relative_to(root):
        blobs = root.parent.parent / "blobs"
        if root.parent.name != "snapshots" or not target.is_relative_to(blobs):
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


JOURNAL = ".quantcli_journal"

MANIFEST = "quantcli_manifest.json"


RECIPE_FILE = "quantcli_recipe.yaml"

SOURCE_RECIPE = "quantcli_source_recipe.yaml"  # of what was packed: for the other format
