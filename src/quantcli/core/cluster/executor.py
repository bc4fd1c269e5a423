"""The option that says where work is done: in threads of this process, or on a Ray cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantcli.core.errors import InputError

THREADS = "threads"
TASK_WORKERS = 4  # threads of a task: more of them wait for the hash of its shard
FORMS = "threads, ray, ray:local, or ray:HOST:PORT"

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


@dataclass(frozen=True)
class Executor:
    """A Ray cluster to use.

    address: HOST:PORT of its head; `local` for a new one on this machine; None for that of RAY_ADDRESS,
             else the one that was started on this machine, else a new one.
    """

    address: str | None = None

    def __str__(self) -> str:
        return f"ray:{self.address}" if self.address else "ray"


def parse_executor(text: str) -> Executor | None:
    """The cluster that `--executor` names; None for threads. InputError for anything else."""
    if text == THREADS:
        return None
    kind, _, address = text.partition(":")
    if kind == "ray" and (text == "ray" or address == "local" or _is_address(address)):
        return Executor(address or None)
    where = f"--executor {text}"
    if address.startswith("ray://") or text.startswith("ray://"):
        raise InputError(
            "addresses of Ray Client cannot be used",
            where=where,
            fix="start the command on a machine of the cluster: `ray job submit -- quantcli ...`",
        )
    raise InputError(f"`{text}` is not an executor", where=where, fix=f"give {FORMS}")


def _is_address(text: str) -> bool:
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[2]) < 2**16
