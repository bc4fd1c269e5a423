from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from quantcli.checkpoint.spec import (
    DTYPES,
    FLOAT_NAMES,
    FLOATS,
    TensorSpec,
    safetensors_dtype,
    torch_dtype,
)
from quantcli.core.errors import MachineError


@pytest.mark.parametrize(
    ("spec", "numel", "itemsize", "nbytes", "row_nbytes"),
    [
        (TensorSpec("w", "BF16", (3, 5)), 15, 2, 30, 10),
        (TensorSpec("w", "F32", (2, 3, 4)), 24, 4, 96, 48),
        (TensorSpec("w", "F4", (3, 6)), 18, 0.5, 9, 3),
        (TensorSpec("scalar", "F64", ()), 1, 8, 8, 8),
        (TensorSpec("empty", "U8", (0, 7)), 0, 1, 0, 0),
        (TensorSpec("w", "C64", (2,)), 2, 8, 16, 8),
    ],
)
def test_sizes(spec: TensorSpec, numel: int, itemsize: float, nbytes: int, row_nbytes: int) -> None:
    assert (spec.numel, spec.itemsize, spec.nbytes, spec.row_nbytes) == (
        numel,
        itemsize,
        nbytes,
        row_nbytes,
    )


def test_a_spec_shows_its_dtype_and_shape() -> None:
    assert str(TensorSpec("w", "BF16", (3, 5))) == "BF16 [3, 5]"
    assert str(TensorSpec("w", "I64", ())) == "I64 []"


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_has_a_torch_dtype_of_its_width(name: str) -> None:
    bits, _ = DTYPES[name]
    found = torch_dtype(name)
    assert safetensors_dtype(found) == name
    # torch counts two 4-bit values as one element of a byte
    assert found.itemsize * 8 == max(bits, 8)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("BF16", torch.bfloat16), ("F8_E4M3", torch.float8_e4m3fn), ("BOOL", torch.bool)],
)
def test_some_dtypes_by_hand(name: str, dtype: torch.dtype) -> None:
    assert torch_dtype(name) is dtype


def test_names_of_config_json_are_the_float_dtypes() -> None:
    assert set(FLOAT_NAMES.values()) == FLOATS
    assert {name: str(torch_dtype(key)) for name, key in FLOAT_NAMES.items()} == {
        name: f"torch.{name}" for name in FLOAT_NAMES
    }


def test_a_torch_without_the_dtype_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DTYPES, "F2", (2, "float2_of_tomorrow"))
    with pytest.raises(MachineError) as caught:
        torch_dtype("F2")
    assert caught.value.what == f"torch {torch.__version__} cannot hold F2"
    assert caught.value.fix == "install a newer torch"


def test_reading_headers_needs_no_torch() -> None:
    code = (
        "import sys, quantcli.checkpoint.inspection, quantcli.checkpoint.spec;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
