"""The measurement of a budget: its text, its calibrations, the error of each unit under each option."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.calibration.memory import BATCH_TOKENS
from quantcli.calibration.sensitivity.measure import Measuring, estimate, measure
from quantcli.calibration.sensitivity.passes import Errors
from quantcli.calibration.sets.joint import joint_sessions
from quantcli.calibration.text.dataset import (
    Batch,
    TextSource,
    check_length,
    check_source,
    load_dataset,
    model_limits,
    source_digest,
)
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.text import count
from quantcli.planning.budget.units import Option, Units
from quantcli.planning.plan import Plan

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.calibration.sensitivity.arithmetic import Only

_HELD_OUT = 4  # one batch in so many is not measured on


@dataclass(frozen=True)
class Text:
    """The samples of a budget. held_out: those on which the choice is confirmed.

    digest: of all that decides them.
    """

    measured: Sequence[Batch]
    held_out: Sequence[Batch]
    digest: str


def source_of(plan: Plan) -> TextSource | None:
    """The text that the recipe names; None if it names none. InputError for one that does not exist."""
    block = plan.recipe.file.calibration
    if block is None or block.data is None:
        return None
    source = TextSource(
        data=plan.recipe.data_path(),
        where=plan.recipe.where("calibration", "data"),
        samples=block.samples,
        length=block.length,
        seed=block.seed,
        pack=block.pack,
        batch_tokens=BATCH_TOKENS if block.pack else 1,
    )
    check_source(source, plan.checkpoint.path)
    check_length(source, model_limits(plan.checkpoint.text_config)[0])
    return source


def read_text(source: TextSource, plan: Plan, resources: Resources, progress: Progress) -> Text:
    """The samples, the last quarter of them held out. InputError for fewer than two batches."""
    positions, vocabulary = model_limits(plan.checkpoint.text_config)
    progress.phase(f"reading text: {source.samples} samples of {source.length} tokens of {source.data}")
    dataset = load_dataset(
        source,
        plan.checkpoint.path,
        positions=positions,
        vocab_size=vocabulary,
        trust_remote_code=resources.trust_remote_code,
        say=progress.say,
    )
    batches = dataset.batches
    if len(batches) < 2:
        raise InputError(
            f"{count(dataset.samples, 'sample')} of {source.length} tokens are too few to measure on "
            "some, and to confirm the choice on others",
            where=source.where,
            fix=f"set calibration.samples to {2 * max(1, BATCH_TOKENS // source.length)} or more",
        )
    last = max(1, len(batches) // _HELD_OUT)
    return Text(batches[:-last], batches[-last:], source_digest(source, plan.checkpoint.path))


def calibrated(
    options: Sequence[Option], folder: Path, resources: Resources, progress: Progress
) -> list[Option]:
    """The options with the statistics that their schemes need, measured in one replay; those that are
    in the folder already are used. InputError for a text that cannot be used."""
    needing = [option.plan for option in options if option.plan.needs_calibration]
    if not needing:
        return list(options)
    from quantcli.calibration.session import load
    from quantcli.planning.planner import make_plan

    joint = joint_sessions(needing, folder)
    joint.run(resources, progress)
    return [
        replace(option, plan=make_plan(option.plan.recipe, option.plan.checkpoint, load(session)))
        if (session := joint.of(option.plan)) is not None
        else option
        for option in options
    ]


def unmeasured(units: Units, errors: Errors, progress: Progress) -> tuple[str, ...]:
    """The names of units that were not measured. Reports them."""
    names = tuple(
        unit.name for unit in units.units if not any(module in errors for module in unit.modules)
    )
    if names:
        progress.say(
            f"{len(names)} of {len(units.units)} groups of modules were not measured, such as "
            f"`{names[0]}`: no token reached them, or they are in no layer"
        )
    return names


def errors_of(
    options: Sequence[Option],
    text: Text | None,
    folder: Path,
    resources: Resources,
    progress: Progress,
    only: Only = None,
) -> Errors:
    """The error of each module under each option: KL in nats per token; without a text the squared
    error of weights over their sum of squares."""
    if text is None:
        progress.say("no text: errors are those of weights alone, and nothing is known of inputs")
        return estimate(options, progress)
    key = hashlib.sha256(
        json.dumps([text.digest, only, *(option.plan.digest for option in options)]).encode()
    ).hexdigest()
    how = Measuring(key, folder, resources.workers, only, resources.trust_remote_code)
    progress.say(
        f"measuring {count(options[0].items, 'module')} under {count(len(options) - 1, 'scheme')}, "
        f"kept in {folder}"
    )
    return measure(options, text.measured, how, progress)
