"""A recipe's rotation, carried out on a checkpoint: what is planned, calibrated and computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.planning.plan import Plan, quantized_items
from quantcli.recipe.recipe import Recipe


def in_basis(recipe: Recipe, checkpoint: Checkpoint, *, trust_remote_code: bool) -> Checkpoint:
    """The checkpoint in the basis that the recipe's `rotate` asks for; as it is without that.

    No weight is read. trust_remote_code: the model's own code may run, which says what its stream is.
    InputError with the place in the recipe for a model that cannot be rotated.
    """
    block = recipe.file.rotate
    if block is None or checkpoint.rotation is not None:
        return checkpoint
    from quantcli.calibration.rotation.find import find_places
    from quantcli.checkpoint.rotation.rotation import hadamard_rotation, rotated
    from quantcli.sources.decode import decoded

    checkpoint = decoded(checkpoint)
    try:
        places = find_places(checkpoint, trust_remote_code=trust_remote_code, residual=block.residual)
        if block.heads and not block.residual and not places.heads:
            raise InputError("no attention of the model has values that can be rotated by heads")
        rotation = hadamard_rotation(
            places, residual=block.residual, heads=block.heads, seed=block.seed
        )
        if block.learn is not None:
            learning = f"{block.learn.epochs} epochs, rate {block.learn.rate}"
            rotation = replace(rotation, learning=learning)
        return rotated(checkpoint, places, rotation, untie=block.untie)
    except InputError as error:
        where = f"{recipe.where('rotate')}; {error.where}" if error.where else recipe.where("rotate")
        raise InputError(error.what, where=where, fix=error.fix) from None


def learned_basis(plan: Plan, folder: Path | None) -> Checkpoint:
    """The checkpoint of a plan, with the matrices that a calibration in `folder` has learned; as it is
    if its recipe asks for none. InputError if they are missing, or not of this model."""
    checkpoint = plan.checkpoint
    if folder is None or not plan.recipe.file.learns_rotation or not _learned_from_here(checkpoint):
        return checkpoint
    from quantcli.calibration.rotation.learning import learned_matrices
    from quantcli.checkpoint.rotation.rotation import with_matrices

    return with_matrices(checkpoint, learned_matrices(checkpoint, folder))


def _learned_from_here(checkpoint: Checkpoint) -> bool:
    """Whether the matrices are the Hadamard ones that learning begins with."""
    from quantcli.checkpoint.rotation.orthogonal import Hadamard
    from quantcli.checkpoint.rotation.virtual import Rotated

    return any(
        isinstance(tensor, Rotated) and isinstance(tensor.right, Hadamard)
        for tensor in checkpoint.tensors.values()
    )


def learn(
    plan: Plan,
    folder: Path,
    batches: Sequence[Batch],
    progress: Progress,
    *,
    device: torch.device,
    workers: int,
    trust_remote_code: bool,
) -> None:
    """Learn the matrices that a plan's recipe asks for, into `folder`; nothing if they are there."""
    from quantcli.calibration.replay.replay import Replay
    from quantcli.calibration.replay.skeleton import Skeleton
    from quantcli.calibration.rotation.find import trace
    from quantcli.calibration.rotation.learning import Learning, Schedule, stream_of
    from quantcli.checkpoint.rotation.rotation import unrotated

    block = plan.recipe.file.rotate
    assert block is not None
    assert block.learn is not None
    source = unrotated(plan.checkpoint)
    traced = trace(source, trust_remote_code=trust_remote_code)
    skeleton = Skeleton(source, "F32", trust_remote_code=trust_remote_code)
    replay = Replay(skeleton, batches, device=device, workers=workers)
    replay.report_to(progress, 0)
    schedule = Schedule(block.learn.epochs, block.learn.rate)
    rounded = {item.module for item in quantized_items(plan) if not item.scheme.numerics.transform}
    unrounded = frozenset(
        name.removesuffix(".weight") for name in source.tensors if name.endswith(".weight")
    ).difference(rounded)
    learning = Learning(replay, traced, schedule, folder, progress, unrounded=unrounded)
    stream, heads = stream_of(plan.checkpoint, traced)
    learning.run(stream, heads)
