"""Panics of Rust code, as Python sees them."""

from __future__ import annotations

_PANIC = "pyo3_runtime.PanicException"  # no module has it, and it is not an Exception


def is_panic(error: BaseException) -> bool:
    """Whether an exception is a panic of Rust code, which no `except Exception` catches."""
    kind = type(error)
    return f"{kind.__module__}.{kind.__qualname__}" == _PANIC
