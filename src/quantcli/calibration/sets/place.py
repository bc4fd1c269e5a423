"""Where a calibration is in its folder: in the folder itself, or in a folder of its own within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantcli.calibration.sets.identity import Key
from quantcli.calibration.store import (
    further_folder,
    further_folders,
    layers_done,
    read_head,
    refusal,
)
from quantcli.core.errors import InputError


@dataclass(frozen=True)
class Place:
    """A calibration that is there, or is to be there.

    key:    of what is there, or is to be. done, layers: 0 if nothing is there.
    reason: why it is not what is there already; empty if there is nothing.
    """

    folder: Path
    key: Key
    done: int = 0
    layers: int = 0
    reason: str = ""

    @property
    def complete(self) -> bool:
        """Whether all of it is there, without hidden states, which are still to be deleted."""
        return 0 < self.layers == self.done and not any(self.folder.glob("*states-*"))


def place_of(
    folder: Path, key: Key, *, fresh: bool = False, taken: Sequence[Place] | None = None
) -> Place:
    """The place of a calibration with this key in `folder`: the calibration that is there, one that has
    more, or a place for it next to those with the same inputs and edits.

    fresh: what is there is to be made anew. taken: places that are to be filled, of whatever text and
    edits; None: those that are there must have the same.

    Raises InputError if `folder` is not a calibration, and for one of other inputs or edits.
    """
    there, planned = _places(folder, fresh=fresh), [*(taken or ())]
    for place in there:
        if place.key == key:
            return Place(place.folder, key) if fresh else place
    if fresh:
        return Place(folder, key)
    for place in there:
        if place.complete and place.key.serves(key):
            return place
    places = [*there, *planned]
    for place in planned:
        if place.key == key:
            return place
    if all(place.folder != folder for place in places):
        return Place(folder, key)
    alike = next((place for place in places if place.key.made_from(key)), None)
    close = alike or next((p for p in places if p.key.difference(key) is None), None)
    stored = places[0].key
    if stored.model != key.model or (close is None and taken is None):
        raise refusal(folder, stored, key)
    reason = ""
    if alike is not None:
        reason = f"the calibration there lacks {alike.key.missing(key)}"
    elif close is not None:
        reason = "the calibration there has other options"
    return Place(further_folder(folder, key), key, reason=reason)


def _places(folder: Path, *, fresh: bool) -> list[Place]:
    """All calibrations that are there; if they are made `fresh`, those that are kept."""
    found = []
    for place in (folder, *further_folders(folder)):
        head = read_head(place, fresh=fresh and place == folder)
        if head is not None:
            key, layers = head
            found.append(Place(place, key, layers_done(place, layers), layers))
    return found


def finished(folder: Path, key: Key) -> tuple[Path, int]:
    """The folder of the finished calibration in `folder` that has all that `key` asks for, and its
    number of layers.

    InputError if there is none.
    """
    return finished_of_texts(folder, key, any_text=False)[0]


def finished_of_texts(folder: Path, key: Key, *, any_text: bool = True) -> list[tuple[Path, int]]:
    """The same for each text of which there is one. any_text: whatever that is."""
    places, found = _places(folder, fresh=False), dict[str, tuple[Path, int]]()
    others: list[tuple[Place, Key]] = []
    for place in places:
        asked = replace(key, data=place.key.data) if any_text else key
        if not place.key.serves(asked):
            others.append((place, asked))
        elif place.complete:
            found.setdefault(place.key.data, (place.folder, place.layers))
    if found:
        return list(found.values())
    if others:
        place, asked = others[0]
        raise refusal(place.folder, place.key, asked)
    what = "no finished calibration is there"
    raise InputError(what, where=str(folder), fix="give the folder that `quantize` kept")
