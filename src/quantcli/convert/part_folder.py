"""Folders that hold parts of one conversion: their descriptions, and whether they make a whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quantcli.checkpoint.files import JOURNAL, MANIFEST, PART
from quantcli.checkpoint.manifest import check_files, read_sealed, tool_text
from quantcli.core.errors import InputError, other_version
from quantcli.core.untrusted.names import file_name_fault, printable
from quantcli.core.untrusted.tables import Table
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
    if (version := table.raw("part_version")) != PART_VERSION or type(version) is not int:
        raise other_version("description of the part", version, PART_VERSION, str(path))
    try:
        return _parse(folder, table)
    except InputError as error:
        raise InputError(
            f"description of the part makes no sense to this version: {error.what}",
            where=str(path),
            fix="use the version of quantcli that wrote it, or run the part again",
        ) from None


def _parse(folder: Path, table: Table) -> PartFolder:
    """The part of a description. InputError for a value that no part has."""
    part = Part(table.integer("part", least=1), table.integer("of", least=1, most=MOST))
    if part.number > part.of:
        table.refuse("part", f"is {part.number}, and there are {part.of}")
    numbers, carried = table.table("shards"), set(table.texts("carried"))
    shards = {name: numbers.integer(name) for name in numbers}
    _check_common(table.table("manifest"))
    for name in (*shards, *carried):
        _check_inside(table, name)
    for name in shards:
        if "/" in name or not name.endswith(".safetensors") or name in carried:
            numbers.refuse(name, "is not the name of a weight file")
    expected = {name for name, number in shards.items() if number == part.number}
    if part.carries:
        expected |= carried
    files = table.tables("files")
    if expected != files.keys():
        other = min(expected ^ files.keys())
        table.refuse("files", f"and the part differ in `{printable(other):.200}`")
    check_files(files)
    for entry in files.values():
        entry.only(_ENTRY[table.flag("checksum")])
    whole = {key: table.value[key] for key in ("of", "checksum", "shards", "carried", "manifest")}
    return PartFolder(folder, part, whole, {name: dict(entry.value) for name, entry in files.items()})


def _check_common(manifest: Table) -> None:
    """InputError for a manifest without its files that has values of other types."""
    for key in ("plan", "recipe"):
        manifest.text(key)
    for key in ("tool", "source"):
        manifest.table(key)


def _check_inside(table: Table, name: str) -> None:
    """InputError for a file that is not one in its folder, or that quantcli writes."""
    if (fault := file_name_fault(name)) is not None:
        raise InputError(fault, where=table.where)
    if name in {MANIFEST, PART, JOURNAL}:
        table.refuse(name, "is a file of another use")


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
