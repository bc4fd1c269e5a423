"""A CPU that lists AMX, where there is none: what torch and vLLM ask before they use it."""

import ctypes
from pathlib import Path

import torch

FLAGS = ("amx_tile", "amx_int8", "amx_bf16")
SIZE = 96  # bytes of the record; one that lies behind it is never 0 and turned on without effect


def list_amx() -> None:
    """Turn the flags on in the record that torch keeps of the CPU, of one byte for each.

    RuntimeError where one is not found: then torch keeps another record than its release 2.13.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
    record = (ctypes.c_ubyte * SIZE).in_dll(library, "cpuinfo_isa")
    for flag in FLAGS:
        if not any(_turns_on(record, at, flag) for at in range(SIZE)):
            raise RuntimeError(f"torch keeps no {flag} of the CPU")
    torch.cpu.get_capabilities.cache_clear()


def _turns_on(record: ctypes.Array, at: int, flag: str) -> bool:
    """Whether this byte is the flag's, which then stays on."""
    before, record[at] = record[at], 1
    if torch._C._cpu._get_cpu_capability().get(flag):
        return True
    record[at] = before
    return False
