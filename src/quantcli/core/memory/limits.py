"""Limits of memory: of the process, of its container, and of the machine."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
# the files of a control group by version: limit, use, and what of the use the kernel can free
_FILES = (
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)


@dataclass(frozen=True)
class Limit:
    """A limit of memory.

    name:  as a user finds it.
    total: bytes that it allows.
    left:  bytes that are left of it; not below 0.
    fix:   how to change it.
    """

    name: str
    total: int
    left: int
    fix: str


def hard_limits() -> list[Limit]:
    """The limits beyond which this process gets no memory, or is killed; empty if there are none."""
    return [*process_limits(), *container_limits()]


def process_limits() -> Iterator[Limit]:
    """The limits of this process: address space (`ulimit -v`) and data (`ulimit -d`)."""
    pages = _numbers(Path("/proc/self/statm"))
    size = os.sysconf("SC_PAGE_SIZE")
    limits = (
        ("address space", resource.RLIMIT_AS, "ulimit -v", 0),
        ("data", resource.RLIMIT_DATA, "ulimit -d", 5),
    )
    for name, number, command, column in limits:
        total, _ = resource.getrlimit(number)
        if total != resource.RLIM_INFINITY:
            used = pages[column] * size if len(pages) > column else 0
            fix = f"raise the limit ({command})"
            yield Limit(f"limit of {name} ({command})", total, max(0, total - used), fix)


def container_limits(own: Path = _OWN_CGROUPS, root: Path = _CGROUPS) -> Iterator[Limit]:
    """The limits of the control groups that this process is in.

    own: the file that names them. root: where they are mounted.
    """
    try:
        lines = own.read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":  # version 2
            base, files = root, _FILES[0]
        elif "memory" in controllers.split(","):
            base, files = root / "memory", _FILES[1]
        else:
            continue
        folder = base / path.lstrip("/")
        if not folder.is_dir():  # in a container its own group is mounted as the root
            folder = base
        for group in (folder, *folder.parents):
            if group.is_relative_to(base):
                yield from _limit_of(group, *files)


def _limit_of(group: Path, limit: str, use: str, freeable: tuple[str, ...]) -> Iterator[Limit]:
    total, used = _numbers(group / limit), _numbers(group / use)
    if not total or not used or total[0] >= 2**60:  # "max", or what version 1 has for it
        return
    try:
        lines = (group / "memory.stat").read_text().split("\n")
    except OSError:
        lines = []
    stat = dict(line.split(" ", 1) for line in lines if " " in line)
    cached = sum(int(stat.get(name, 0)) for name in freeable)
    left = max(0, total[0] - max(0, used[0] - cached))
    yield Limit(
        "limit of the container (cgroup)", total[0], left, "raise the container's limit of memory"
    )


def free_memory() -> int:
    """Bytes that this process can still get: of the machine's free memory, as far as limits allow."""
    try:
        text = Path("/proc/meminfo").read_text()
        free = next(int(line.split()[1]) * 1024 for line in text.splitlines() if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *(limit.left for limit in hard_limits())])


def _numbers(path: Path) -> list[int]:
    """The numbers in a file of the kernel; empty if it has none."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []
