"""The wheel, installed away from the checkout, with what it declares and nothing else.

The dependencies are those of the environment that runs the tests, as links: nothing is downloaded. A
package that the wheel does not declare, itself or by what it declares, is not there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.e2e.conftest import make_llama, run_cli, snapshot

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import house  # noqa: E402

FOLDERS = ("src", "recipes")
FILES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "examples/calibration.txt",
)


def pip(*words: object) -> str:
    run = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of its own: setuptools would take over what an earlier build left in `build`."""
    copy = tmp_path_factory.mktemp("copy")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.egg-info", "*.pyc"))
    for name in FILES:
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    pip("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", dist, copy)
    (built,) = dist.iterdir()
    return built


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and an empty directory to run commands in."""

    folder: Path
    work: Path

    @property
    def site(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def run(self, program: str, *words: object) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        run = [str(self.folder / "bin" / program), *map(str, words)]
        return subprocess.run(run, capture_output=True, text=True, check=False, cwd=self.work, env=kept)

    def quantcli(self, *words: object) -> str:
        done = self.run("quantcli", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def needed(requirements: list[str], extras: set[str]) -> Iterator[Requirement]:
    """What applies here, with these extras."""
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def declared(installed: Path) -> dict[str, metadata.Distribution]:
    """What a distribution needs, and what that needs, each in a version that it asks for."""
    found: dict[str, metadata.Distribution] = {}
    todo = list(needed(metadata.Distribution.at(installed).requires or [], set()))
    asked: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        distribution = metadata.distribution(requirement.name)
        assert requirement.specifier.contains(distribution.version, prereleases=True), str(requirement)
        found[canonicalize_name(requirement.name)] = distribution
        if (key := (requirement.name, ",".join(sorted(requirement.extras)))) not in asked:
            asked.add(key)
            todo += needed(distribution.requires or [], requirement.extras)
    return found


def install(wheel: Path, root: Path) -> Installed:
    """A new environment with the wheel and what it declares."""
    there = Installed(root / "environment", root / "elsewhere")
    there.work.mkdir()
    venv.create(there.folder, symlinks=True)
    python = there.folder / "bin" / "python"
    pip("--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (own,) = there.site.glob("quantcli-*.dist-info")
    for distribution in declared(own).values():
        assert distribution.files is not None, distribution.name
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (there.site / top).exists():
                (there.site / top).symlink_to(distribution.locate_file(top))
    return there


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(wheel, tmp_path_factory.mktemp("installed"))


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


def test_the_environment_is_the_wheel_and_what_it_declares(installed: Installed) -> None:
    assert pip("--python", installed.folder / "bin" / "python", "check") == (
        "No broken requirements found.\n"
    )
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
