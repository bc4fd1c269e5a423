"""A release file: one model, and the checkpoints that are made of it.

Read as strictly as a recipe, and without schemes and targets, which need torch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from quantcli.core.errors import InputError, one_of
from quantcli.core.place import expanded
from quantcli.core.untrusted.yaml_text import write_value
from quantcli.recipe.document import Assignment, Document, document_of, load_document
from quantcli.recipe.fields import Block, Calibration, FileVersion, Verify, listed
from quantcli.recipe.shipped import shipped_recipes
from quantcli.recipe.written import explain

RELEASE = "the release"  # the name of one that is not a file
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_FOLDERS = (".partial", ".replaced", ".calibration")  # ends of folders that stand next to an output
PLACEHOLDER = "{name}"


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and not text.endswith(_FOLDERS)


def _check_name(value: Any) -> str:
    if not isinstance(value, str) or not _is_name(value):
        raise ValueError("expected a name such as w8a8-smooth: letters, digits, `.`, `_` and `-`")
    return value


def _check_reference(value: Any) -> str | bool:
    if not isinstance(value, str | bool):
        raise ValueError("expected true, false, or a model")
    return value


def _number_as_text(value: Any) -> Any:
    """As in `tp: 2`."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _entry(value: Any) -> Any:
    return {"recipe": value} if isinstance(value, str) else value


class CheckpointEntry(Block):
    """One checkpoint of a release."""

    recipe: str = Field(description="a shipped recipe by name, or a file next to this one")
    name: Annotated[str, BeforeValidator(_check_name, json_schema_input_type=str)] | None = Field(
        None, description="its folder's name [default: the recipe's]; must be unique"
    )
    set: dict[str, Any] | None = Field(
        None, description="changes of the recipe by key, such as rules.0.scheme: keep"
    )
    out: str | None = Field(None, description="folder or address to write, in place of OUTPUT/NAME")


class ReleaseVerify(Verify):
    """How the checkpoints are verified once they are written: options of `quantcli verify`."""

    full: bool = Field(False, description="read every byte: hashes, NaN, ranges")
    against: Annotated[
        str | bool, BeforeValidator(_check_reference, json_schema_input_type=bool | str)
    ] = Field(False, description="true: compare with the model; or with another one")
    run: bool = Field(False, description="run both on `data`, as the engine computes")
    data: (
        Annotated[
            list[str],
            BeforeValidator(listed, json_schema_input_type=str | list[str]),
            Field(min_length=1),
        ]
        | None
    ) = Field(None, description="text for `run`, or a list of texts; limits hold for each")
    samples: Annotated[int, Field(gt=0, le=2**20)] = Field(32, description="windows of each text")
    length: Annotated[int, Field(gt=1, le=2**20)] = Field(256, description="tokens of each window")
    tp: Annotated[
        str, BeforeValidator(_number_as_text, json_schema_input_type=str | Annotated[int, Field(ge=1)])
    ] = Field("1", description="tensor parallel sizes to serve with, as in 1,2,4")


class ReleaseFile(Block):
    """A release file."""

    version: FileVersion = None
    checkpoints: list[
        Annotated[
            CheckpointEntry,
            BeforeValidator(_entry, json_schema_input_type=str | CheckpointEntry),
        ]
    ] = Field(min_length=1, description="recipes, or mappings with a recipe and options")
    model: str | None = Field(None, description="directory, address or Hub id; --model wins")
    output: str | None = Field(
        None,
        description="folder or address; each checkpoint goes to OUTPUT/NAME, or to the place that "
        "`{name}` has in it; --out wins",
    )
    calibration: Calibration | None = Field(
        None, description="text and options for all that need data, over the recipes' own"
    )
    set: dict[str, Any] | None = Field(
        None, description="changes of all recipes by key, such as max_shard: 2GB"
    )
    verify: ReleaseVerify | None = Field(
        None, description="verify the checkpoints once they are written"
    )


@dataclass(frozen=True)
class ReleaseEntry:
    """One checkpoint of a release as it is written.

    recipe:    the name of a shipped recipe, or the path of a file.
    overrides: changes of the recipe: those for all, then its own.
    out:       where it goes; None: OUTPUT/NAME.
    where:     its place in the file.
    """

    name: str
    recipe: str
    overrides: tuple[Assignment, ...]
    out: str | None
    where: str


@dataclass(frozen=True)
class WrittenRelease:
    """The keys of a release file, and their places.

    calibration: changes of recipes that need data; they come before those of entries.
    """

    file: ReleaseFile
    document: Document
    entries: tuple[ReleaseEntry, ...]
    calibration: tuple[Assignment, ...]

    def only(self, names: Collection[str]) -> tuple[ReleaseEntry, ...]:
        """The entries of these names, in the order of the file; all if there are none. InputError for
        a name that no entry has."""
        own = [entry.name for entry in self.entries]
        for name in names:
            if name not in own:
                what, where = f"no checkpoint is named `{name}`", f"--only {shlex.quote(name)}"
                raise InputError(what, where=where, fix=one_of(name, own))
        return tuple(entry for entry in self.entries if not names or entry.name in names)

    def path(self, text: str) -> str:
        """A file that the release names, as seen from here."""
        return _from_here(self.document, text)

    def place(self, entry: ReleaseEntry, output: str) -> str:
        """Where an entry goes, if OUTPUT is `output`."""
        if entry.out is not None:
            return entry.out
        if PLACEHOLDER in output:
            return output.replace(PLACEHOLDER, entry.name)
        if not output:
            raise InputError("`--out` or `output` is empty", where=entry.where, fix="name a folder")
        return f"{output.rstrip('/')}/{entry.name}"


