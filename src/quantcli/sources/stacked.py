"""Experts that are stored together: a matrix of each one as a source tensor of its own, and back.

A family's checkpoints may hold one matrix of all experts of a layer as one tensor, a stack. The engine
takes quantized experts one by one, so every matrix within a stack is presented as a tensor with the
name that the engine's loader takes. EXPERTS has an entry for each family; a new family is an entry.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import CONFIG, STACKED, Checkpoint
from quantcli.checkpoint.columns import STRIP_BYTES, Columns
from quantcli.checkpoint.header import Rows, StoredTensor
from quantcli.checkpoint.rows import RowReader
from quantcli.checkpoint.spec import TensorSpec
from quantcli.sources.base import AGAIN, wrong
from quantcli.targets.vllm_family import EXPERT

_GATED = ("gate_proj", "up_proj")
_MOST_EXPERTS = 65536  # of a layer: a header must not make up more


@dataclass(frozen=True)
class Stack:
    """One stored tensor with a matrix, or several, of every expert.

    name:        the end of its name.
    projections: last parts of the names of an expert's matrices, in the order of their rows.
    hidden:      the side of each matrix that is as wide as hidden states.
    transposed:  whether an expert's part is stored [k, n] and not [n, k].
    interleaved: whether rows of the projections alternate; otherwise each has its rows together.
    flat:        whether experts follow each other in dimension 0 of a 2-D tensor; otherwise it is 3-D.
    """

    name: str
    projections: tuple[str, ...]
    hidden: Literal["inputs", "outputs"]
    transposed: bool = False
    interleaved: bool = False
    flat: bool = False

    def __str__(self) -> str:
        several = len(self.projections)
        sides = [f"{several} x n" if several > 1 else "n", "k"]
        height, width = reversed(sides) if self.transposed else sides
        return f"[experts x {height}, {width}]" if self.flat else f"[experts, {height}, {width}]"

    def matrices(self, stored: StoredTensor, experts: str, count: int) -> list[ExpertMatrix] | None:
        """The matrices in a stored stack, expert by expert; None for a shape that no such stack has.

        experts: the name of the set. count: of the experts in a flat stack, whose shape does not tell.
        """
        spec, several = stored.spec, len(self.projections)
        if len(spec.shape) != (2 if self.flat else 3) or not spec.numel:
            return None
        if self.flat:
            if count < 1 or spec.shape[0] % count:
                return None
            height, width = spec.shape[0] // count, spec.shape[1]
        else:
            count, height, width = spec.shape
        rows, k = (width, height) if self.transposed else (height, width)
        if rows % several or count > _MOST_EXPERTS:
            return None
        n = rows // several
        whole = TensorSpec(spec.name, spec.dtype, (height, width))
        return [
            ExpertMatrix(
                TensorSpec(f"{experts}.{expert}.{projection}.weight", spec.dtype, (n, k)),
                stored.file,
                stored.offset + expert * whole.nbytes,
                stack=stored,
                whole=StoredTensor(whole, stored.file, stored.offset + expert * whole.nbytes),
                first=number if self.interleaved else number * n,
                step=several if self.interleaved else 1,
                transposed=self.transposed,
            )
            for expert in range(count)
            for number, projection in enumerate(self.projections)
        ]

    def merge(self, matrices: Sequence[Tensor]) -> Tensor:
        """The stack, from the matrices [n, k] of the first expert, then of the second and so on.

        Its shape and the order of its elements are those that `matrices` reads: splitting and merging
        give the same bytes.
        """
        wholes = []
        for start in range(0, len(matrices), len(self.projections)):
            parts = list(matrices[start : start + len(self.projections)])
            whole = torch.stack(parts, 1).flatten(0, 1) if self.interleaved else torch.cat(parts)
            wholes.append(whole.t() if self.transposed else whole)
        return torch.cat(wholes) if self.flat else torch.stack(wholes)


@dataclass(frozen=True)
class ExpertLayout:
    """How a family stores experts.

    experts: the end of the name, before the expert's number, that per-expert modules have in the
             engine's loader: `....experts.{number}.{projection}`.
    stacks:  the tensors that hold them.
    count:   the key of config.json for the number of experts; flat stacks need it, others must agree.
    """

    experts: str
    stacks: tuple[Stack, ...]
    count: str = "num_local_experts"


_GRANITE = ExpertLayout(
    "block_sparse_moe.experts",
    (
        Stack("block_sparse_moe.input_linear.weight", _GATED, "inputs"),
        Stack("block_sparse_moe.output_linear.weight", ("down_proj",), "outputs"),
    ),
)

# By `model_type`. Sources: transformers 5.23.0, conversion_mapping.py:106-108,853-869 (names),
# models/granitemoe/modeling_granitemoe.py:128-165 (order of rows); vllm 0.32.0, model_executor/models:
# granitemoe.py:305-320 and granitemoehybrid.py:409-434 (names that loaders take). granitemoe_swa:
# transformers 5.23.0, models/granitemoe_swa/modeling_granitemoe_swa.py:69-80, saved as it is; vllm
# 0.32.0, model_executor/models/registry.py:129. aria_text: transformers 5.23.0,
# conversion_mapping.py:843-852, models/aria/modeling_aria.py:271-313; vllm 0.32.0,
# model_executor/models/aria.py:219-229,272-282.
EXPERTS: Mapping[str, ExpertLayout] = {
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoe_swa": ExpertLayout(
        "block_sparse_moe.experts",
        (
            Stack("block_sparse_moe.experts.gate_up_proj", _GATED, "inputs"),
            Stack("block_sparse_moe.experts.down_proj", ("down_proj",), "outputs"),
        ),
    ),
    "aria_text": ExpertLayout(
        "mlp.experts",
        (
            Stack("mlp.experts.fc1.weight", _GATED, "inputs", transposed=True),
            Stack("mlp.experts.fc2.weight", ("down_proj",), "outputs", transposed=True),
        ),
        "moe_num_experts",
    ),
}


@dataclass(frozen=True, slots=True)
class ExpertMatrix(StoredTensor):
    """A matrix [n, k] of one expert within a stack, which is read by rows like any other.

    stack:      the tensor on disk.
    whole:      what the stack holds for this expert, [h, w] as stored.
    first, step: its rows are the rows `first`, `first` + `step`, .. of `whole`, or columns if it is
                `transposed`.
    """

    # `field()` keeps the properties of the base class from being taken for defaults
    stack: StoredTensor = field()
    whole: StoredTensor = field()
    first: int = field()
    step: int = field()
    transposed: bool = field()

    @property
    def buffer_nbytes(self) -> int:
        """Bytes that a reader keeps in addition to rows: a strip of columns, or rows in between."""
        return STRIP_BYTES if self.transposed or self.step > 1 else 0

    def open(self) -> AbstractContextManager[Rows]:
        """A reader of its rows. One reader is one thread's."""
        return _ExpertRows(self)


