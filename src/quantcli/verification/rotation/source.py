"""The source of a rotated checkpoint in its basis: the matrices are fitted, and what must fit is known
from the model's data flow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.rotation import places as of_rotation
from quantcli.checkpoint.rotation.places import Places
from quantcli.checkpoint.rotation.rotation import untied_config
from quantcli.checkpoint.spec import FLOATS, TensorSpec
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding, failed
from quantcli.sources.decode import decoded
from quantcli.verification.compare import Bounds, shape_of
from quantcli.verification.outcome import CONVERT
from quantcli.verification.reference import Reference
from quantcli.verification.rotation.fit import fit_head, fit_rows, is_turned, rows_of_weight
from quantcli.verification.rotation.turned import Constant, Heads, Turned

_FITS = 0.02  # relative error of a float tensor: bfloat16 leaves 0.002
TURNED_BOUNDS = Bounds(34.0)  # the same as SQNR, of a float matrix with edits
_ORTHOGONAL = 0.02
_ROWS = 512  # rows of an output projection that show the matrices of its heads
_CANCELS = 0.5  # distance of two matrices of a head; the noise of int4 leaves 0.1, another matrix 1.4


def is_rotated(ours: Checkpoint, reference: Checkpoint) -> bool:
    """Whether an embedding is far from that of the reference, which has the same shape.

    What differs less is damage, and checks of copies name its place.
    """
    return any(True for _ in _embeddings(ours, reference))


def _embeddings(ours: Checkpoint, reference: Checkpoint) -> Iterator[str]:
    for name in sorted(reference.tensors):
        before, after = reference.tensors[name], ours.tensors.get(name)
        if after is None or not _is_table(before) or before.spec.shape != after.spec.shape:
            continue
        if {before.spec.dtype, after.spec.dtype} <= FLOATS and is_turned(before, after):
            yield name


def _is_table(stored: StoredTensor) -> bool:
    return stored.spec.name.endswith("embed_tokens.weight") and len(stored.spec.shape) == 2


class RotatedSource:
    """The reference of a checkpoint whose stream was rotated, in the new basis.

    findings: what shows that there is no such basis, or that the matrices of heads do not cancel.
    """

    def __init__(self, ours: Reference, reference: Reference, *, trust_remote_code: bool) -> None:
        """Finds the matrices. Needs transformers, which tells from the source what its stream is."""
        self.findings: list[Finding] = []
        self.count = 0  # tensors that the rotation concerns
        if reference.target is not None:  # codes cannot be turned
            reference = Reference(decoded(reference.checkpoint))
        self.reference = reference
        self._ours = ours
        self._tensors = reference.checkpoint.tensors
        try:
            places = self._places(trust_remote_code=trust_remote_code)
        except InputError as error:
            self._fail(f"the embedding has other numbers, and {error.what}", self._embedding)
            return
        stream = self._stream(places)
        if stream is None:
            return
        tensors = dict(self._tensors)
        self._turn_stream(places, stream, tensors)
        for heads in places.heads:
            self._turn_heads(heads, tensors)
        self.count = sum(isinstance(tensor, Turned | Constant) for tensor in tensors.values())
        self.reference = Reference(replace(self.reference.checkpoint, tensors=tensors))

    @property
    def _embedding(self) -> str:
        return next(_embeddings(self._ours.checkpoint, self.reference.checkpoint), "")

    def _places(self, *, trust_remote_code: bool) -> Places:
        from quantcli.calibration.rotation.find import find_places  # needs transformers

        return find_places(self.reference.checkpoint, trust_remote_code=trust_remote_code)

    def _fail(self, what: str, name: str) -> None:
        self.findings.append(failed("rotation", what, f"`{name}`", CONVERT))

    def _stream(self, places: Places) -> Tensor | None:
        """The matrix of the stream, float32 [h, h], from the first embedding; None if there is none."""
        name = places.embeddings[0]
        after = self._ours.checkpoint.tensors.get(name)
        if after is None or after.spec.shape != self._tensors[name].spec.shape:
            self._fail("is missing, or has another shape: no rotation can be found", name)
            return None
        found = fit_rows(self._tensors[name], after)
        if found is None:
            self._fail("has too few different rows to find the rotation", name)
            return None
        if found.error > _FITS:
            what = f"is not the source's times one matrix: the relative error is {found.error:.3f}"
            self._fail(what, name)
            return None
        if found.skew > _ORTHOGONAL:
            what = f"is the source's times a matrix that is not orthogonal: off by {found.skew:.3f}"
            self._fail(what, name)
            return None
        return found.matrix.float()

    def _turn_stream(self, places: Places, stream: Tensor, tensors: dict[str, StoredTensor]) -> None:
        """All tensors of the stream in the new basis."""
        gammas = {
            norm.name: read_tensor(self._tensors[norm.name]).float() + norm.offset
            for norm in places.norms
        }
        for name, norm in places.readers.items():
            gamma = None if norm is None else gammas[norm.name]
            if name in self._tensors:
                tensors[name] = _turned(self._tensors[name], gamma=gamma, right=stream)
            else:  # a tied head
                table = self._tensors[places.embeddings[0]]
                self._untie(name, _turned(table, gamma=gamma, right=stream), tensors)
        for name in places.writers:
            tensors[name] = replace(_turned(tensors[name]), left=stream)
        for name in (*places.embeddings, *places.biases):
            tensors[name] = _turned(self._tensors[name], right=stream)
        for norm in places.norms:
            stored = tensors[norm.name]
            spec = _as_float(stored.spec)
            value = 1.0 - norm.offset
            tensors[norm.name] = Constant(spec, stored.file, stored.offset, value=value)

    def _untie(self, name: str, turned: Turned, tensors: dict[str, StoredTensor]) -> None:
        """The head that was written since the embedding no longer serves in its place."""
        if name not in self._ours.checkpoint.tensors:
            self._fail("is the head as well, which needs a tensor of its own", turned.spec.name)
            return
        tensors[name] = replace(turned, spec=replace(turned.spec, name=name))
        checkpoint = self.reference.checkpoint
        self.reference = Reference(replace(checkpoint, config=untied_config(checkpoint)))

    def _turn_heads(self, heads: of_rotation.Heads, tensors: dict[str, StoredTensor]) -> None:
        """Values and output projection with the matrices of their heads, if they have some."""
        values, output = f"{heads.values}.weight", f"{heads.output}.weight"
        if self._unlike(heads.values) or self._unlike(heads.output):
            return  # which the comparison of shapes reports
        share, width = heads.heads // len(heads.rows), heads.head_dim
        columns = [slice(at * width, (at + 1) * width) for at in range(heads.heads)]
        before_out = rows_of_weight(tensors[output], 0, _ROWS)
        after_out = rows_of_weight(self._ours.weight(heads.output), 0, _ROWS)
        matrices: list[Tensor] = []
        for number, first in enumerate(heads.rows):
            low = first // 8 * 8  # readers of codes begin at multiples of 8
            part = slice(first - low, first - low + width)
            before, after = (
                rows_of_weight(weight, low, first - low + width)[part].T
                for weight in (tensors[values], self._ours.weight(heads.values))
            )
            rows = before, after
            own = columns[number * share : (number + 1) * share]
            outputs = [(before_out[:, c], after_out[:, c]) for c in own]
            of_values, of_output = fit_head([rows]), fit_head(outputs)
            distance = float((of_values - of_output).norm()) / width**0.5
            if distance > _CANCELS:
                what = f"values of kv head {number} are turned by another matrix than `{heads.output}`"
                self._fail(f"{what} turns back: they differ by {distance:.2f}", heads.values)
            both = fit_head([rows, *outputs]).float()
            one = torch.eye(width)
            matrices.append(one if float((both - one).norm()) < _CANCELS / 2 * width**0.5 else both)
        if all(torch.equal(matrix, torch.eye(width)) for matrix in matrices):
            return
        turned = Heads(heads.rows, tuple(matrices))
        tensors[values] = replace(_turned(tensors[values]), rows=turned)
        if (bias := f"{heads.values}.bias") in tensors:
            tensors[bias] = replace(_turned(tensors[bias]), rows=turned)
        spread = tuple(matrix for matrix in matrices for _ in range(share))
        first_columns = tuple(c.start for c in columns)
        tensors[output] = replace(_turned(tensors[output]), columns=Heads(first_columns, spread))

    def _unlike(self, module: str) -> bool:
        try:
            ours = self._ours.weight(module)
        except KeyError:
            return True
        return shape_of(ours) != self._tensors[f"{module}.weight"].spec.shape


def _turned(
    stored: StoredTensor, *, gamma: Tensor | None = None, right: Tensor | None = None
) -> Turned:
    if isinstance(stored, Turned):
        return stored
    spec = _as_float(stored.spec)
    return Turned(spec, stored.file, stored.offset, source=stored, gamma=gamma, right=right)


def _as_float(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="F32")


def fault_of(before: StoredTensor, after: StoredTensor) -> str | None:
    """Why a float tensor is not the source's in the new basis, but for rounding; None if it is."""
    if before.spec.shape != after.spec.shape:
        return f"is {after.spec}, in the other model {before.spec}"
    signal = noise = 0.0
    count = max(1, _ROWS * 256 // max(1, before.spec.row_nbytes // 4))
    with before.open() as first, after.open() as second:
        for start in range(0, before.spec.shape[0], count):
            x, y = (rows.weight(start, count).double() for rows in (first, second))
            signal += float(x.square().sum())
            noise += float((y - x).square().sum())
    error = (noise / signal) ** 0.5 if signal else float(noise > 0)
    if error <= _FITS:
        return None
    return f"is not that of the other model in the basis of its embedding: relative error {error:.3f}"
