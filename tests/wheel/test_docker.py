"""The steps of the Dockerfile, each stage in an environment of its own, without docker.

Paths of the image lie below a folder, packages are links, and what only root can do is noted: whether
the image itself builds is not seen here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.pages import ROOT
from tests.wheel.installing import OFFLINE, Installed, environment, requirements_of

NOTED = ("useradd", "chown")  # programs that need root


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, in order."""
    lines = re.sub(r"\\\n", " ", re.sub(r"(?m)^#.*\n", "", text)).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


STEPS = instructions((ROOT / "Dockerfile").read_text())


def ignored(name: str) -> bool:
    """Whether .dockerignore leaves out a file or all of a folder: the last match decides."""
    left_out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if pattern == "*" or name == pattern:
            left_out = not line.startswith("!")
    return left_out


@dataclass
class Stage:
    """What a stage of the build has done."""

    root: Path
    at: Installed
    base: str
    variables: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    directory: str = "/"
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """Where a path of the image is here."""
        return self.root / os.path.normpath(Path(self.directory, path)).lstrip("/")

    def moved(self, text: str) -> str:
        """Text with absolute paths of the image moved below the root."""
        return re.sub(r"(?<![\w./:-])/(?=\w)", f"{self.root}/", text)

    @property
    def noted(self) -> str:
        return (self.root / "noted").read_text()

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        self.place(".").mkdir(parents=True, exist_ok=True)
        moved = {name: self.moved(value) for name, value in self.variables.items()}
        path = f"{self.root / 'noting'}:{self.at.bin}:{os.environ['PATH']}"
        return subprocess.run(
            ["sh", "-ec", script],
            cwd=self.place("."), env=self.at.variables(OFFLINE | moved | {"PATH": path}),
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def copy(self, words: list[str], stages: dict[str, Stage]) -> None:
        flags = [word for word in words if word.startswith("--")]
        *sources, target = [word for word in words if not word.startswith("--")]
        for source in sources:
            if flags:
                found = stages[flags[0].removeprefix("--from=")].place(source)
            else:
                found = ROOT / source
                assert not ignored(source), source
            into = self.place(target)
            if found.is_dir():
                shutil.copytree(found, into, dirs_exist_ok=True)
            else:
                assert target.endswith("/")
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, into)


def new_stage(root: Path, base: str, requirements: list[str]) -> Stage:
    stage = Stage(root, environment(root / "made", requirements), base)
    (root / "noting").mkdir()
    (root / "noted").touch()
    for name in NOTED:
        program = root / "noting" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {shlex.quote(str(root / "noted"))}\n')
        program.chmod(0o755)
    return stage


@pytest.fixture(scope="module")
def image(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """The last stage."""
    folder = tmp_path_factory.mktemp("image")
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for name, rest in STEPS:
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            there = folder / (alias or "last")
            stage = stages[alias] = new_stage(
                there, base, ["pip", "setuptools", *requirements_of(wheel)]
            )
            continue
        assert stage is not None
        if name == "COPY":
            stage.copy(rest.split(), stages)
        elif name == "RUN":
            done = stage.run(stage.moved(rest))
            assert done.returncode == 0, f"{rest}\n{done.stdout}{done.stderr}"
        elif name == "ENV":
            stage.variables |= dict(word.split("=", 1) for word in shlex.split(rest))
        elif name == "USER":
            stage.user = rest
        elif name == "WORKDIR":
            stage.directory = rest
        elif name == "VOLUME":
            stage.volumes.append(rest)
        elif name == "ENTRYPOINT":
            stage.entry = json.loads(rest)
        elif name == "CMD":
            stage.command = json.loads(rest)
        else:
            raise AssertionError(name)
    assert stage is not None
    return stage


def test_the_entry_point_shows_the_help(image: Stage) -> None:
    done = image.run(shlex.join([*image.entry, *image.command]))
    assert (done.returncode, "Usage: quantcli" in done.stdout) == (0, True), done.stderr


def test_a_conversion_keeps_compiled_code_in_the_volume(image: Stage) -> None:
    words = [
        "quantize",
        "w8a8_dynamic",
        "--model",
        str(ROOT / "examples" / "tiny-qwen3"),
        "--out",
        "out",
    ]
    done = image.run(shlex.join([*image.entry, *words]))
    assert done.returncode == 0, done.stderr
    assert (image.place("out") / "quantcli_manifest.json").exists()
    assert image.volumes == [image.variables["XDG_CACHE_HOME"]]
    (cache,) = image.volumes
    assert list((image.place(cache) / "quantcli").rglob("*"))


def test_the_user_is_not_root_and_others_can_write_to_the_cache(image: Stage) -> None:
    assert f"useradd --create-home --uid 1000 {image.user}\n" in image.noted
    assert f"chown {image.user} {image.place(image.directory)}\n" in image.noted
    assert stat.S_IMODE(image.place(image.volumes[0]).stat().st_mode) == 0o1777


def test_what_is_installed_is_the_wheel_with_the_versions_of_the_constraints(image: Stage) -> None:
    listed = image.run("python -m pip list --format=json")
    versions = {
        canonicalize_name(entry["name"]): entry["version"].partition("+")[0]
        for entry in json.loads(listed.stdout)
    }
    pins = re.findall(r"(?m)^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text())
    pinned = {canonicalize_name(name): version for name, version in pins}
    assert {"quantcli", "torch"} <= versions.keys()
    assert "pytest" in pinned.keys() - versions.keys()
    both = pinned.keys() & versions.keys()
    assert {name: versions[name] for name in both} == {name: pinned[name] for name in both}
    script = (image.at.bin / "quantcli").read_text()
    assert script.startswith(f"#!{image.at.bin}/python")


def test_the_image_is_small_and_takes_the_cpu_build_of_torch(image: Stage) -> None:
    assert re.fullmatch(r"python:3\.\d+-slim", image.base)
    (installs,) = [rest for name, rest in STEPS if name == "RUN" and "pip install" in rest]
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in installs
    assert "--constraint" in installs
    assert not any("apt-get" in rest for name, rest in STEPS if name == "RUN")


def test_the_context_is_what_is_copied(image: Stage) -> None:
    """Checkpoints, environments and history stay out of the image."""
    for name in (".git", ".venv", "tests", "docs", "examples/tiny-qwen3", "build"):
        assert ignored(name), name
