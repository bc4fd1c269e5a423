"""A stand-in for torch_npu: torch gets a device `npu`, which computes on the CPU and is as strict as one.

Its tensors say that they are on `npu:0`. An operation on tensors of two devices fails, and so does one
in float64 for which the real package has no float64 kernel. Those for which it has no kernel at all are
computed on the CPU, as there. `record` has what was done, `capacity` is how much memory it has.

Sources: torch_npu at 9e73e708, csrc/aten/common/... (the fallback, `NPU out of memory`), docs of native
APIs (dtypes of matmul and cholesky); op-plugin at 517f2e7d, ops/opapi/SortKernelNpuOpApi.cpp:91 (sort)
and config/op_plugin_functions.yaml (operations that have a kernel).
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__version__ = "stand-in"

if os.environ.get("STAND_IN_DRIVER") == "absent":
    raise ImportError("libascend_hal.so: cannot open shared object file: No such file or directory")
if os.environ.get("STAND_IN_DRIVER") == "conflict":
    raise RuntimeError("Two accelerators cannot be used at the same time in PyTorch: npu and cuda.")

_setup_privateuseone_for_python_backend("npu")
_aten = torch.ops.aten
# what may be done with float64: the documentation has it for more, and not for mul, div, gt, mm, sort
_ON_FLOAT64 = {
    "empty", "empty_strided", "copy_", "_to_copy", "detach", "view", "t", "transpose", "slice", "expand",
}
_NO_KERNEL = {"linalg_cholesky_ex", "cholesky_solve", "cholesky_inverse", "linalg_inv_ex", "linalg_svd"}
_ACROSS = {"copy_", "_to_copy", "_local_scalar_dense"}


@dataclass
class Record:
    """What the device did."""

    operations: Counter[str] = field(default_factory=Counter)
    dtypes: dict[str, set[torch.dtype]] = field(default_factory=dict)  # of operations
    fallbacks: Counter[str] = field(default_factory=Counter)
    used: int = 0  # bytes of tensors
    most: int = 0


record = Record()
capacity = int(os.environ.get("STAND_IN_BYTES", 2**40))
devices = int(os.environ.get("STAND_IN_DEVICES", 1))


_tensors: Counter[int] = Counter()  # of a storage, by its address


def _hold(tensor: NPUTensor) -> NPUTensor:
    """Count the memory of a tensor until nothing reads it any more."""
    storage = tensor.inner.untyped_storage()
    address, nbytes = storage._cdata, storage.nbytes()
    if not _tensors[address]:
        if record.used + nbytes > capacity:
            raise RuntimeError(f"NPU out of memory. Tried to allocate {nbytes} bytes (NPU 0)")
        record.used += nbytes
        record.most = max(record.most, record.used)
    _tensors[address] += 1
    weakref.finalize(tensor, _release, address, nbytes)
    return tensor


def _release(address: int, nbytes: int) -> None:
    _tensors[address] -= 1
    if not _tensors[address]:
        record.used -= nbytes


class NPUTensor(Tensor):
    """A tensor on the device: one of the CPU, which nobody else sees."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> NPUTensor:
        """The tensor on the device that `inner` stands for."""
        made: NPUTensor = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="npu:0",
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on tensors of the device."""
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """The numbers; torch has no such method for tensors like this one."""
        return self.inner.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory, which has an address; what torch makes for tensors like this one has none."""
        return self.inner.untyped_storage()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"NPUTensor({self.inner!r})"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of which a tensor is on the device, or shall be."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, NPUTensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, NPUTensor) and tensor.ndim]
    if ours and others and name not in _ACROSS:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got cpu and npu:0")
    dtypes = {tensor.dtype for tensor in ours}
    if name in _NO_KERNEL:
        record.fallbacks[name] += 1
    elif name not in _ON_FLOAT64 and torch.float64 in {*dtypes, kwargs.get("dtype")}:
        raise RuntimeError(f"{name}: Tensor self not implemented for DT_DOUBLE")
    record.operations[name] += 1
    record.dtypes.setdefault(name, set()).update(dtypes)
    target = kwargs.get("device")
    there = torch.device(target).type == "npu" if target is not None else bool(ours)
    inside = {key: value for key, value in kwargs.items() if key != "device"}
    plain_args, plain_kwargs = tree_map(_inner, (args, inside))
    if target is not None:
        plain_kwargs["device"] = "cpu"
    out = func(*plain_args, **plain_kwargs)
    if name == "copy_":
        return args[0]
    if not there:
        return out
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_outer, out))


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, NPUTensor) else value


def _outer(value: Any) -> Any:
    return _hold(NPUTensor(value)) if isinstance(value, Tensor) else value


def _make(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation that makes a tensor on the device."""
    device = torch.device(kwargs.get("device") or "npu")
    if (device.index or 0) >= devices:
        raise RuntimeError(f"Invalid device ID {device.index}: this machine has {devices}")
    return _run(func, args, kwargs)


_library = torch.library.Library("_", "IMPL")
_library.fallback(_make, "PrivateUse1")


def npu_fusion_attention(*_: Any, **__: Any) -> Any:
    """transformers imports it, for attentions that a calibration does not choose."""
    raise NotImplementedError
