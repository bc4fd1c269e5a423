"""Devices of a calibration. The package of an accelerator is imported only for its own device."""

from __future__ import annotations

import importlib

import torch

from quantcli.calibration.resources import check_device
from quantcli.core.errors import MachineError


def open_device(name: str) -> torch.device:
    """The device by its name: cpu, cuda, cuda:1, npu. MachineError if this machine has none."""
    check_device(name)
    if name.startswith("npu"):
        try:
            importlib.import_module("torch_npu")
        except ImportError:
            raise MachineError(
                f"--device {name} needs torch_npu",
                fix="pip install 'quantcli[npu]' on the Ascend machine",
            ) from None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise MachineError(
            f"no device `{name}` here: {message}", fix="--device cpu works anywhere"
        ) from None
    return device
