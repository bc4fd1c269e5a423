"""Write docs/cli.md from the `--help` texts and from the classes of results, and the schemas
docs/recipe.schema.json and docs/release.schema.json from the classes of these files.

`make docs` runs this; a test fails if a file is out of date.
"""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from quantcli.commands import results
from quantcli.commands.release import outcome as release
from quantcli.commands.trust import bom
from quantcli.commands.trust import sign as signing
from quantcli.recipe.json_schema import recipe_schema
from quantcli.recipe.methods import recipe_methods
from quantcli.recipe.release import release_schema

DOCS = Path(__file__).parent
COMMANDS = [
    "",
    "recommend",
    "inspect",
    "calibrate",
    "quantize",
    "release",
    "pack",
    "verify",
    "reproduce",
    "sign",
    "bom",
    "recipes",
]  # in the order of the README


# What a document has: the class of a result, or keys with their types and what they hold.
DOCUMENTS: dict[str, type[results.Result] | dict[str, tuple[str, str]]] = {
    "recommend MODEL": results.Recommendation,
    "recommend --devices": {
        "devices": ("list", "`name`, `also`, `kind`, `gb`, `engine`, `source` of each")
    },
    "inspect MODEL": results.Inspection,
    "inspect --outliers": results.Outliers,
    "inspect --support": results.Support,
    "calibrate": results.Calibrated,
    "quantize": results.Converted,
    "quantize --plan": {"plan": ("Planned", "what would be written; also if it misses `expect`")},
    "release": release.Released,
    "release --plan": {"plan": ("PlannedRelease", "what would be written; also if it misses `expect`")},
    "pack": results.Packed,
    "pack --plan": {"plan": ("Repacked | Merged", "what would be written")},
    "verify": results.Verification,
    "verify of several": results.Comparison,
    "reproduce": results.Reproduction,
    "sign": signing.Signature,
    "bom": bom.Bom,
    "recipes": {"recipes": ("list", "`name`, `purpose`, `target`, `calibration` of each")},
    "recipes show": {"name": ("str", "of the recipe"), "text": ("str", "of its file")},
    "--version": {"version": ("str", "of quantcli")},
}
PLANS = (
    results.Planned,
    results.Repacked,
    results.Merged,
    release.PlannedRelease,
    release.PlannedCheckpoint,
    release.ReleasedCheckpoint,
)
ENVELOPE = {
    "ok": ("bool", "whether the exit code is 0"),
    "schema_version": ("int", "1; it grows if a key changes its meaning or goes"),
    "error": ("Error | None", "`what`, `where` and `fix`, each a text or null; null if `ok` is true"),
    "exit_code": ("int", "that of the process"),
}
# keys of documents whose names in Python are other ones, or that Python does not have
_RENAMED = {(results.Repacked, "origin"): "from"}
_TYPES = {"str": "text", "Path": "text", "int": "number", "float": "number", "bool": "true or false",
          "Row": "object", "None": "null", "Error": "object",
          "Verification": "[object](#verify)"}  # fmt: skip


_FIELD = re.compile(r"^(\w+): +(.+(?:\n +.+)*)", re.MULTILINE)  # of a class, in its docstring


def keys_of(document: type[results.Result] | dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """The keys of a document: the type of each in Python, and what it holds."""
    if isinstance(document, dict):
        return document
    texts = dict(_described(document))
    keys = {}
    for field in fields(document):
        name = _RENAMED.get((document, field.name), field.name)
        keys[name] = (str(field.type), texts.get(field.name, ""))
    if document is results.Calibrated:
        keys["modules"] = ("dict[str, Row]", '"tokens", ... of each module that was measured, by name')
        methods = (method.edited_as for method in recipe_methods().values() if method.edited_as)
        keys |= dict.fromkeys(methods, ("list", "groups of channels that are so"))
        del keys["edited"]
    return keys


def _described(result: type) -> Iterator[tuple[str, str]]:
    """What the docstrings of a class and of those it derives from say of its fields."""
    for cls in reversed(result.__mro__):
        for name, about in _FIELD.findall((inspect.getdoc(cls) or "").replace("None", "null")):
            yield name, " ".join(about.split())


def _rows(keys: dict[str, tuple[str, str]]) -> str:
    rows = "| key | value | |\n|---|---|---|\n"
    for key, (type_, about) in keys.items():
        parts = [part.strip() for part in type_.split("|")]
        words = [_TYPES.get(part) or _container(part) for part in parts]
        rows += f"| `{key}` | {' or '.join(dict.fromkeys(words))} | {about.rstrip('.')} |\n"
    return rows


def _container(type_: str) -> str:
    if type_.startswith(("list", "dict")):
        return "list" if type_.startswith("list") else "object"
    return f"[{type_}](#{type_.lower()})"


def json_documents() -> str:
    """The keys of every command's document."""
    text = "\n## JSON documents\n\nEvery command prints one with `--json`. All of them begin with:\n\n"
    text += _rows(ENVELOPE)
    text += "\nThat of an error has no other key. If a plan misses `expect`, it has `plan`, too.\n"
    for command, document in DOCUMENTS.items():
        text += f"\n### {command}\n\n{_rows(keys_of(document))}"
    for plan in PLANS:
        text += f"\n### {plan.__name__}\n\n{_rows(keys_of(plan))}"
    return text


def cli_reference() -> str:
    """The help of every command, as a terminal of 100 columns shows it, and the keys of documents."""
    environment = {**os.environ, "COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    text = "# Command line\n\nGenerated from `--help` by `make docs`.\n"
    for command in COMMANDS:
        arguments = [sys.executable, "-m", "quantcli", *command.split(), "--help"]
        output = subprocess.check_output(arguments, env=environment, text=True)
        lines = [line.rstrip() for line in output.rstrip().splitlines()]
        screen = "\n".join(lines).replace("python -m quantcli", "quantcli")
        text += f"\n## quantcli {command}".rstrip() + f"\n\n```text\n{screen}\n```\n"
    return text + json_documents()


def generated() -> dict[Path, str]:
    """The content of every generated file."""
    return {
        DOCS / "cli.md": cli_reference(),
        DOCS / "recipe.schema.json": recipe_schema(),
        DOCS / "release.schema.json": release_schema(),
    }


if __name__ == "__main__":
    for path, content in generated().items():
        path.write_text(content)
        print(f"wrote {path.relative_to(DOCS.parent)}")
