"""Environments with the packages of the one that runs the tests, as links: nothing is downloaded.

A package that is not declared, by itself or by what is declared, is not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def pip(*words: object) -> str:
    run = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