GivenRelease = str | Path | Mapping[str, Any]  # a file, or its content


def read_release(release: GivenRelease) -> WrittenRelease:
    """Read a release: a file, or a mapping with its content. InputError with file:line."""
    if isinstance(release, Mapping):
        document = document_of(release, RELEASE)
    else:
        document = load_document(_file(release), "release file", "`checkpoints`")
    document.check_version("release file")
    try:
        file = ReleaseFile.model_validate(document.data)
    except ValidationError as error:
        raise explain(error, document, ReleaseFile, (), "docs/release.md") from None
    shared = _assignments(document, ("set",), file.set or {})
    entries = []
    for number, entry in enumerate(file.checkpoints):
        place = ("checkpoints", number)
        entries.append(
            ReleaseEntry(
                name=entry.name or _default_name(document, place, entry.recipe),
                recipe=_recipe(document, entry.recipe),
                overrides=(*shared, *_assignments(document, (*place, "set"), entry.set or {})),
                out=entry.out,
                where=document.where(place),
            )
        )
    _check_unique(entries)
    return WrittenRelease(file, document, tuple(entries), _calibration(document, file.calibration))


def release_schema() -> str:
    """The JSON Schema of release files, for editors, as text; always the same bytes."""
    schema = ReleaseFile.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "quantcli release"
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def _file(release: str | Path) -> Path:
    """The release file. InputError if it does not exist, or is a recipe's name."""
    path = Path(release)
    if path.is_dir() or not path.exists():
        what = "the release file is a directory" if path.is_dir() else "the release file does not exist"
        fix = "name a YAML file with `checkpoints`: docs/release.md has an example"
        if str(release) in shipped_recipes():
            what, fix = f"`{release}` is a recipe, not a release file", f"quantcli quantize {release}"
        raise InputError(what, where=str(release), fix=fix)
    return path


def _default_name(document: Document, place: Sequence[str | int], recipe: str) -> str:
    """The recipe's name. InputError if no checkpoint can have it."""
    name = Path(recipe).stem
    if not _is_name(name):
        where = document.where((*place, "recipe"))
        what = f"`{name[:80]}` cannot name a folder"
        raise InputError(what, where=where, fix="give the checkpoint a `name`")
    return name


def _recipe(document: Document, recipe: str) -> str:
    """A recipe as seen from here: a file that exists next to the release's, or else what it says."""
    path = _from_here(document, recipe)
    return path if os.path.isfile(path) else recipe  # noqa: PTH113 - false for a name that is too long


def _from_here(document: Document, text: str) -> str:
    """A path that is relative to the release file."""
    if text.startswith("datasets:"):
        return text
    return os.path.normpath(document.path.parent / expanded(text))


def _assignments(
    document: Document, place: tuple[str | int, ...], table: Mapping[str, Any]
) -> tuple[Assignment, ...]:
    """The changes of a `set` block; each has its place in the file.

    InputError for a key that is not one, and for values that `--set` cannot give.
    """
    changes = []
    for key, value in table.items():
        where = document.where((*place, key))
        if "=" in key or not key:
            what = f"`{key}` is not a key of a recipe"
            raise InputError(what, where=where, fix="write for example rules.0.scheme: keep")
        if key == "calibration.data" and isinstance(value, str):
            value = _from_here(document, value)
        elif key == "calibration" and isinstance(value, dict) and isinstance(value.get("data"), str):
            value = {**value, "data": _from_here(document, value["data"])}
        try:
            text = write_value(value)
        except ValueError:
            raise InputError(f"`{key}` is not a finite number", where=where) from None
        changes.append(Assignment.at(f"{key}={text}", where))
    return tuple(changes)


def _calibration(document: Document, block: Calibration | None) -> tuple[Assignment, ...]:
    """The keys of `calibration` that the file has, as changes of recipes."""
    given = {} if block is None else {key: getattr(block, key) for key in block.model_fields_set}
    if given.get("data") is not None:
        given["data"] = _from_here(document, given["data"])
    return tuple(
        Assignment.at(
            f"calibration.{key}={write_value(given[key])}", document.where(("calibration", key))
        )
        for key in sorted(given)
    )


def _check_unique(entries: Sequence[ReleaseEntry]) -> None:
    """InputError if two checkpoints have the same name."""
    first: dict[str, ReleaseEntry] = {}
    for entry in entries:
        other = first.setdefault(entry.name, entry)
        if other is not entry:
            what = f"two checkpoints are named `{entry.name}`"
            raise InputError(
                what, where=entry.where, fix=f"give one of them another `name`; see {other.where}"
            )
