"""What is generated is fresh; what is shipped works."""

import importlib.util
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from quantcli.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_are_fresh():
    for path, content in generator().generated().items():
        assert path.read_text() == content, f"{path.name} is stale: run `make docs`"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_fit_the_schema(recipe):
    schema = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(recipe.read_text()), schema)
    assert load_recipe(recipe).rules
    assert recipe.read_text().startswith("#"), "a recipe says when to use it"


def test_readme_names_every_recipe_and_command():
    readme = (ROOT / "README.md").read_text()
    for recipe in RECIPES:
        assert f"| `{recipe.stem}` |" in readme
    for command in generator().COMMANDS:
        assert f"quantcli {command}".strip() in readme