class _ExpertRows:
    """Rows of a matrix within a stack; no more of the stack is read than they span."""

    def __init__(self, matrix: ExpertMatrix) -> None:
        self._matrix = matrix
        self._columns = Columns(matrix.whole) if matrix.transposed else None
        self._rows = RowReader(matrix.whole)
        self._files = ExitStack()

    def __enter__(self) -> Self:
        self._files.enter_context(self._columns or self._rows)
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def weight(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count), as many as there are: [rows, k] in the stored dtype."""
        step, last = self._matrix.step, min(start + count, self._matrix.spec.shape[0]) - 1
        begin, end = self._matrix.first + start * step, self._matrix.first + last * step + 1
        if self._columns is not None:
            rows = self._columns.columns(begin, end)
        else:
            rows = self._rows.weight(begin, end - begin)
        return rows if step == 1 else rows[::step].contiguous()


def layout_of(checkpoint: Checkpoint) -> ExpertLayout | None:
    """The entry of EXPERTS for a checkpoint, by the model type of its language model."""
    types = (config.get("model_type") for config in (checkpoint.text_config, checkpoint.config))
    return next((EXPERTS[kind] for kind in types if isinstance(kind, str) and kind in EXPERTS), None)


def split_experts(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with an `ExpertMatrix` for each matrix in its stacks, in their place.

    As it is if its family has no entry in EXPERTS, or no stack. A note names the tensors. InputError
    for a stack whose shape does not fit the entry or config.json.
    """
    layout = layout_of(checkpoint)
    if layout is None:
        return checkpoint
    tensors: dict[str, StoredTensor] = {}
    notes: list[str] = []
    sets: dict[str, list[list[ExpertMatrix]]] = defaultdict(list)  # stacks by the name of their set
    for name, stored in checkpoint.tensors.items():
        stack, experts = _stack_of(name, layout)
        if stack is None:
            tensors[name] = stored
            continue
        matrices = _matrices(stored, stack, experts, checkpoint, layout)
        sets[experts].append(matrices)
        tensors |= {matrix.spec.name: matrix for matrix in matrices}
        if not notes:
            first = matrices[0].spec.name.removesuffix(".weight")
            what = f"{STACKED}, such as in `{name}`: rules match names such as `{first}`"
            notes = [note for note in checkpoint.notes if not note.startswith(STACKED)]
            notes.append(what)
    if not notes:
        return checkpoint
    _must_be_whole(checkpoint, layout, sets)
    return replace(checkpoint, tensors=tensors, undecoded=checkpoint.on_disk, notes=notes)


