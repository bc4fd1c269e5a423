"""The software and the CPU of a machine: those of a cluster must be alike, or results would differ."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import quantcli

CPU = "CPU"

_PACKAGES = ("torch", "numpy", "numba", "llvmlite", "transformers", "blake3", "ray")
_CODE = {".py", ".yaml", ".html", ".css", ".js"}
_INSTRUCTIONS = {  # those that sums of floats are made with, the best first: flag of the kernel -> name
    "amx_tile": "AMX",
    "avx512_bf16": "AVX512_BF16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "sve": "SVE",
    "asimd": "NEON",
}


@cache
def software() -> Mapping[str, str]:
    """What this machine has: versions by name, a digest of quantcli's files, and its kind of CPU."""
    found = {
        "quantcli": quantcli.__version__,
        "quantcli's files": _digest(Path(quantcli.__file__).parent),
    }
    found["Python"] = platform.python_version()
    for package in (*_PACKAGES, *_plug_ins()):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    found[CPU] = _cpu(Path("/proc/cpuinfo"))
    return found


def _plug_ins() -> Iterator[str]:
    """Packages of other people that add schemes, methods, sources or targets."""
    groups = ("schemes", "methods", "sources", "targets")
    entries = (entry for group in groups for entry in entry_points(group=f"quantcli.{group}"))
    yield from sorted({entry.dist.name for entry in entries if entry.dist})


def _digest(folder: Path) -> str:
    """A digest of the files of a package, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in _CODE:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]


def _cpu(cpuinfo: Path) -> str:
    """The kind of CPU, by its instructions: results of sums depend on it."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return platform.machine()
    words = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    best = next((name for flag, name in _INSTRUCTIONS.items() if flag in words), "")
    return f"{platform.machine()} {best}".strip()


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Each difference of the software of two machines as text; CPUs may differ."""
    names = [name for name in dict.fromkeys((*here, *there)) if name != CPU]
    pairs = ((name, there.get(name, "none"), here.get(name, "none")) for name in names)
    return [f"{name} {other}, not {own}" for name, other, own in pairs if other != own]
