"""The wheel, installed away from the checkout, with what it declares and nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.e2e.conftest import make_llama, run_cli, snapshot
from tests.pages import broken, links
from tests.wheel.installing import Installed, install, pip

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import house  # noqa: E402


def test_the_wheel_holds_the_package_and_what_it_carries(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "quantcli"
    files = (path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
    expected = {f"quantcli/{path.relative_to(package)}" for path in files}
    expected |= {f"quantcli/recipe/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    expected.add("quantcli/recipe/examples/calibration.txt")
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_wheel_declares_what_it_imports(installed: Installed) -> None:
    """By itself: that some dependency needs a package, too, may end."""
    (own,) = installed.site.glob("quantcli-*.dist-info")
    asked = map(Requirement, metadata.Distribution.at(own).requires or [])
    named = {canonicalize_name(requirement.name) for requirement in asked}
    providers = metadata.packages_distributions()
    missing = {}
    for module in house.modules():
        for name in house.imported(module):
            top = name.partition(".")[0]
            if top == house.PACKAGE or top in sys.stdlib_module_names:
                continue
            if named.isdisjoint(map(canonicalize_name, providers.get(top, [top]))):
                missing[top] = str(module)
    assert not missing


def test_links_of_the_package_page_lead_to_files_of_this_repository(installed: Installed) -> None:
    """All are absolute, and those of README.md are there, to pages as GitHub shows them."""
    (own,) = installed.site.glob("quantcli-*.dist-info")
    page = metadata.Distribution.at(own).metadata
    assert page["Description-Content-Type"] == "text/markdown"
    homes = [url.split(", ")[1] for url in page.get_all("Project-URL", [])]
    assert len(homes) == 5
    shown = list(links(page.get_payload()))
    for before, after in zip(links((ROOT / "README.md").read_text()), shown, strict=True):
        if ":" in before or before.startswith("#"):
            assert after == before
        else:
            assert after.startswith((f"{homes[0]}/blob/main/", "https://raw.githubusercontent.com/"))
            path = after.partition("/main/")[2]
            assert path == before
            assert broken(path, ROOT / "README.md") is None
    assert any("/blob/main/docs/" in link for link in shown)


def test_the_environment_is_the_wheel_and_what_it_declares(installed: Installed) -> None:
    assert pip("--python", installed.bin / "python", "check") == ("No broken requirements found.\n")
    where = installed.run("python", "-c", "import quantcli; print(quantcli.__file__)").stdout.strip()
    assert Path(where) == installed.site / "quantcli" / "__init__.py"
    for absent in ("pytest", "compressed_tensors"):
        assert installed.run("python", "-c", f"import {absent}").returncode == 1


def test_recipes_are_there(installed: Installed) -> None:
    expected = run_cli("recipes", "--json").json
    assert len(expected["recipes"]) == len(list((ROOT / "recipes").glob("*.yaml")))
    assert installed.quantcli("recipes", "--json") == run_cli("recipes", "--json").out
    shown = installed.quantcli("recipes", "show", "w8a8_moe")
    assert shown == (ROOT / "recipes" / "w8a8_moe.yaml").read_text()


def test_a_conversion_by_name(installed: Installed, tmp_path: Path) -> None:
    """The bytes are those of the checkout."""
    model = make_llama(tmp_path / "model")
    out = tmp_path / "out"
    installed.quantcli("quantize", "w8a8_dynamic", "--model", model, "--out", out)
    assert "passed: " in installed.quantcli("verify", out, "--full", "--against", model)
    recipe = ROOT / "recipes" / "w8a8_dynamic.yaml"
    assert run_cli("quantize", recipe, "--model", model, "--out", tmp_path / "expected").code == 0
    assert snapshot(out) == snapshot(tmp_path / "expected")


def test_a_recipe_that_calibrates_has_its_text(installed: Installed, tmp_path: Path) -> None:
    model, few = ROOT / "examples" / "tiny-qwen3", ("--set", "calibration.samples=2")
    words = ("w8a8_static", "--model", model, "--out", tmp_path / "out")
    installed.quantcli("quantize", *words, *few, "--set", "calibration.length=16")
    assert "passed: " in installed.quantcli("verify", tmp_path / "out")


def test_a_misspelt_recipe(installed: Installed) -> None:
    refused = installed.run("quantcli", "quantize", "w8a8_dynmic")
    assert refused.returncode == 2
    assert re.match(
        r"error: there is no recipe `w8a8_dynmic`\n  fix: did you mean `w8a8_dynamic`", refused.stderr
    )


def test_an_editable_install_reads_the_recipes_of_the_checkout(copy: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta as m; m.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    editable = install(wheel, tmp_path)
    where = editable.run("python", "-c", "import quantcli; print(quantcli.__file__)").stdout.strip()
    assert Path(where) == copy / "src" / "quantcli" / "__init__.py"
    (copy / "recipes" / "own.yaml").write_text("# Mine.\ntarget: fp8\nrules: []\n")
    try:
        assert editable.quantcli("recipes", "show", "own").startswith("# Mine.\n")
    finally:
        (copy / "recipes" / "own.yaml").unlink()
