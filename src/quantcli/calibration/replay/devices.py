"""Devices of a calibration. The package of an accelerator is imported only for its own device."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from quantcli.calibration.resources import check_device
from quantcli.core.errors import MachineError
from quantcli.core.memory.shortage import shortage
from quantcli.core.text import pip_install


def open_device(name: str) -> torch.device:
    """The device by its name: cpu, cuda, cuda:1, npu. MachineError if this machine has none."""
    check_device(name)
    if name.startswith("npu"):
        _import_torch_npu(name)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MachineError(
            f"no device `{name}` here: {_first_line(error)}", fix="--device cpu works anywhere"
        ) from None
    return device


def _import_torch_npu(name: str) -> None:
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # of the package, of the driver, or of another accelerator in torch
        if isinstance(error, ImportError) and error.name in {None, "torch_npu"} and _is_absent():
            raise MachineError(
                f"--device {name} needs torch_npu",
                fix=f"on the Ascend machine: {pip_install('npu')}",
            ) from None
        raise MachineError(
            f"torch_npu cannot be loaded: {_first_line(error)}",
            fix="source the set_env.sh of the Ascend toolkit, and install the versions of torch and "
            "torch_npu that belong together; --device cpu works anywhere",
        ) from None


def _is_absent() -> bool:
    try:
        return importlib.util.find_spec("torch_npu") is None
    except ValueError:  # what is in its place has no specification
        return True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def too_little_memory(who: str, error: Exception, device: torch.device) -> MachineError:
    """The error of `who`, to which a device has no memory to give."""
    if device.type == "cpu":
        return shortage(error, who)
    return MachineError(
        f"memory of `{device.type}` does not suffice for {who}: {' '.join(str(error).split())[:200]}",
        fix="take fewer --workers or a shorter calibration.length, or --device cpu",
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that an accelerator could give; None for the CPU, and if it does not say."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return int(module.mem_get_info(device)[0]) if hasattr(module, "mem_get_info") else None
