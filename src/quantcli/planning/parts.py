"""A conversion on several machines: which of a plan's shards each writes, decided by the plan alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.core.cluster.executor import Executor
from quantcli.core.errors import InputError

if TYPE_CHECKING:
    from quantcli.planning.plan import Shard, Work

PART_VERSION = 1  # of the form of descriptions
MOST = 100_000
ON_NODES = "nodes"  # in place of a part: each node of a cluster writes one


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"

    @property
    def carries(self) -> bool:
        """Whether this part carries the files next to the weights; one part does."""
        return self.number == 1

    def folder(self, out: Path) -> Path:
        """Where this part of the checkpoint `out` goes."""
        return out.with_name(f"{out.name}.part-{self.number}-of-{self.of}")

    def shards(self, plan: Work) -> tuple[Shard, ...]:
        """This part's shards, in the plan's order; none if there are fewer shards than parts."""
        parts = split(plan, self.of)
        return tuple(shard for shard in plan.shards if parts[shard.file] == self.number)

    def nbytes(self, plan: Work) -> int:
        """Bytes of this part, without what describes it."""
        shards = sum(shard.nbytes for shard in self.shards(plan))
        if not self.carries:
            return shards
        return shards + sum(map(len, plan.sidecars.values())) + sum(plan.copies.values())


def parse_part(text: str) -> Part:
    """`2/3` -> part 2 of 3. InputError for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    number, of = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= of <= MOST:
        raise InputError(
            "option is not a part of several parts",
            where=f"--part {text}",
            fix="such as --part 2/3 for the second of three, or --part nodes with --executor ray",
        )
    return Part(number, of)


def check_on_nodes(executor: Executor | None) -> None:
    """InputError for parts on nodes without a cluster."""
    if executor is None:
        raise InputError(
            "nodes write parts only if there is a cluster",
            where="--part nodes",
            fix="add --executor ray, or give one part, such as --part 1/3",
        )


def split(plan: Work, of: int) -> dict[str, int]:
    """The part of each shard, from 1: the largest first, each to the part that has least so far."""
    loads = [0] * of
    parts = {}
    for shard in sorted(plan.shards, key=lambda shard: -shard.nbytes):  # equal ones in their order
        least = loads.index(min(loads))
        loads[least] += shard.nbytes
        parts[shard.file] = least + 1
    return parts


def part_head(plan: Work, part: Part, manifest: dict[str, Any], *, checksum: bool) -> dict[str, Any]:
    """The description of a part and of the whole: with it, parts are joined without the model.

    manifest: the whole checkpoint's manifest without its files.
    """
    return {
        "part_version": PART_VERSION,
        "part": part.number,
        "of": part.of,
        "checksum": checksum,
        "shards": split(plan, part.of),
        "carried": sorted([*plan.sidecars, *plan.copies]),
        "manifest": manifest,
    }
