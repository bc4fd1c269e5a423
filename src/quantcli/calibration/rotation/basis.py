"""A recipe's rotation, carried out on a checkpoint: what is planned, calibrated and computed again."""

from __future__ import annotations

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.errors import InputError
from quantcli.recipe.recipe import Recipe


def in_basis(recipe: Recipe, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in the basis that the recipe's `rotate` asks for; as it is without that.

    No weight is read. InputError with the place in the recipe for a model that cannot be rotated.
    """
    block = recipe.file.rotate
    if block is None or checkpoint.rotation is not None:
        return checkpoint
    from quantcli.calibration.rotation.find import find_places
    from quantcli.checkpoint.rotation.rotation import hadamard_rotation, rotated
    from quantcli.sources.decode import decoded

    checkpoint = decoded(checkpoint)
    try:
        places = find_places(checkpoint, residual=block.residual)
        if block.heads and not block.residual and not places.heads:
            raise InputError("no attention of the model has values that can be rotated by heads")
        rotation = hadamard_rotation(
            places, residual=block.residual, heads=block.heads, seed=block.seed
        )
        return rotated(checkpoint, places, rotation, untie=block.untie)
    except InputError as error:
        where = f"{recipe.where('rotate')}; {error.where}" if error.where else recipe.where("rotate")
        raise InputError(error.what, where=where, fix=error.fix) from None
