"""What is generated is fresh; what is shipped works."""

import json
import re
import textwrap

import jsonschema
import pytest
import yaml

from quantcli.recipe.recipe import load_recipe
from quantcli.verification.outcome import CHECKS
from tests.e2e.conftest import run_cli
from tests.pages import PAGES, ROOT, anchors, broken, links, script

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_generated_files_are_fresh():
    for path, content in script("generate").generated().items():
        assert path.read_text() == content, f"{path.name} is stale: run `make docs`"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load_and_fit_the_schema(recipe):
    schema = json.loads((ROOT / "docs" / "recipe.schema.json").read_text())
    jsonschema.validate(yaml.safe_load(recipe.read_text()), schema)
    assert load_recipe(recipe).rules
    assert recipe.read_text().startswith("#"), "a recipe says when to use it"


def test_every_recipe_is_in_the_table():
    page = (ROOT / "docs" / "recipes.md").read_text()
    listed = run_cli("recipes", "--json").json["recipes"]
    assert len(listed) == len(RECIPES)
    for recipe in listed:
        needs = "yes" if recipe["calibration"] else "no"
        assert f"| `{recipe['name']}` | {needs} | {recipe['purpose']} | " in page


def test_readme_names_every_command():
    readme = (ROOT / "README.md").read_text()
    for command in script("generate").COMMANDS:
        assert f"quantcli {command}".strip() in readme


def test_the_picture_of_the_plan_is_fresh(monkeypatch):
    monkeypatch.chdir(ROOT)
    pictures = script("pictures")
    shown = pictures.words_of((pictures.IMAGES / "plan.svg").read_text())
    printed = pictures.settled(run_cli(*pictures.PLAN).out)
    assert shown == ["quantcli", "$", "quantcli", *pictures.PLAN, *printed.split()], (
        "run `make pictures`"
    )


def test_verify_md_has_a_row_for_every_check():
    page = (ROOT / "docs" / "verify.md").read_text()
    rows = re.findall(r"^\| (`[^|]+`) \| (structure|identity|full|against|run) \|", page, re.M)
    found = {name: depth for names, depth in rows for name in re.findall("`([^`]+)`", names)}
    assert found == {name: depth for name, (depth, _) in CHECKS.items()}


def excerpts(text):
    """The fenced blocks of a page that show a file: its path and the runs of lines between `...`."""
    for path, code in re.findall(r"^```python (\S+)\n(.*?)^```$", text, re.M | re.S):
        runs = re.split(r"^[ \t]*\.\.\.\n", textwrap.dedent(code), flags=re.M)
        yield path, [run.strip("\n") for run in runs if run.strip()]


def shows(source, runs):
    """Whether a file has these runs of lines, in this order, at any indentation."""
    lines, start = source.splitlines(), 0
    for run in runs:
        wanted = textwrap.dedent(run).splitlines()
        for first in range(start, len(lines) - len(wanted) + 1):
            found = textwrap.dedent("\n".join(lines[first : first + len(wanted)])).splitlines()
            if found == wanted:
                start = first + len(wanted)
                break
        else:
            return False
    return True


SHOWN = [
    pytest.param(path, runs, id=f"{page.name}-{number}")
    for page in PAGES
    for number, (path, runs) in enumerate(excerpts(page.read_text()))
]


@pytest.mark.parametrize(("path", "runs"), SHOWN)
def test_code_in_pages_is_the_code(path, runs):
    assert shows((ROOT / path).read_text(), runs), f"{path} has other lines"


def test_other_code_in_a_page_is_seen():
    page = "```python a.py\n    x = 1\n    ...\n    def f():\n        return x\n```\n"
    ((path, runs),) = excerpts(page)
    assert path == "a.py"
    source = "class A:\n    x = 1\n    y = 2\n\n    def f():\n        return x\n"
    assert shows(source, runs)
    assert not shows(source.replace("return x", "return y"), runs)
    assert not shows(source.replace("x = 1", "z = 1"), runs)
    assert not shows("    def f():\n        return x\nx = 1\n", runs)  # another order


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page):
    relative = [link for link in links(page.read_text()) if "://" not in link]
    bad = [fault for link in relative if (fault := broken(link, page))]
    assert not bad, "\n".join(bad)


def test_broken_links_are_seen():
    page, text = (
        ROOT / "docs" / "verify.md",
        "# Checks of `q` (a, b)\n[a](b.md#c) `[no](x)`\n```\n[n](o)\n```\n",
    )
    assert list(links(text)) == ["b.md#c"]
    assert anchors(text) == {"checks-of-q-a-b"}
    assert broken("recipe.md#roles", page) is None
    assert broken("#limits", page) is None
    assert broken("recipe.md#rolls", page) == "verify.md: recipe.md has no heading #rolls"
    assert broken("missing.md", page) == "verify.md: there is no missing.md"
    assert broken("../../outside.md", page) is not None


def test_figures_of_the_comparison_are_those_of_the_benchmarks():
    page = (ROOT / "docs" / "compare.md").read_text()
    measured = [line for line in page.split("## Measured")[1].splitlines() if line.startswith("| ")]
    figures = {
        figure for line in measured for figure in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", line)
    }
    known = "".join((ROOT / "docs" / name).read_text() for name in ("benchmarks.md", "pretrained.md"))
    assert len(figures) > 20
    assert not {figure for figure in figures if figure not in known}
