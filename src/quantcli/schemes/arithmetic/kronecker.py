"""Kronecker transforms: inputs x, seen as a matrix X [l, r], come to the kernel as L^T X R.

A weight that is to be multiplied with them holds for each row w, seen as W [l, r],

    W' = L^-1 W R^-T        since  sum (L^T X R) * (L^-1 W R^-T) = sum X * W.

L and R are what the engine holds, rounded to its dtype; their inverses are taken in float64, so that
the pair is exact whatever the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantcli.core.errors import InputError
from quantcli.core.exact import exact

# Half of a float32's digits are gone at 1e4; what is stored in bfloat16 is off by far more than that.
LARGEST_CONDITION = 1e4


def undo(rows: Tensor, left_inverse: Tensor, right_inverse: Tensor) -> Tensor:
    """W' of rows [..., n, k] in any float dtype, by the inverses float64 [l, l] and [r, r]: float32."""
    left, right = exact(left_inverse), exact(right_inverse)
    grid = exact(rows).double().reshape(-1, len(right)) @ right.mT
    grid = left @ grid.view(-1, len(left), len(right))
    return grid.reshape(rows.shape).float().to(rows.device)


def redo(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The inverse of `undo`: float32 [..., n, k] -> float32, L W' R^T in float64."""
    return undo(rows, exact(left).double(), exact(right).double())


def served(x: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Inputs as the kernel transforms them: x [..., k] -> float32 [..., k], values of `dtype`.

    Two products with float32 sums: X R, rounded to the dtype of the model, which is that of `left`;
    then L^T (X R), rounded to `dtype` whatever the model is: float16 before int4 codes, in which what
    is over 65504 becomes infinite, bfloat16 before fp4 ones.
    """
    inner = x.float().reshape(-1, len(right)) @ right.float()
    inner = inner.to(left.dtype).float().view(-1, len(left), len(right))
    return (left.float().mT @ inner).to(dtype).float().reshape(x.shape)


def inverse(matrix: Tensor, name: str) -> Tensor:
    """Inverse of a square matrix, float64. InputError if the matrix is numerically singular."""
    numbers = exact(matrix).double()
    finite = bool(torch.isfinite(numbers).all())
    condition = float(torch.linalg.cond(numbers)) if finite else float("inf")
    if not condition <= 2 * LARGEST_CONDITION:
        raise InputError(
            f"{name} has a condition number of {condition:.3g}: its inverse has no digits left",
            fix="calibrate again, with a smaller lr or fewer epochs",
        )
    inverted: Tensor = torch.linalg.inv(numbers)
    return inverted
