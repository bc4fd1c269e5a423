"""A checkpoint in another basis, as a checkpoint whose tensors are rotated while they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint
from quantcli.checkpoint.config.places import TEXT
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.head import tied
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.rotation.orthogonal import Hadamard, Orthogonal
from quantcli.checkpoint.rotation.places import Heads, Places
from quantcli.checkpoint.rotation.summary import sentence
from quantcli.checkpoint.rotation.virtual import Constant, Rotated, folded
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import InputError

_TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Rotation:
    """Orthogonal matrices for the places of a model.

    residual: of the residual stream; None: it stays as it is.
    heads:    of the values of a pair, by its stored module of values.
    seed:     of the signs, as in the recipe; for people.
    learning: how the matrices are to be learned from these on, as text; empty if they are not.
    """

    residual: Orthogonal | None
    heads: Mapping[str, Orthogonal] = field(default_factory=dict)
    seed: int = 0
    learning: str = ""

    @property
    def digest(self) -> str:
        """sha256 of all matrices."""
        first = self.residual.digest if self.residual else ""
        digest = hashlib.sha256(f"{first}{self.learning}".encode())
        for module, each in sorted(self.heads.items()):
            digest.update(f"\n{module}\0{each.digest}".encode())
        return digest.hexdigest()


def hadamard_rotation(
    places: Places, *, residual: bool = True, heads: bool = True, seed: int = 0
) -> Rotation:
    """Hadamard matrices with random signs for the stream, and for each pair of values and output."""
    pairs = places.heads if heads else ()
    return Rotation(
        Hadamard(places.hidden, f"{seed} residual") if residual else None,
        {pair.values: Hadamard(pair.head_dim, f"{seed} {pair.values}") for pair in pairs},
        seed,
    )


def rotated(
    checkpoint: Checkpoint, places: Places, rotation: Rotation, *, untie: bool = False
) -> Checkpoint:
    """The checkpoint in the basis of a rotation: the same function, by tensors that are computed while
    they are read.

    places: found in this checkpoint. untie: give a head that is tied a tensor of its own; config.json
    says so then. InputError for a tied head without it, and for a tensor that is not as `places` say.
    """
    names = _Names(checkpoint, places, rotation)
    if rotation.residual is not None:
        names.rotate_stream(rotation.residual, untie=untie)
    for pair in places.heads:
        if pair.values in rotation.heads:
            names.rotate_heads(pair, rotation.heads[pair.values])
    return names.checkpoint()


class _Names:
    """The tensors of a checkpoint, rotated one after the other."""

    def __init__(self, checkpoint: Checkpoint, places: Places, rotation: Rotation) -> None:
        self._checkpoint = checkpoint
        self._places = places
        self._rotation = rotation
        self._tensors = dict(checkpoint.tensors)
        self._kind = f"rotated ({rotation.digest[:16]})"
        self._untied = 0  # bytes
        self._config = checkpoint.config

    def rotate_stream(self, matrix: Orthogonal, *, untie: bool) -> None:
        """Rotate the residual stream."""
        places, stored = self._places, self._checkpoint.tensors
        if places.tied and places.head is not None:
            self._untie(places.head, matrix, untie=untie)
        for name in (*places.embeddings, *places.biases):
            self._change(name, -1, right=matrix)
        for name, norm in places.readers.items():
            if name in stored:
                self._change(name, -1, right=matrix, fold=folded(norm, stored))
        for name in places.writers:
            self._change(name, 0, left=matrix)
        for norm in places.norms:
            source = self._stored(norm.name, 0, places.hidden)
            spec = replace(source.spec, dtype="F32")
            value = float(1 - norm.offset)
            self._tensors[norm.name] = Constant(
                spec, source.file, source.offset, source=source, kind=self._kind, value=value
            )

    def rotate_heads(self, pair: Heads, matrix: Orthogonal) -> None:
        """Rotate the values of all kv heads of an attention alike."""
        values, output = f"{pair.values}.weight", f"{pair.output}.weight"
        height = pair.rows[-1] + matrix.size
        if self._stored(values, 0).spec.shape[0] < height:
            raise self._wrong(values, f"at least {height} rows")
        self._stored(output, -1, pair.heads * matrix.size)
        self._add(values, left=matrix, heads=pair.rows)
        self._add(output, right=matrix)
        if f"{pair.values}.bias" in self._tensors:
            self._add(f"{pair.values}.bias", right=matrix, heads=pair.rows)

    def checkpoint(self) -> Checkpoint:
        """The rotated checkpoint; it knows what was done."""
        checkpoint, rotation, places = self._checkpoint, self._rotation, self._places
        turned = [t for t in self._tensors.values() if isinstance(t, Rotated)]
        names = sorted({each.name for each in rotation.heads.values()})
        summary: dict[str, Any] = {
            "residual": None if rotation.residual is None else rotation.residual.name,
            "heads": ", ".join(names) or None,
            "seed": rotation.seed,
            "digest": rotation.digest,
            "tensors": len(turned),
            "norms": len(places.norms) if rotation.residual is not None else 0,
            "pairs": len(rotation.heads),
            "untied_bytes": self._untied,
            "learning": rotation.learning or None,
        }
        return replace(
            checkpoint,
            tensors=self._tensors,
            undecoded=checkpoint.on_disk,
            config=self._config,
            rotation=summary,
            notes=[*checkpoint.notes, sentence(summary)],
        )

    def _untie(self, head: str, matrix: Orthogonal, *, untie: bool) -> None:
        """Give the model a head of its own."""
        places, stored = self._places, self._checkpoint.tensors
        embedding = self._stored(places.embeddings[0], -1, places.hidden)
        nbytes = embedding.spec.nbytes
        if not untie:
            raise InputError(
                "the residual stream cannot be rotated: the output matrix is the embedding's tensor "
                f"`{embedding.spec.name}`, and the final norm is folded into one of them alone",
                where=str(self._checkpoint.path / CONFIG),
                fix=f"set rotate.untie=true, which adds {nbytes:,} bytes; or rotate.residual=false",
            )
        spec = TensorSpec(head, "F32", embedding.spec.shape)
        norm = folded(places.readers.get(head), stored)
        self._tensors[head] = Rotated(
            spec,
            embedding.file,
            embedding.offset,
            source=embedding,
            kind=self._kind,
            fold=norm,
            right=matrix,
        )
        self._untied = nbytes
        self._config = untied_config(self._checkpoint)

    def _change(self, name: str, axis: int, **how: Any) -> None:
        """Rotate the axis of a stored tensor that is as wide as the stream."""
        self._stored(name, axis, self._places.hidden)
        self._add(name, **how)

    def _add(self, name: str, **how: Any) -> None:
        """Do something more to a tensor, which may be rotated already from the other side."""
        stored = self._tensors[name]
        if isinstance(stored, Rotated):
            if any(getattr(stored, key) is not None for key in how):
                raise self._wrong(name, "rotated once from each side")
            self._tensors[name] = replace(stored, **how)
            return
        spec = replace(stored.spec, dtype="F32")
        self._tensors[name] = Rotated(
            spec, stored.file, stored.offset, source=stored, kind=self._kind, **how
        )

    def _stored(self, name: str, axis: int, size: int | None = None) -> StoredTensor:
        """A tensor of the checkpoint. InputError if it is not there, or of another size."""
        stored = self._checkpoint.tensors.get(name)
        if stored is None:
            raise self._wrong(name, "stored")
        length = stored.spec.shape[axis]
        if size is not None and (length % size if axis else length != size):
            raise self._wrong(name, f"{size} wide along dimension {axis}")
        return stored

    def _wrong(self, name: str, expected: str) -> InputError:
        return InputError(
            f"a rotation needs this tensor {expected}, and it is not",
            where=f"`{name}` in {self._checkpoint.path}",
            fix="leave `rotate` out of the recipe",
        )


def with_matrices(checkpoint: Checkpoint, matrices: Mapping[Orthogonal, Orthogonal]) -> Checkpoint:
    """A rotated checkpoint with other matrices in the places of its own, each of which has one."""
    digest = hashlib.sha256("\n".join(each.digest for each in matrices.values()).encode()).hexdigest()
    kind = f"rotated ({digest[:16]})"
    tensors: dict[str, StoredTensor] = {}
    for name, stored in checkpoint.tensors.items():
        if isinstance(stored, Rotated):
            right = None if stored.right is None else matrices[stored.right]
            left = None if stored.left is None else matrices[stored.left]
            stored = replace(stored, right=right, left=left, kind=kind)
        elif isinstance(stored, Constant):
            stored = replace(stored, kind=kind)
        tensors[name] = stored
    assert checkpoint.rotation is not None
    summary = {**checkpoint.rotation, "digest": digest}
    notes = [n for n in checkpoint.notes if n != sentence(checkpoint.rotation)] + [sentence(summary)]
    return replace(checkpoint, tensors=tensors, rotation=summary, notes=notes)


def unrotated(checkpoint: Checkpoint) -> Checkpoint:
    """A rotated checkpoint in the basis of its source; a head that was given a tensor keeps it."""
    tensors = {
        name: stored.source if isinstance(stored, Rotated | Constant) else stored
        for name, stored in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors, rotation=None)


def untied_config(checkpoint: Checkpoint) -> Settings:
    """config.json that says that the head has a tensor of its own."""
    table = checkpoint.config.plain()
    levels = [level for level in (table, table.get(TEXT)) if isinstance(level, dict)]
    for level in levels:
        if _TIED in level:
            level[_TIED] = False
    if tied(checkpoint) is not False:
        table[_TIED] = False  # tied unless it says otherwise
    return Settings(table, checkpoint.config.file, checkpoint.config.path)
