"""The recipes that come with quantcli, by name; and which file or recipe a user means."""

from __future__ import annotations

import hashlib
import re
import shlex
import stat
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path

from quantcli.checkpoint.hub import HUB_ID
from quantcli.core.errors import InputError, closest, one_of
from quantcli.recipe.document import load_document

_HERE = Path(__file__).parent
_LISTED = "`quantcli recipes` lists the shipped ones"
AUTO = "auto"  # reserved: stands for the recipe that `recommend` puts first
USE = "--model MODEL --for 2x910B"
_START = {"quantize": "w8a8_dynamic", "calibrate": "w8a8_static"}  # command -> a recipe to begin with


@dataclass(frozen=True)
class ShippedRecipe:
    """One line about a shipped recipe.

    purpose: the first sentence of the file. calibration: whether a conversion calibrates.
    """

    name: str
    purpose: str
    target: str
    calibration: bool


@cache
def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes, by name: the files `recipes/NAME.yaml`.

    An installed package has the folder next to this module, see setup.py; a checkout, and so an
    editable install, has it at the top.
    """
    folder = _HERE / "recipes"
    if not folder.is_dir():
        folder = _HERE.parents[2] / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def sample_text() -> Path:
    """The calibration text that the shipped recipes name."""
    return next(iter(shipped_recipes().values())).parents[1] / "examples" / "calibration.txt"


def is_sample_text(path: str) -> bool:
    """Whether a file is the calibration text that the shipped recipes name."""
    return Path(path) == sample_text()


def is_sample_digest(sha256: str) -> bool:
    """Whether this is the sha256 (hex) of that text."""
    return hashlib.sha256(sample_text().read_bytes()).hexdigest() == sha256


def recipe_text(name: str) -> str:
    """The text of a shipped recipe. InputError for another name."""
    recipes = shipped_recipes()
    if name not in recipes:
        raise InputError(f"there is no recipe `{name}`", fix=one_of(name, recipes))
    return recipes[name].read_text(encoding="utf-8")


def describe_recipe(name: str) -> ShippedRecipe:
    """The line about a shipped recipe."""
    head = takewhile(lambda line: line.startswith("#"), recipe_text(name).splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in head)
    data = load_document(shipped_recipes()[name]).data
    target = data["target"]["name"] if isinstance(data["target"], dict) else data["target"]
    return ShippedRecipe(name, re.split(r"\.(?: |$)", text)[0], target, "calibration" in data)


def find_recipe(recipe: str | Path, command: str = "quantize") -> Path:
    """The file that `recipe` means: an existing file, or else the name of a shipped recipe.

    command: for the message if it is a model. Raises InputError if it is neither.
    """
    if str(recipe) == AUTO:
        what = f"`{AUTO}` stands for the first recipe for a device, and only `quantize` takes it"
        raise InputError(
            what, fix=f"quantcli recommend MODEL --for 2x910B, or quantcli quantize {AUTO} {USE}"
        )
    path, recipes = Path(recipe), shipped_recipes()
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return path
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:
        return path  # whoever opens it says why that fails
    if str(recipe) in recipes:
        return recipes[str(recipe)]
    raise _not_a_recipe(str(recipe), path, command)


def _not_a_recipe(name: str, path: Path, command: str) -> InputError:
    """What `name` is in place of a recipe: a model, another folder, or a misspelt name or path."""
    recipes = shipped_recipes()
    is_path = path.suffix.lower() in {".yaml", ".yml"} or path.stem in recipes
    on_hub = not is_path and not path.parent.is_dir() and HUB_ID.fullmatch(name)
    if on_hub or (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        what = "looks like a model of the Hub" if on_hub else "is a model"
        example = shlex.join(["quantcli", command, _START[command], "--model", name])
        return InputError(f"`{name}` {what}, not a recipe", fix=f"{example}; {_LISTED}")
    if path.is_dir():
        what = "the recipe is a directory, not a YAML file"
        return InputError(what, where=name, fix=f"name a file in it; {_LISTED}")
    near = f"`{path.stem}`" if path.stem in recipes else closest(path.stem, recipes)
    fix = f"did you mean {near}? {_LISTED}" if near else f"check the path; {_LISTED}"
    if len(path.parts) == 1 and not is_path:
        return InputError(f"there is no recipe `{name}`", fix=fix)
    return InputError("the recipe does not exist", where=name, fix=fix)
