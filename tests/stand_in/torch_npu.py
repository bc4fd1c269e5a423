"""A stand-in for torch_npu: torch gets a device `npu` that computes on the CPU, and is strict.

Its tensors say that they are on `npu:0`. An operation on tensors of two devices fails, and so does any
arithmetic in float64, of which the real package documents only a part. `record` has what was done;
`capacity` and `devices` are the memory of a device and how many there are.

Sources: torch_npu at 9e73e708: csrc/core/npu/NPUCachingAllocator.cpp:1377 (the message on memory),
docs/zh/api/native_api/pytorch_2-13-0/torch.md (dtypes), torch_npu/__init__.py (two accelerators).
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

capacity = 2**40
devices = 1
_ON_FLOAT64 = {"empty", "empty_strided", "copy_", "_to_copy", "detach", "view", "t", "transpose"}
_ACROSS = {"copy_", "_to_copy"}


@dataclass
class Record:
    """What the device did."""

    operations: Counter[str] = field(default_factory=Counter)
    float64: set[str] = field(default_factory=set)  # operations on such tensors
    used: int = 0  # bytes of tensors
    most: int = 0


record = Record()


class _Module:
    """`torch.npu`."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return bool(devices)

    def device_count(self) -> int:
        return devices

    def current_device(self) -> int:
        return 0

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        """Bytes that are free, and all."""
        return capacity - record.used, capacity


_setup_privateuseone_for_python_backend("npu", backend_module=_Module())


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
        return _hold(made)

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

    def data_ptr(self) -> int:
        """The address of the first number."""
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy on the device."""
        copy = NPUTensor(self.inner.clone())
        is_parameter = isinstance(self, torch.nn.Parameter)
        return torch.nn.Parameter(copy, self.requires_grad) if is_parameter else copy

    def __repr__(self) -> str:  # type: ignore[override]
        return f"NPUTensor({self.inner!r})"


_tensors: Counter[int] = Counter()  # of a storage, by its address


def _hold(tensor: NPUTensor) -> NPUTensor:
    """Count the memory of a tensor until nothing reads it any more."""
    storage = tensor.inner.untyped_storage()
    address, nbytes, owner = storage._cdata, storage.nbytes(), record
    if not _tensors[address]:
        if record.used + nbytes > capacity:
            raise RuntimeError(f"NPU out of memory. Tried to allocate {nbytes} bytes (NPU 0)")
        record.used += nbytes
        record.most = max(record.most, record.used)
    _tensors[address] += 1
    weakref.finalize(tensor, _release, address, nbytes, owner)
    return tensor


def _release(address: int, nbytes: int, owner: Record) -> None:
    _tensors[address] -= 1
    if not _tensors[address]:
        owner.used -= nbytes


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of which a tensor is on the device, or shall be."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, NPUTensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, NPUTensor) and tensor.ndim]
    if ours and others and name not in _ACROSS:
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} got cpu and npu:0")
    record.operations[name] += 1
    if torch.float64 in {kwargs.get("dtype"), *(tensor.dtype for tensor in ours)}:
        record.float64.add(name)
        if name not in _ON_FLOAT64:
            raise RuntimeError(f"{name}: Tensor self not implemented for DT_DOUBLE")
    target = kwargs.get("device")
    inside = kwargs if target is None else {**kwargs, "device": "cpu"}
    plain_args, plain_kwargs = tree_map(_inner, (args, inside))
    out = func(*plain_args, **plain_kwargs)
    if name == "copy_":
        return args[0]
    stays = bool(ours) if target is None else torch.device(target).type == "npu"
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_outer, out)) if stays else out


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, NPUTensor) else value


def _outer(value: Any) -> Any:
    return NPUTensor(value) if isinstance(value, Tensor) else value


def _make(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation that makes a tensor on the device."""
    index = torch.device(kwargs.get("device") or "npu").index or 0
    if index >= devices:
        raise RuntimeError(f"Invalid device ID {index}: this machine has {devices}")
    return _run(func, args, kwargs)


_library = torch.library.Library("_", "IMPL")
_library.fallback(_make, "PrivateUse1")


def npu_fusion_attention(*_: Any, **__: Any) -> Any:
    """transformers imports it, for attentions that a calibration does not choose."""
    raise AssertionError("a calibration has chosen the fused attention of an NPU")
