"""Folders that hold parts of one conversion: their descriptions, and whether they make a whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

from quantcli.checkpoint.files import JOURNAL, MANIFEST, PART
from quantcli.checkpoint.manifest import read_sealed, tool_text
from quantcli.core.errors import InputError, other_version
from quantcli.planning.parts import MOST, PART_VERSION, Part

_ENTRY = {"bytes"}, {"bytes", "sha256", "blake3"}
AGAIN = "copy the part again, or run its `quantcli quantize --part` again with --force"


@dataclass(frozen=True)
class PartFolder:
    """One part on disk, as its description says.

    whole: the same for all parts of one conversion: `of`, `checksum`, `shards` (weight file -> part),
           `carried` (files next to the weights), `manifest` (without its files).
    files: files of this part, as the manifest will list them.
    """

    path: Path
    part: Part
    whole: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def checksum(self) -> bool:
        """Whether files were hashed."""
        return bool(self.whole["checksum"])


def read_part(folder: Path) -> PartFolder:
    """The part in `folder`. InputError if there is none, or if it was changed since it was written."""
    path = folder / PART
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder), fix="check the path")
    if not path.is_file():
        fix = "give the folders that `quantcli quantize --part` wrote, such as OUT.part-1-of-3"
        if (folder / JOURNAL).exists():
            raise InputError(
                "this part is not finished",
                where=str(folder),
                fix="run its `quantcli quantize --part` again: it goes on where it stopped",
            )
        if (folder / MANIFEST).exists():
            raise InputError("this is a whole checkpoint, not a part", where=str(folder), fix=fix)
        raise InputError("this is not a part of a conversion", where=str(folder), fix=fix)
    table = read_sealed(path, "description of the part", AGAIN)
    if (version := table.get("part_version")) != PART_VERSION or type(version) is not int:
        raise other_version("description of the part", version, PART_VERSION, str(path))
    try:
        return _parse(folder, table)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(
            "description of the part makes no sense to this version",
            where=str(path),
            fix="use the version of quantcli that wrote it, or run the part again",
        ) from None


def _parse(folder: Path, table: dict[str, Any]) -> PartFolder:
    """The part of a description. Any error here means a wrong type; `read_part` reports it."""
    part = Part(_int(table["part"]), _int(table["of"]))
    shards, carried, manifest, files = (
        table[key] for key in ("shards", "carried", "manifest", "files")
    )
    sound = (
        1 <= part.number <= part.of <= MOST
        and isinstance(carried, list)
        and isinstance(manifest["plan"], str)
        and isinstance(table["checksum"], bool)
        and isinstance(manifest, dict)
        and isinstance(manifest["recipe"], str)
        and all(isinstance(manifest[key], dict) for key in ("tool", "source"))
    )
    expected = {name for name, number in shards.items() if _int(number) == part.number}
    if part.carries:
        expected |= set(carried)
    names_sound = (
        all("/" not in name and name.endswith(".safetensors") for name in shards)
        and not set(carried) & shards.keys()
    )
    if not sound or not names_sound or expected != files.keys():
        raise ValueError
    if not all(map(_inside, [*shards, *carried])):
        raise ValueError
    keys = _ENTRY[table["checksum"]]
    for entry in files.values():
        hashes = all(isinstance(value, str) for key, value in entry.items() if key != "bytes")
        if entry.keys() != keys or _int(entry["bytes"]) < 0 or not hashes:
            raise ValueError
    whole = {key: table[key] for key in ("of", "checksum", "shards", "carried", "manifest")}
    return PartFolder(folder, part, whole, files)


def _int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _inside(name: str) -> bool:
    """Whether a file of this name stays inside its folder, and is not a file that quantcli writes."""
    path = PurePosixPath(name)
    plain = not path.is_absolute() and ".." not in path.parts and path.as_posix() == name
    return plain and name.isprintable() and name not in {MANIFEST, PART, JOURNAL, "."}


def check_set(parts: Sequence[PartFolder]) -> list[PartFolder]:
    """The parts in order. InputError unless they belong to one conversion and each is given once."""
    texts = [json.dumps(part.whole, sort_keys=True) for part in parts]
    most = Counter(texts).most_common(1)[0][0]
    usual = parts[texts.index(most)]
    for part, text in zip(parts, texts, strict=True):
        if text != most:
            how = _difference(usual.whole, part.whole)
            raise InputError(
                f"this part is of another conversion than {usual.path.name}: {how}",
                where=str(part.path),
                fix="run this part again as the others were",
            )
    by_number: dict[int, PartFolder] = {}
    for part in parts:
        other = by_number.setdefault(part.part.number, part)
        if other is not part:
            raise InputError(
                f"{part.part} is given twice",
                where=f"{other.path} and {part.path}",
                fix="leave one of them out",
            )
    of = usual.part.of
    missing = sorted(set(range(1, of + 1)) - by_number.keys())
    if missing:
        few = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        raise InputError(
            f"of {of} parts {len(missing)} "
            + ("is" if len(missing) == 1 else "are")
            + f" missing: {few}",
            where=str(usual.path.parent),
            fix=f"run `quantcli quantize --part {missing[0]}/{of}`, and give its folder too",
        )
    return [by_number[number] for number in sorted(by_number)]


def _difference(usual: dict[str, Any], odd: dict[str, Any]) -> str:
    """The difference of two conversions, as text."""
    if usual["of"] != odd["of"]:
        return f"it is one of {odd['of']} parts, that one of {usual['of']}"
    usual_manifest, odd_manifest = usual["manifest"], odd["manifest"]
    usual_tool, odd_tool = usual_manifest["tool"], odd_manifest["tool"]
    if usual_tool != odd_tool:
        return f"the version differs ({tool_text(odd_tool)}, {tool_text(usual_tool)})"
    usual_source, odd_source = usual_manifest["source"], odd_manifest["source"]
    if usual_source != odd_source:
        prints = [table.get("fingerprint") for table in (odd_source, usual_source)]
        return f"the model differs ({prints[0]!s:.12}, {prints[1]!s:.12})"
    if usual_manifest["recipe"] != odd_manifest["recipe"]:
        lines = (table["recipe"].splitlines() for table in (odd_manifest, usual_manifest))
        pairs = zip_longest(*lines, fillvalue="")
        first = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
        summary = " against ".join(f"`{line.strip():.60}`" for line in first)
        return f"the recipe differs, first in {summary}"
    if usual["checksum"] != odd["checksum"]:
        return "one was written with --checksum, the other without"
    keys = (key for key in sorted(usual_manifest.keys() | odd_manifest.keys()) if key != "plan")
    other = next((key for key in keys if usual_manifest.get(key) != odd_manifest.get(key)), None)
    if other is not None and other != "calibration":
        return f"{other} differs"
    return "the calibrations differ, or the files next to the model's weights"
