"""The environment variables that a command line follows; options win over them."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantcli.core.cluster.executor import FORMS, parse_executor
from quantcli.core.errors import InputError, closest

COMPLETE = "_QUANTCLI_COMPLETE"  # the shell that asks for a completion
_PREFIX = "QUANTCLI_"
_MOST_WORKERS = 1024  # as of --workers

HELP = {
    "QUANTCLI_WORKERS": "threads, if --workers is not given",
    "QUANTCLI_DEVICE": "device, if --device is not given",
    "QUANTCLI_EXECUTOR": "executor, if --executor is not given",
    "QUANTCLI_CACHE": "folder to keep compiled code in",
    "QUANTCLI_KERNELS": "off: compile nothing, use torch",
    "QUANTCLI_PASSWORD": "password of the key that signs",
    "QUANTCLI_API_KEY": "key for the server of verify --served",
}


def defaults(options: Collection[str]) -> dict[str, Any]:
    """The defaults that the environment sets for a command with these options. InputError for a bad
    value of one of them.

    A variable that is empty is not set.
    """
    values: dict[str, Any] = {}
    if "workers" in options and (workers := os.environ.get("QUANTCLI_WORKERS")):
        number = int(workers) if workers.isdecimal() and len(workers) < 9 else 0
        if not 1 <= number <= _MOST_WORKERS:
            raise _bad("QUANTCLI_WORKERS", f"a number from 1 to {_MOST_WORKERS}")
        values["workers"] = number
    if "device" in options and (device := os.environ.get("QUANTCLI_DEVICE")):
        from quantcli.calibration.resources import check_device

        try:
            check_device(device)
        except InputError:
            raise _bad("QUANTCLI_DEVICE", "cpu, cuda, npu, or one of several, such as cuda:1") from None
        values["device"] = device
    if "executor" in options and (executor := os.environ.get("QUANTCLI_EXECUTOR")):
        try:
            parse_executor(executor)
        except InputError:
            raise _bad("QUANTCLI_EXECUTOR", FORMS) from None
        values["executor"] = executor
    if (cache := os.environ.get("QUANTCLI_CACHE")) and (
        not Path(cache).is_absolute() or (Path(cache).exists() and not Path(cache).is_dir())
    ):
        raise _bad("QUANTCLI_CACHE", "the absolute path of a folder")
    if os.environ.get("QUANTCLI_KERNELS", "") not in {"", "on", "off"}:
        raise _bad("QUANTCLI_KERNELS", "on or off")
    return values


def _bad(name: str, expected: str) -> InputError:
    what = f"environment variable {name} is `{os.environ[name]}`"
    return InputError(what, fix=f"set it to {expected}, or unset it")


def unknown_variables() -> list[str]:
    """A warning for each variable that looks like one of quantcli's and is not."""
    warnings = []
    for name in sorted(os.environ):
        if name.startswith(_PREFIX) and name not in HELP:
            names = {variable.removeprefix(_PREFIX): variable for variable in HELP}
            near = closest(name.removeprefix(_PREFIX), names, 1).strip("`")
            hint = f"did you mean {names[near]}?" if near else f"known are {', '.join(HELP)}"
            warnings.append(f"environment variable {name} is not known and does nothing; {hint}")
    return warnings
