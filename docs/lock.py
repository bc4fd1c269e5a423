"""Write requirements.lock, which `make setup` installs from, and docs/licences.md, the licences of what
is in it.

`make lock` runs this after a change of dependencies. It needs uv (pip install uv), and reads licences
from the packages that are installed: run it in the environment of `make setup`. Tests compare both
files with pyproject.toml and constraints.txt.

torch is not in the lock, nor is what only its builds for GPUs need: which build of torch is installed,
and with it its hash, depends on the machine. constraints.txt pins its version.
"""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
LICENCES = ROOT / "docs" / "licences.md"
HEAD = """\
# What `make setup` installs, with the hashes of all files that a registry may give for it. `make lock`
# makes it from pyproject.toml and constraints.txt, for Python 3.11 and later on Linux and macOS. torch
# is in constraints.txt alone: its builds differ by machine.
"""
PAGE = """\
# Licences of dependencies

What `make setup` installs by [requirements.lock](../requirements.lock), as the packages themselves
say; `make lock` writes this page. torch (BSD-3-Clause), whose build depends on the machine, comes next
to it. Users of quantcli install the packages that are marked, and what these need; the others are for
development and tests.

Packages under a licence with copyleft are in bold. They are installed as they are: none is changed, and
none is part of quantcli.

| package | version | licence | of quantcli itself |
|---|---|---|---|
"""
_ENTRY = re.compile(
    r"^([a-z0-9][a-z0-9._-]*)==([^ ;\\]+)(?: ; ([^\\\n]+?))?((?: \\\n    --hash=\S+)+)\n", re.MULTILINE
)
_OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
_ELSEWHERE = re.compile(r"sys_platform == '(win32|emscripten)'")
_COPYLEFT = re.compile(r"GPL|MPL|EPL|CDDL|EUPL|Mozilla")
_SPDX = {  # classifiers and words of packages -> SPDX identifiers
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Apache Software License 2.0": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "BSD-3-Clause License": "BSD-3-Clause",
    "3-Clause BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
}


def entries(text: str) -> dict[str, dict[str, list[str]]]:
    """A lock: package -> version -> hashes."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, version, _, hashes in _ENTRY.findall(text):
        found.setdefault(name, {})[version] = re.findall(r"--hash=(\S+)", hashes)
    return found


def resolved() -> str:
    """What uv finds for all platforms, without torch's own and what no platform of ours needs."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "-c", "constraints.txt"]
    command += ["--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--quiet"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    kept = [
        match[0]
        for match in _ENTRY.finditer(text)
        if not _OF_TORCH.fullmatch(match[1]) and not _ELSEWHERE.search(match[3] or "")
    ]
    return HEAD + "".join(kept)


def licence(name: str) -> str:
    """The licence that an installed package names: an SPDX expression if it has one."""
    about = metadata(name)
    if expression := about.get("License-Expression"):
        return expression
    classifiers = [
        c.rpartition(" :: ")[2] for c in about.get_all("Classifier", []) if "License ::" in c
    ]
    names = [c for c in classifiers if c != "OSI Approved"]
    names = names or [(about.get("License") or "").strip() or title(name)]
    first = [text.splitlines()[0][:60] if text else "not named" for text in names]
    return " AND ".join(_SPDX.get(text, text) for text in first)


def title(name: str) -> str:
    """The first line of the licence that an installed package carries; empty without one."""
    files = [file for file in distribution(name).files or () if "LICENSE" in file.name.upper()]
    texts = [file.read_text().strip() for file in files]
    return texts[0].splitlines()[0] if texts else ""


def page(lock: dict[str, dict[str, list[str]]], own: set[str]) -> str:
    """docs/licences.md."""
    rows = []
    for name, versions in sorted(lock.items()):
        text = licence(name)
        shown = f"**{text}**" if _COPYLEFT.search(text) else text
        rows.append(f"| {name} | {', '.join(versions)} | {shown} | {'yes' if name in own else ''} |\n")
    return PAGE + "".join(rows)


def own_packages() -> set[str]:
    """The packages that quantcli itself asks for, without extras for development."""
    required = metadata("quantcli").get_all("Requires-Dist", [])
    names = (re.split(r"[^\w.-]", line)[0] for line in required if 'extra == "dev"' not in line)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


if __name__ == "__main__":
    if "--licences" not in sys.argv:
        LOCK.write_text(resolved())
        print(f"wrote {LOCK.relative_to(ROOT)}")
    try:
        LICENCES.write_text(page(entries(LOCK.read_text()), own_packages()))
    except PackageNotFoundError as missing:
        sys.exit(f"`{missing.name}` is not installed: run `make setup`, then `make lock` again")
    print(f"wrote {LICENCES.relative_to(ROOT)}")
