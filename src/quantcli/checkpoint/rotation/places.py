"""Which stored tensors a rotation changes: what enters the residual stream, reads it and adds to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Norm:
    """An RMSNorm of the residual stream, which multiplies by offset + weight.

    name: of its stored weight [h]. offset: 1 if the weight is stored as its distance from 1, else 0.
    """

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Heads:
    """The values of an attention and the projection of its output.

    values:   stored module; head_dim rows of its weight give the values of a kv head (and its bias).
    rows:     the first of these rows, for each kv head; the matrix may hold q and k as well.
    output:   stored module [.., heads x head_dim] that reads them, head after head; `heads / len(rows)`
              heads in a row read the same kv head.
    """

    values: str
    rows: tuple[int, ...]
    output: str
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Places:
    """All stored tensors of a decoder that the basis of its residual stream concerns.

    hidden:     the width h of the stream.
    embeddings: weights [vocab, h] whose rows enter the stream.
    readers:    weights [n, h] that read the stream, with the norm before each; None if there is none.
    writers:    weights [h, k] whose outputs are added to the stream.
    biases:     tensors [h] or [.., h] that are added to the stream: biases of writers.
    norms:      each norm that `readers` names, once.
    heads:      pairs of values and output projection that can have a matrix of their own.
    head:       the weight of the output matrix, which is a reader, too; None if the model has none.
    tied:       whether `head` is not stored, since the first of `embeddings` serves in its place.
    """

    hidden: int
    embeddings: tuple[str, ...]
    readers: Mapping[str, Norm | None]
    writers: tuple[str, ...]
    biases: tuple[str, ...]
    norms: tuple[Norm, ...]
    heads: tuple[Heads, ...] = ()
    head: str | None = None
    tied: bool = False

    @property
    def digest(self) -> str:
        """sha256 of all that is here."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
