"""The manifest of an output: source, recipe, and the size and hash of every file, sealed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli import __version__
from quantcli.checkpoint.files import MANIFEST
from quantcli.core.errors import InputError, other_version
from quantcli.core.untrusted.names import file_name_fault
from quantcli.core.untrusted.tables import Table, parse_table, read_bytes

VERSION = 1  # of the form of manifests
_SEAL = "sha256"  # of the manifest without this key


def encode_manifest(table: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest, with a seal over all the rest."""
    rest = {key: value for key, value in table.items() if key != _SEAL}
    return _encode({**rest, _SEAL: hashlib.sha256(_encode(rest)).hexdigest()})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`. InputError if it was changed since it was sealed."""
    path = folder / MANIFEST
    table = read_sealed(path, "manifest", "copy the checkpoint again")
    if (version := table.raw("manifest_version")) != VERSION or type(version) is not int:
        raise other_version("manifest", version, VERSION, str(path))
    check_manifest(table)
    return dict(table.value)


def check_manifest(table: Table) -> None:
    """InputError for a value of another type than quantcli writes, and for a file that cannot be one in
    the folder. Anyone can seal a manifest."""
    for key in ("plan", "target", "serving_dtype", "recipe", "state"):
        table.text(key, None)
    if (source := table.table("source", None)) is not None:
        source.text("fingerprint", None)
        source.tables("files", None)
    if (tool := table.table("tool", None)) is not None:
        tool.text("version", None)
        packages = tool.table("packages", Table({}, table.where))
        for name in packages:
            packages.text(name)
    check_files(table.tables("files"))


def check_files(files: Mapping[str, Table]) -> None:
    """InputError for a name that no file in the folder can have, and for a size or a hash that is none.

    files: entries by name.
    """
    for name, entry in files.items():
        if (fault := file_name_fault(name)) is not None:
            raise InputError(fault, where=entry.where, fix=entry.fix)
        entry.integer("bytes")
        entry.digest("sha256", None)
        entry.digest("blake3", None)


def whole_manifest(content: bytes, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """The manifest in `content`; None if it is damaged, or if its files do not have their sizes.

    sizes: bytes of the files that are there, by name.
    """
    try:
        table = parse_table(content, MANIFEST)
        check_manifest(table)
    except InputError:
        return None
    listed = {name: entry.integer("bytes") for name, entry in table.tables("files").items()}
    whole = encode_manifest(table.value) == content
    return dict(table.value) if whole and all(sizes.get(k) == n for k, n in listed.items()) else None


@dataclass(frozen=True)
class Recorded:
    """What a manifest says of a calibration; None for what it does not say."""

    name: str | None = None
    text: str | None = None
    tokenizer: Mapping[str, str] | None = None
    statistics: str | None = None
    tool: str | None = None

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Recorded:
        """What its entry `calibration` says, which came with a checkpoint."""
        block = manifest.get("calibration")
        table = block if isinstance(block, dict) else {}
        text = table.get("text")
        text = text if isinstance(text, dict) else {}
        values = text.get("name"), text.get("sha256"), table.get("statistics"), table.get("tool")
        name, sha256, statistics, tool = (v if isinstance(v, str) else None for v in values)
        files = table.get("tokenizer")
        if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
            files = None
        return cls(name, sha256, files, statistics, tool)


def has_recipe(table: Mapping[str, Any], path: Path) -> bool:
    """Whether the recipe of a manifest is the content of this file."""
    text = table.get("recipe")
    if not isinstance(text, str) or not path.is_file():
        return False
    return read_bytes(path) == text.encode(errors="surrogatepass")  # halves of characters, as JSON has


def tool_of(packages: Mapping[str, str]) -> dict[str, Any]:
    """What makes a checkpoint, for its manifest. packages: see `Work.packages`."""
    tool: dict[str, Any] = {"name": "quantcli", "version": __version__}
    return {**tool, "packages": dict(packages)} if packages else tool


def tool_text(tool: Any) -> str:
    """The versions in a manifest that wrote it, as text; the manifest may be damaged."""
    table = tool if isinstance(tool, dict) else {}
    packages = table.get("packages")
    names = [("quantcli", table.get("version"))]
    names += sorted(packages.items()) if isinstance(packages, dict) else []
    return " with ".join(f"{name:.40} {version!s:.40}" for name, version in names)


def read_sealed(path: Path, what: str, fix: str) -> Table:
    """The table that `encode_manifest` wrote. InputError if the file was changed since."""
    content = read_bytes(path)
    table = parse_table(content, str(path), fix)
    if encode_manifest(table.value) != content:
        raise InputError(f"{what} was changed since it was written", where=str(path), fix=fix)
    return table


def _encode(table: dict[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
