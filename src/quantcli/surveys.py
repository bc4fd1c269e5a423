"""The largest value of a weight, and of those that an engine merges with it: a first pass over them.

Only for schemes whose scale spans a whole weight. Each group is read once a run, by whichever worker
needs it first.
"""

from __future__ import annotations

import threading
from collections import defaultdict

import torch
from torch import Tensor

from quantcli.checkpoint.encoded import Encoded
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.tensors import first_not_finite, read_span
from quantcli.core.errors import InputError
from quantcli.planning.measured import Edit
from quantcli.planning.plan import Quantize
from quantcli.schemes.arithmetic import rounding

_BLOCK = 512 * 1024  # elements: what is made of them stays in the cache


class Surveys:
    """What was found so far. Threads may share it."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def largest(self, item: Quantize) -> Tensor:
        """max |w|, edited, over the weights that an item's scale spans: float32 [1].

        InputError for NaN and Inf.
        """
        key = item.survey[0][0].spec.name
        with self._lock:
            lock = self._locks[key]
        with lock:
            if key not in self._found:
                largest = [_largest(stored, edit) for stored, edit in item.survey]
                self._found[key] = torch.stack(largest).amax().view(1)
            return self._found[key]


def _largest(stored: StoredTensor, edit: Edit | None) -> Tensor:
    n, k = stored.spec.shape
    factors = edit.load() if edit else None
    step = max(1, _BLOCK // k)
    found = torch.zeros(())
    for start in range(0, n, step):
        rows = read_span(stored, start, min(step, n - start))
        edited = rows if factors is None else factors.apply(rows, start)
        found = torch.maximum(found, rounding.absmax(edited).amax())
        if not bool(torch.isfinite(found)):
            raise not_finite("weight", rows, stored, start) or InputError(
                "smoothing makes this weight overflow",
                where=f"`{stored.spec.name}`, rows from {start}, in {stored.file.name}",
                fix="leave it out of `smooth`, or keep this module float",
            )
    return found


def not_finite(kind: str, rows: Tensor, stored: StoredTensor, first_row: int) -> InputError | None:
    """The error for the first NaN or Inf among rows of a stored tensor; None where there is none.

    Where the rows were decoded, it names what they were decoded from.
    """
    bad = (~torch.isfinite(rows)).nonzero()
    if not len(bad):
        return None
    index, value = bad[0].tolist(), float(rows[tuple(bad[0])])
    index[:1] = [first_row + row for row in index[:1]]
    for part in stored.parts if isinstance(stored, Encoded) else ():
        if (found := first_not_finite(part)) is not None:
            index, value = found
            stored, kind = part, part.spec.name.rpartition(".")[2]
            break
    place = f"[{', '.join(map(str, index))}]" if index else ""
    return InputError(
        f"{kind} is {value}",
        where=f"`{stored.spec.name}`{place} in {stored.file.name}",
        fix="the model is damaged: fetch it again and run with --fresh, or keep this module float",
    )
