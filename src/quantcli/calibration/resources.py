"""What a calibration may use. Imports nothing heavy: the command line checks it before all else."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantcli.core.cluster.executor import Executor
from quantcli.core.errors import InputError


@dataclass(frozen=True)
class Resources:
    """Limits of a calibration.

    max_memory: bytes above the imports; None: most that is free.
    executor:   the cluster that runs what can be spread; None: threads of this process.
    task_workers: threads of each task there; None: one for each CPU of a node.
    """

    device: str = "cpu"
    workers: int = 1
    max_memory: int | None = None
    trust_remote_code: bool = False
    executor: Executor | None = None
    task_workers: int | None = None


def check_device(name: str) -> None:
    """InputError for a name that no device has; whether this machine has it shows when it is used."""
    if not re.fullmatch(r"(cpu|cuda|npu)(:\d{1,3})?", name):
        fix = "give cpu, cuda or npu, or one of several, such as cuda:1"
        raise InputError(f"unknown device `{name}`", where=f"--device {name}", fix=fix)
