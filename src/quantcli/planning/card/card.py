"""README.md of an output: what it is, how it was made and is served, and the card of its source."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from rich.filesize import decimal

from quantcli import __version__
from quantcli.checkpoint.files import CARD
from quantcli.checkpoint.hub import HUB_ID
from quantcli.planning.card.figures import section
from quantcli.planning.card.front import base_of, front_matter
from quantcli.planning.card.making import Making
from quantcli.planning.card.markdown import code, fenced, plain, quote
from quantcli.planning.card.source import SOURCE_CARD, SourceCard, not_kept, read_source_card
from quantcli.planning.plan import Work

W = TypeVar("W", bound=Work)
SERVED_AS = "CHECKPOINT"  # stands for the folder, or its Hub id
_NOT_MEASURED = (
    "Before this checkpoint was published, its structure was checked as the engine would load it. "
    "No figures have been measured yet: `quantcli verify CHECKPOINT --full --against MODEL --card` "
    "measures them and writes them here."
)


def with_card(work: W, making: Making, base_model: str | None = None) -> W:
    """The same work with its card among the generated files, and notes on the source's card.

    base_model: the source's Hub id, if the recipe names it.
    """
    source = read_source_card(work.checkpoint)
    content = _card(work, making, source, base_model)
    notes = source.notes
    if keys := not_kept(source.front):
        names = ", ".join(f"`{key}`" for key in keys)
        notes += (f"the new card leaves out {names} of the model's {CARD}: not text",)
    return replace(
        work, sidecars={**work.sidecars, CARD: content.encode()}, notes=(*work.notes, *notes)
    )


def _card(work: Work, making: Making, source: SourceCard, base_model: str | None) -> str:
    given = HUB_ID.fullmatch(work.checkpoint.hub_id or "")
    named = base_model or (given and given["repository"]) or None
    base = base_of(named, source)
    revision = given["revision"] if given and named == given["repository"] else None
    title = f"{base.rpartition('/')[2]}, quantized" if base else "A quantized model"
    link = f"[{plain(base)}](https://huggingface.co/{base})" if base else "A model"
    at = f" at revision {code(revision)}" if revision else ""
    labels = ", ".join(code(label) for label in sorted(work.served.labels)) or "no quantized weights"
    parts = [
        front_matter(base, source, work.target, work.checkpoint.config),
        f"# {plain(title)}",
        f"{link}{at} with quantized weights, in the format {code(work.target.name)}: {labels}. "
        f"Written by quantcli {__version__}.",
        "## What is quantized",
        making.modules,
        _sizes(work),
        "## How it was made",
        making.steps,
    ]
    if work.recipe_text is not None:
        parts += [
            f"The recipe, which is also in {code(making.recipe)}:",
            fenced(work.recipe_text, "yaml"),
        ]
    parts += ["## Verification", section(_NOT_MEASURED), "## How to serve it", _serving(work)]
    if source.text is not None:
        parts += ["## The source's card", SOURCE_CARD, quote(source.text)]
    return "\n\n".join(parts) + "\n"


def _sizes(work: Work) -> str:
    before, after = decimal(work.checkpoint.nbytes), decimal(work.weight_nbytes)
    bits = 8 * work.weight_nbytes / work.params if work.params else 0.0
    return (
        f"Weights: {before} before, {after} after; {bits:.2f} bits per parameter. "
        f"{work.quantized_params_pct:.1f} % of {work.params:,} parameters are quantized. "
        f"Weights that stay float are served in "
        f"{'bfloat16' if work.serving_dtype == 'BF16' else 'float16'}."
    )


def _serving(work: Work) -> str:
    commands = work.target.serve(work.served, SERVED_AS)
    if not commands:
        return f"No engine is known for the format {code(work.target.name)}."
    blocks = [f"{code(SERVED_AS)} is this folder, or its id on the Hub."]
    for command in commands:
        note = f" ({command.note})" if command.note else ""
        blocks += [f"{command.engine}{note}:", fenced(command.text, "sh")]
    return "\n\n".join(blocks)
