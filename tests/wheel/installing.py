"""Environments with the packages of the one that runs the tests, as links: nothing is downloaded.

A package that is not declared, by itself or by what is declared, is not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPT = """#!{python}
import sys
from {module} import {name}
sys.exit({call}())
"""
# nothing is asked of an index, whatever this machine's settings say, and builds use what is there
OFFLINE = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}


def pip(*words: object) -> str:
    run = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Installed:
    """An environment, and a directory to run commands in."""

    folder: Path
    work: Path

    @property
    def site(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def variables(self, more: Mapping[str, str]) -> dict[str, str]:
        """Those of a shell in which this environment is active, and some more."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "PIP_", "HF_", "QUANTCLI_"))
        }
        return kept | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | more

    def shell(self, script: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a script as CI does: bash that stops at the first command that fails."""
        run = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
        return subprocess.run(
            run, capture_output=True, text=True, check=False, cwd=self.work, env=self.variables(more)
        )

    def run(self, program: str, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
        run = [str(self.bin / program), *map(str, words)]
        return subprocess.run(
            run, capture_output=True, text=True, check=False, cwd=self.work, env=self.variables(more)
        )

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


def declared(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """What these requirements and theirs are here, each in a version that is asked for."""
    found: dict[str, metadata.Distribution] = {}
    todo = list(needed(requirements, set()))
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


def requirements_of(wheel: Path) -> list[str]:
    """What a wheel declares."""
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        return metadata.PathDistribution(zipfile.Path(archive, f"{folder}/")).requires or []


def environment(root: Path, requirements: list[str]) -> Installed:
    """A new environment with these requirements and theirs."""
    there = Installed(root / "environment", root / "elsewhere")
    there.work.mkdir(parents=True)
    venv.create(there.folder, symlinks=True)
    link(there, requirements)
    return there


def link(there: Installed, requirements: list[str]) -> None:
    """Put these requirements and theirs into an environment, and their programs."""
    for distribution in declared(requirements).values():
        assert distribution.files is not None, distribution.name
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (there.site / top).exists():
                (there.site / top).symlink_to(distribution.locate_file(top))
        for entry in distribution.entry_points.select(group="console_scripts"):
            program = there.bin / entry.name
            if not program.exists():
                first = entry.attr.partition(".")[0]
                text = SCRIPT.format(
                    python=there.bin / "python", module=entry.module, name=first, call=entry.attr
                )
                program.write_text(text)
                program.chmod(0o755)


def install(wheel: Path, root: Path) -> Installed:
    """A new environment with the wheel and what it declares."""
    there = environment(root, requirements_of(wheel))
    pip("--python", there.bin / "python", "install", "--quiet", "--no-deps", "--no-index", wheel)
    return there
