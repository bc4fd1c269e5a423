"""The lock file: what pyproject.toml asks for, in the versions of constraints.txt, each with hashes."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.pages import script

ROOT = Path(__file__).parents[1]
lock = script("lock")
TEXT = lock.LOCK.read_text()
ENTRIES = lock.entries(TEXT)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ASKED = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
PINNED = [
    line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
]
ALONE = {"torch"}  # what the lock leaves to constraints.txt


def test_the_lock_holds_nothing_but_entries_with_hashes():
    rest = lock._ENTRY.sub("", TEXT.removeprefix(lock.HEAD))
    assert rest == ""
    hashes = [each for versions in ENTRIES.values() for found in versions.values() for each in found]
    assert len(ENTRIES) > 100
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)
    assert not [name for name in ENTRIES if lock._OF_TORCH.fullmatch(name)]


@pytest.mark.parametrize("line", ASKED)
def test_the_lock_satisfies_the_project(line):
    asked = Requirement(line)
    name = canonicalize_name(asked.name)
    if name in ALONE:
        assert name not in ENTRIES
        return
    assert all(asked.specifier.contains(version) for version in ENTRIES[name]), "run `make lock`"


@pytest.mark.parametrize("line", PINNED)
def test_the_lock_has_the_versions_of_the_constraints(line):
    name, version = line.split("==")
    if name not in ALONE:
        assert list(ENTRIES[canonicalize_name(name)]) == [version], "run `make lock`"


def test_each_package_has_its_licence_on_the_page():
    page = lock.LICENCES.read_text().partition("|---|")[2]
    rows = re.findall(r"^\| ([a-z0-9.-]+) \| ([^|]+) \| ([^|]+) \|", page, re.M)
    listed = {name: ", ".join(versions) for name, versions in ENTRIES.items()}
    assert {name: version for name, version, _ in rows} == listed, "run `make lock`"
    assert not [name for name, _, text in rows if "not named" in text]
    copyleft = {name for name, _, text in rows if text.startswith("**")}
    assert {"certifi", "pathspec"} <= copyleft
    assert "numpy" not in copyleft


def test_make_setup_installs_by_the_lock():
    makefile = (ROOT / "Makefile").read_text()
    first, second = re.findall(r"pip install .*-(?:r|c) (.*)$", makefile, re.M)[:2]
    assert (first, second) == ("requirements.lock", "constraints.txt -e '.[dev]'")
    assert re.search(r"--no-deps --require-hashes -r requirements\.lock", makefile)
