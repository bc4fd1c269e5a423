"""The first page of README.md, command by command, away from the checkout.

The package comes from the wheel, its dependencies are links, and the Hub is a stand-in that has the
bundled model under the name that the page uses. uv, docker and vllm are noted with their arguments.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import Hub, serve
from tests.pages import ROOT, blocks
from tests.wheel.installing import OFFLINE, Installed, link, requirements_of

FIRST = (ROOT / "README.md").read_text().split("\n## Where to go next\n")[0]
PIP, UV, CONTAINER, CHECKPOINT = (code.strip().splitlines() for code in blocks(FIRST, "sh"))
PACKAGE = "git+https://github.com/quantcli/quantcli"
MODEL = "Qwen/Qwen3-0.6B"
NOTED = ("uv", "docker", "vllm")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(ROOT / "examples" / "tiny-qwen3", folder / MODEL)
    with serve(folder) as hub:
        yield hub


@pytest.fixture(scope="module")
def user(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Someone in an empty directory who has typed the lines for pip."""
    work = tmp_path_factory.mktemp("user")
    there = Installed(work / "quantcli-env", work)
    make, *rest = PIP
    assert there.shell(make).returncode == 0
    link(there, requirements_of(wheel))
    typed = "\n".join(rest)
    assert typed.count(PACKAGE) == 1
    done = there.shell(typed.replace(PACKAGE, shlex.quote(str(wheel))), **OFFLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in NOTED:
        program = there.bin / name
        program.write_text(
            f'#!/bin/sh\nfor word in {name} "$@"; do echo "$word"; done > {work / name}\n'
        )
        program.chmod(0o755)
    return there


def noted(user: Installed, name: str) -> list[str]:
    return (user.work / name).read_text().splitlines()


def test_the_lines_for_pip(user: Installed) -> None:
    listed = user.shell("python -m pip list --format=json")
    versions = {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}
    assert versions["quantcli"]
    assert versions["torch"].endswith("+cpu")
    where = user.shell("command -v quantcli").stdout.strip()
    assert Path(where) == user.bin / "quantcli"


def test_four_commands_make_a_checkpoint(user: Installed, hub: Hub) -> None:
    home = {"HOME": str(user.work / "home"), "HF_ENDPOINT": hub.address, "QUANTCLI_KERNELS": "off"}
    recommend, quantize, verify, serve_it = CHECKPOINT
    done = user.shell(recommend, **home)
    assert done.returncode == 0, done.stderr
    recipe, out = re.match(r"quantcli quantize (\S+) .*--out (\S+)$", quantize).groups()
    assert f"quantcli quantize {recipe} --model {MODEL}\n" in done.stdout, (
        "what is recommended is another"
    )
    assert not any(name.endswith(".safetensors") for name in whole(hub)), "weights were fetched"
    done = user.shell(quantize, **home)
    assert done.returncode == 0, done.stderr
    assert (user.work / out / "quantcli_manifest.json").is_file()
    done = user.shell(verify, **home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: " in done.stdout
    assert user.shell(serve_it).returncode == 0
    assert noted(user, "vllm") == shlex.split(serve_it)
    assert shlex.split(serve_it)[2] == out
    assert all(MODEL in line for line in (recommend, quantize, verify))


def whole(hub: Hub) -> set[str]:
    """Files that were sent from their first byte to their last."""
    sizes = {f"/{path.name}": path.stat().st_size for path in (hub.folder / MODEL).iterdir()}
    return {name for name, size in sizes.items() for asked in hub.fetched(name) if asked.sent == size}


def test_the_lines_for_uv_and_for_a_container(user: Installed) -> None:
    make, activate, install = UV
    assert shlex.split(make)[:3] == ["uv", "venv", "quantcli-env"]
    assert activate == PIP[1]
    assert user.shell(install).returncode == 0
    assert noted(user, "uv") == ["uv", "pip", "install", "--torch-backend", "cpu", PACKAGE]
    build, run = CONTAINER
    assert shlex.split(build)[-1] == f"{PACKAGE.removeprefix('git+')}.git"
    assert user.shell(run).returncode == 0
    words = noted(user, "docker")
    image = words.index(shlex.split(build)[3])
    assert f"{user.work}:/work" in words[:image]
    done = user.run("quantcli", *words[image + 1 :])
    assert done.returncode == 0, done.stderr


def test_commands_in_the_text_of_the_page_are_commands(user: Installed) -> None:
    named = set(re.findall(r"`quantcli ([a-z]+)", (ROOT / "README.md").read_text()))
    listed = set(re.findall(r"(?m)^  ([a-z]+)  ", user.quantcli("--help")))
    assert named <= listed
    assert len(named) >= 7
