"""Compiles kernels. Imported only if the machine code is not there yet."""

from __future__ import annotations

import json
from typing import Any

from quantcli.core.environment import environment
from quantcli.core.kernels.machine import cpu

_CPU = cpu()
# numba reads them when it is imported and when it compiles: both compilers must take the same CPU
_VARIABLES = dict(zip(("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"), _CPU, strict=True))

with environment(_VARIABLES):
    import llvmlite.binding as llvm
    from numba import njit, types

    from quantcli.core.kernels import loops, zero_points

KERNELS = loops.KERNELS | zero_points.KERNELS
# exact arithmetic, and no code that would call Python
_OPTIONS: Any = {
    "fastmath": False, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True,
}  # fmt: skip


def compiled(name: str, *words: str) -> bytes:
    """A line of JSON, with the name of the function and the kinds of its arguments; then the object."""
    function, signature = KERNELS[name](*words)
    with environment(_VARIABLES):
        dispatcher: Any = njit(signature, **_OPTIONS)(function)
        (overload,) = dispatcher.overloads.values()
        assembly = dispatcher.inspect_llvm(dispatcher.signatures[0])
    module = llvm.parse_assembly(assembly)
    target = llvm.Target.from_triple(llvm.get_process_triple())
    name, features = _CPU
    machine = target.create_target_machine(cpu=name, features=features, opt=3)
    code: bytes = machine.emit_object(module)
    header = [overload.fndesc.llvm_func_name, "".join(map(_kind, signature.args)), len(code)]
    return json.dumps(header).encode() + b"\n" + code


def _kind(argument: Any) -> str:
    """The kind of an argument, as `machine` names it."""
    if isinstance(argument, types.CPointer):
        return "p"
    return "f" if argument == types.float32 else "i"