def _stack_of(name: str, layout: ExpertLayout) -> tuple[Stack | None, str]:
    """The stack that a tensor is, and the name of the set of experts in it."""
    for stack in layout.stacks:
        prefix = name.removesuffix(stack.name)
        if prefix != name and (not prefix or prefix.endswith(".")):
            return stack, prefix + layout.experts
    return None, ""


def _must_be_whole(
    checkpoint: Checkpoint, layout: ExpertLayout, sets: Mapping[str, list[list[ExpertMatrix]]]
) -> None:
    """InputError for a set of experts that lacks a stack, whose stacks do not fit together, or that has
    tensors of single experts as well."""
    for name in checkpoint.tensors:
        match = EXPERT.fullmatch(name)
        if match and match["experts"] in sets:
            what = f"holds the experts, and `{name}` is there as well: which is right?"
            raise wrong(sets[match["experts"]][0][0].stack, what)
    for experts, stacks in sets.items():
        first = stacks[0]
        if len(stacks) < len(layout.stacks):
            names = [experts.removesuffix(layout.experts) + stack.name for stack in layout.stacks]
            missing = next(name for name in names if name not in checkpoint.tensors)
            raise wrong(first[0].stack, f"experts lack a part: `{missing}` is missing")
        for other in stacks[1:]:
            # a matrix of the first stack gives what one of another takes, or takes what it gives
            counts = (len({matrix.offset for matrix in each}) for each in (first, other))
            if first[0].spec.shape != other[0].spec.shape[::-1] or len(set(counts)) > 1:
                what = f"is {other[0].stack.spec}, and does not fit `{first[0].stack.spec.name}`, "
                raise wrong(other[0].stack, what + f"{first[0].stack.spec}")


def _matrices(
    stored: StoredTensor, stack: Stack, experts: str, checkpoint: Checkpoint, layout: ExpertLayout
) -> list[ExpertMatrix]:
    config = checkpoint.text_config
    count = config.get(layout.count)
    matrices = stack.matrices(stored, experts, count if type(count) is int else 0)
    expected = f"is {stored.spec}; `{config.get('model_type')!s:.40}` stores experts as {stack}"
    if matrices is None:
        raise wrong(stored, expected)
    if type(count) is int and len(matrices) != count * len(stack.projections):
        what = f"{expected}, and {CONFIG} has {count} in `{layout.count}`"
        raise wrong(stored, what, f"{AGAIN}, with the {CONFIG} that belongs to it")
    hidden, (n, k) = config.get("hidden_size"), matrices[0].spec.shape
    width = k if stack.hidden == "inputs" else n
    if type(hidden) is int and width != hidden:
        side = "k" if stack.hidden == "inputs" else "n"
        what = f"{expected}, with {side} the `hidden_size` of {CONFIG}, {hidden}"
        raise wrong(stored, what, f"{AGAIN}, with the {CONFIG} that belongs to it")
    return matrices


@dataclass(frozen=True)
class MergedExperts:
    """A stack that a family's library expects, and the stored tensors that make it up in order."""

    name: str
    stack: Stack
    matrices: tuple[StoredTensor, ...]


def merged_experts(checkpoint: Checkpoint) -> Iterator[MergedExperts]:
    """The stacks that tensors with names of single experts make up; the inverse of `split_experts`.

    A set that lacks a matrix of an expert makes up none.
    """
    layout = layout_of(checkpoint)
    if layout is None:
        return
    sets: dict[str, dict[tuple[int, str], StoredTensor]] = defaultdict(dict)
    for name, stored in checkpoint.tensors.items():
        match = EXPERT.fullmatch(name.removesuffix(".weight"))
        if match and name.endswith(".weight") and match["experts"].endswith(layout.experts):
            sets[match["experts"]][int(match["index"]), match["rest"]] = stored
    for experts, members in sets.items():
        count = 1 + max(expert for expert, _ in members)
        for stack in layout.stacks:
            if count > len(members):
                continue
            keys = [(expert, name) for expert in range(count) for name in stack.projections]
            matrices = [members[key] for key in keys if key in members]
            if len(matrices) == len(keys):
                prefix = experts.removesuffix(layout.experts)
                yield MergedExperts(prefix + stack.name, stack, tuple(matrices))
