"""The same bytes on aarch64: conversions under an emulator, compared with this machine's.

    apt-get install qemu-user-static debootstrap     (as root; Debian's names)
    python benchmarks/arm64.py [--keep FOLDER] [--json]     (as root, for debootstrap)

Makes, once, in FOLDER (default: build/arm64; 2 GB, a few minutes): the files of an arm64 Debian with
Python, unpacked but not installed, so that nothing of it runs but Python; and wheels for aarch64 of all
that quantcli needs, in the versions of this environment. Only torch is another: the last release whose
wheel for aarch64 needs no CUDA. Then quantcli's own code, from this repository, converts
examples/tiny-qwen3 there and here, with compiled kernels and, if there are any, with torch alone. All
files must have the same hashes.

The emulator runs the machine code of Python, torch and the compiled kernels for aarch64 as it is. It
says nothing about speed, and it is not a machine: what differs between real aarch64 CPUs, such as the
width of SVE, is not seen here.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from common import ROOT, Line, finish, hashes, measure, parser, workplace
from convert_all import DATA_FREE
from environments import run, say

MODEL = ROOT / "examples" / "tiny-qwen3"
EMULATOR = "qemu-aarch64-static"
RELEASE, PYTHON = "bookworm", "3.11"
DEBIAN = ("python3", "libstdc++6", "libgomp1")
TORCH = "2.9.1"
GLIBC = ("2_28", "2_27", "2_26", "2_24", "2_17")  # that wheels may be built for
SYSTEM_OFF = {"QUANTCLI_KERNELS": "off"}
COMPILER = "numba"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--keep", type=Path, default=ROOT / "build" / "arm64", metavar="FOLDER")
    arguments.add_argument("--recipes", nargs="+", default=DATA_FREE, metavar="RECIPE")
    options = arguments.parse_args()
    for program in (EMULATOR, "debootstrap"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is missing: install Debian's qemu-user-static and debootstrap")
    python, wheels = prepare(options.keep.resolve())
    script = Path(__file__).with_name("convert_all.py")
    cases = {"compiled kernels": {}} if importlib.util.find_spec(COMPILER) else {}
    cases["torch alone"] = SYSTEM_OFF
    lines = []
    with workplace(options.dir) as folder:
        here, cache = folder / "here", folder / "cache"
        measure(sys.executable, script, MODEL, here, *options.recipes)
        expected = hashes(here)
        for name, environment in cases.items():
            there = folder / name
            path = f"{ROOT / 'src'}:{wheels}"
            env = environment | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(cache)}
            used = measure(*python, script, MODEL, there, *options.recipes, env=env)
            compiled = len(list(cache.rglob("*.o")))
            if not environment and not compiled:
                raise SystemExit("no kernel was compiled on aarch64, so torch did the work")
            found = hashes(there)
            odd = [f for f in expected.keys() | found.keys() if expected.get(f) != found.get(f)]
            detail = f"{len(found)} files of {len(options.recipes)} recipes, {used.wall:.0f} s"
            detail += f"; {compiled} kernels compiled" if not environment else ""
            detail += f"; first: {min(odd)}" if odd else ""
            lines.append(Line(f"aarch64, {name}: files with other bytes", len(odd), "", 0, detail))
    finish(lines, as_json=options.json)


def prepare(keep: Path) -> tuple[list[str | Path], Path]:
    """The command of the emulated Python, and the folder with its packages. Both are made once."""
    system, wheels = keep / "system", keep / "wheels"
    keep.mkdir(parents=True, exist_ok=True)
    if not system.is_dir():
        say(f"  unpacking Debian {RELEASE} for arm64")
        new = keep / "new-system"
        shutil.rmtree(new, ignore_errors=True)
        options = ("--foreign", "--arch=arm64", "--variant=minbase", f"--include={','.join(DEBIAN)}")
        run(keep / "debootstrap.log", "debootstrap", *options, RELEASE, new)
        for package in sorted((new / "var" / "cache" / "apt" / "archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, new], check=True)
        new.rename(system)
    packages = sorted(needed())
    wanted = keep / "wheels.txt"
    if not wanted.is_file() or wanted.read_text().split() != packages:
        say(f"  installing {len(packages)} packages for aarch64")
        shutil.rmtree(wheels, ignore_errors=True)
        platforms = [f"--platform=manylinux_{version}_aarch64" for version in GLIBC]
        tags = [f"--abi={abi}" for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none")]
        pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:")
        which = (f"--python-version={PYTHON}", "--implementation=cp", *tags, *platforms)
        run(keep / "pip.log", *pip, *which, f"--target={wheels}", *packages)
        wanted.write_text("\n".join(packages))
    return [EMULATOR, "-L", system, system / "usr" / "bin" / f"python{PYTHON}"], wheels


def needed() -> Iterable[str]:
    """NAME==VERSION of all packages that quantcli needs, as they are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    queue: list[str] = [*project["dependencies"], "safetensors"]
    found: dict[str, str] = {}
    while queue:
        requirement = queue.pop()
        _, _, marker = requirement.partition(";")
        name = re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].lower().replace("_", "-")
        if name in found or "extra" in marker:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another Python or system
            continue
        found[name] = TORCH if name == "torch" else package.version
        queue += package.requires or ()
    return [f"{name}=={version}" for name, version in found.items()]


if __name__ == "__main__":
    main()
