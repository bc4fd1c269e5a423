"""From a checkpoint's manifest to the plan of its conversion, as far as both can be trusted.

Manifest and recipe came with the checkpoint: they are read as data, and a false recipe makes other
numbers than the checkpoint holds. An absent or unusable one goes to the report.
"""

from __future__ import annotations

from pathlib import Path

from quantcli.calibration.rotation.basis import in_basis, learned_basis
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.files import MANIFEST, RECIPE_FILE, SOURCE_RECIPE
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.manifest import has_recipe, tool_of, tool_text
from quantcli.core.errors import InputError
from quantcli.core.findings import failed, noted
from quantcli.planning.measured import Measured
from quantcli.planning.plan import Plan, Work, quantized_items
from quantcli.planning.planner import make_plan
from quantcli.planning.repack import plan_repacking
from quantcli.recipe.recipe import Recipe, load_recipe
from quantcli.targets.base import StoredCheckpoint
from quantcli.verification.again.compare import GIVE_CALIBRATION, NOT_RECOMPUTED, Recomputation
from quantcli.verification.again.difference import CHECK
from quantcli.verification.outcome import CONVERT
from quantcli.verification.structure import Structure

_DAMAGE = frozenset({"headers", "index"})  # checks after whose errors tensors cannot be read


class _Unusable(Exception):
    """Nothing can be recomputed; the reason as text."""


def plan_again(
    structure: Structure, model: Path, calibration: Path | None, *, trust_remote_code: bool
) -> Recomputation | None:
    """The conversion of `model` by which a checkpoint was made; None if it is not known.

    The reason goes to the report then. calibration: the folder that `quantize` kept. InputError for
    one of something else, or of no use. trust_remote_code: as of `in_basis`.
    """
    report = structure.report
    try:
        return _plan_again(structure, model, calibration, trust_remote_code=trust_remote_code)
    except _Unusable as reason:
        if calibration is not None:
            what = f"the calibration was not used: {reason}"
            report.add([noted(CHECK, what, f"--calibration {calibration}")])
        if structure.manifest is not None:  # its maker could have it recomputed
            report.add([noted(CHECK, f"{NOT_RECOMPUTED}: {reason}")])
        report.not_checked.append(f"{NOT_RECOMPUTED}: {reason}")
        return None


def _plan_again(
    structure: Structure, model: Path, calibration: Path | None, *, trust_remote_code: bool
) -> Recomputation:
    manifest, stored, target = structure.manifest, structure.stored, structure.target
    assert stored is not None
    assert target is not None
    if not structure.whole or any(error.check in _DAMAGE for error in structure.report.errors):
        raise _Unusable("weight files are missing or damaged")
    if manifest is None:
        raise _Unusable(f"no sound {MANIFEST} says how they were made")
    source = manifest.get("source")
    checkpoint = open_checkpoint(model)
    same = isinstance(source, dict) and source.get("fingerprint") == checkpoint.fingerprint
    packed = manifest.get("state") == "lossless"
    if packed and same:
        try:
            plan = plan_repacking(checkpoint, target)
            return Recomputation(plan, stored, same_version=_same_version(structure, plan))
        except InputError as error:
            what = f"says that MODEL was packed, which is not possible: {error.what}"
            structure.report.add([failed("manifest", what, MANIFEST, CONVERT)])
            raise _Unusable(f"MODEL cannot be packed as the manifest says: {error.what}") from None
    if not packed and not same:
        raise _Unusable("the manifest names another source than MODEL, by headers and config.json")
    conversion, calibrated = _conversion(
        structure, checkpoint, calibration, packed=packed, trust_remote_code=trust_remote_code
    )
    same_version = _same_version(structure, conversion)
    if packed:
        return Recomputation(conversion, stored, target, calibrated, same_version)
    planned = conversion.target.name
    if planned != target.name:
        raise _Unusable(f"the manifest's recipe is for {planned}, this is {target.name}")
    return Recomputation(conversion, stored, None, calibrated, same_version)


def _same_version(structure: Structure, plan: Work) -> bool:
    """Whether the versions that made a checkpoint are those that compute it again; a note if not."""
    tool = (structure.manifest or {}).get("tool")
    here = tool_of(plan.packages)
    if tool == here:
        return True
    what = f"{tool_text(tool)} made the checkpoint; {tool_text(here)} may round otherwise"
    structure.report.add([noted(CHECK, what)])
    return False


def _conversion(
    structure: Structure,
    checkpoint: Checkpoint,
    calibration: Path | None,
    *,
    packed: bool,
    trust_remote_code: bool,
) -> tuple[Plan, bool]:
    """The plan, and whether it has the results of calibration.

    packed: whether its result was packed into another format afterwards.
    """
    recipe = _recipe(structure, SOURCE_RECIPE if packed else RECIPE_FILE)
    try:
        checkpoint = in_basis(recipe, checkpoint, trust_remote_code=trust_remote_code)
        plan = make_plan(recipe, checkpoint)
    except InputError as error:
        raise _Unusable(f"MODEL does not fit the manifest's recipe: {error.what}") from None
    if calibration is not None:
        if not plan.needs_calibration:
            raise InputError(
                "nothing in the checkpoint's recipe needs a calibration",
                where=f"--calibration {calibration}",
                fix="leave --calibration out",
            )
        from quantcli.calibration.session import load_for

        plans = [
            make_plan(recipe, learned_basis(plan, found.folder), found)
            for found in load_for(plan, calibration)
        ]
        digest = (structure.manifest or {}).get("plan")  # tells which text it was
        return next((plan for plan in plans if plan.digest == digest), plans[0]), True
    if plan.recipe.file.learns_rotation:
        raise _Unusable(f"the rotation was learned: {GIVE_CALIBRATION}")
    if plan.measured and packed:
        raise _Unusable(f"packing changes how ranges of inputs are stored: {GIVE_CALIBRATION}")
    if plan.measured:
        assert structure.stored is not None
        plan = make_plan(recipe, checkpoint, _measured_by_type(plan, structure.stored))
    return plan, False


def _measured_by_type(plan: Plan, stored: StoredCheckpoint) -> Measured:
    """No numbers; the modules that were measured, as far as their types tell.

    The recipe may want a scheme without data for the others, as no token reached them.
    """
    labels = {name: module.layout.label for name, module in stored.modules.items()}
    stats: dict[str, dict[str, StoredTensor]] = {
        item.module: {}
        for item in quantized_items(plan)
        if labels.get(item.module) == plan.target.label(item.scheme.numerics)
    }
    return Measured(stats=stats)


def _recipe(structure: Structure, file: str) -> Recipe:
    """The manifest's recipe, read like any other from its file."""
    assert structure.manifest is not None
    assert structure.checkpoint is not None
    path = structure.checkpoint.path / file
    if not has_recipe(structure.manifest, path):
        raise _Unusable(f"the manifest's recipe is not that of {file}")
    try:
        return load_recipe(path)
    except InputError as error:
        raise _Unusable(f"the manifest's recipe cannot be read: {error.what}") from None
