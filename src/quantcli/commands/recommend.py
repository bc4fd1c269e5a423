"""`recommend` as functions: shipped recipes for a model on devices, the best first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.filesize import decimal

from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.hub import find_headers
from quantcli.commands.choosing.devices import Device, known_devices, parse_device
from quantcli.commands.choosing.options import CONCURRENCY, CONTEXT, SHARE, Serving, parse_tokens
from quantcli.commands.results import Recommendation
from quantcli.core.errors import AnswerNo, InputError
from quantcli.core.events import SILENT, Progress
from quantcli.recipe.shipped import AUTO, USE, shipped_recipes

if TYPE_CHECKING:
    from quantcli.commands.choosing.ranking import Candidate, Places, Room
    from quantcli.recipe.written import GivenRecipe

_MORE = (2, 4, 8, 16, 32)  # devices that are tried if a model does not fit


def recommend(
    model: str | Checkpoint,
    device: str,
    *,
    context: str | int | None = None,
    concurrency: int | None = None,
    progress: Progress = SILENT,
) -> Recommendation:
    """Rank the shipped recipes for a model on a device, from headers and config.json alone.

    model:       its name, or the checkpoint itself. Of a model of the Hub that is not in its cache,
                 headers alone are fetched.
    device:      such as "2x910B", "H100", "8xH100:94GB", "2x48GB-ada", "cpu".
    context:     tokens of each sequence, such as 32768 or "32k"; by default 8192, or what the model was
                 made for if that is less.
    concurrency: sequences at a time; by default 8.

    InputError for an unknown device, and for a model that is not a language model.
    """
    serving = Serving(
        parse_device(device),
        parse_tokens(str(context)) if context is not None else None,
        CONCURRENCY if concurrency is None else concurrency,
    )
    if isinstance(model, Checkpoint):
        return _ranked(model.path.name, model, serving, progress)
    with find_headers(model, progress) as folder:
        return _ranked(model, open_checkpoint(folder, progress), serving, progress)


def devices() -> list[dict[str, Any]]:
    """The devices that are known by name: see `choosing.devices.known_devices`."""
    return known_devices()


class Chosen(NamedTuple):
    """A recipe to convert with, and what is set in it."""

    recipe: GivenRecipe
    overrides: tuple[str, ...]


def choose(
    recipe: GivenRecipe,
    model: str | Checkpoint | None,
    device: str | None,
    overrides: tuple[str, ...] = (),
    *,
    with_data: bool = False,
    progress: Progress = SILENT,
) -> Chosen:
    """The recipe that is meant: the one that was given, or the first for a device in place of `auto`.

    Recipes that need data count only if `overrides` name a text or there is other data. `progress`
    gets which recipe it is, and why. AnswerNo if nothing fits, InputError for `auto` without a device
    or a model, and for a device without `auto`.
    """
    if recipe != AUTO:
        if device is not None:
            what = "--for has an effect only with `auto` in place of a recipe"
            raise InputError(
                what, where=f"--for {device}", fix="quantcli quantize auto ..., or leave it out"
            )
        return Chosen(recipe, overrides)
    if device is None or model is None:
        missing = "--for DEVICE" if device is None else "--model MODEL"
        raise InputError(f"`{AUTO}` needs {missing}", fix=f"quantcli quantize {AUTO} {USE}")
    with_data |= any(override.startswith("calibration.data=") for override in overrides)
    found = recommend(model, device, progress=progress)
    fitting = [row for row in found.recipes if row["fits"]]
    if not fitting:
        raise no_fit(found)
    chosen = next((row for row in fitting if with_data or not row["needs_data"]), None)
    if chosen is None:
        what = f"every recipe that fits {found.device['name']} needs a calibration text"
        fix = f"add --data FILE; `{fitting[0]['recipe']}` comes first"
        raise InputError(what, where=f"--for {device}", fix=fix)
    progress.say(f"{AUTO}: `{chosen['recipe']}` for {found.device['name']}: {chosen['reason']}")
    if fitting[0] is not chosen:
        first = fitting[0]["recipe"]
        progress.say(f"{AUTO}: `{first}` comes first, but needs a text: --data FILE")
    return Chosen(chosen["recipe"], (*chosen["overrides"], *overrides))


def no_fit(found: Recommendation) -> AnswerNo:
    """The error for a model that fits with no recipe, with the nearest that would."""
    what = f"no recipe fits {found.device['count']} x {found.device['name']}"
    what += f" with {found.context:,} tokens in each of {found.concurrency} sequences"
    if not found.recipes:
        what = f"no shipped recipe is for this model on {found.device['name']}"
    return AnswerNo(what, where=found.model, fix=found.advice)


def _must_be_language_model(checkpoint: Checkpoint) -> None:
    layers = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")
    if not any(key in checkpoint.text_config for key in layers):
        raise InputError(
            "config.json names no number of layers: this is not a language model that is known here",
            where=str(checkpoint.path),
            fix="`quantcli recipes` lists the recipes; `quantcli quantize RECIPE --plan` tries one",
        )


def _ranked(model: str, checkpoint: Checkpoint, serving: Serving, progress: Progress) -> Recommendation:
    from quantcli.checkpoint.encoded import decoded_kinds
    from quantcli.commands.choosing.caches import cache_sizes
    from quantcli.commands.choosing.ranking import Places, costs, positions, row
    from quantcli.commands.choosing.weights import Model
    from quantcli.sources.decode import decoded

    _must_be_language_model(checkpoint)
    progress.say(f"planning {len(shipped_recipes())} recipes for {model} on {serving.device}")
    whole = decoded(checkpoint)
    split = Model.of(whole)
    sizes = cache_sizes(whole, split.roles)
    most = positions(whole.text_config)
    context = serving.context or min(CONTEXT, most or CONTEXT)
    places = Places(split, sizes, serving, context)
    candidates, left_out = _candidates(places, progress)
    notes = [*serving.device.notes, *sizes.notes]
    if kinds := decoded_kinds(whole.tensors.values()):
        formats = " and ".join(sorted({kind["format"] for kind in kinds}))
        notes.append(
            f"the model is quantized already ({formats}): recipes start from its decoded values, "
            "and its error stays in them; start from the float model if there is one"
        )
    if most is not None and context > most:
        notes.append(
            f"the model was made for {most:,} tokens: engines refuse {context:,} without changes"
        )
    unquantized, why = places.unquantized()
    if unquantized.devices < serving.device.count:
        notes.append(f"{why}: counted on {unquantized.devices} of {serving.device.count} devices")
    fitting = [each for each in candidates if each.room.fits]
    free = [each for each in fitting if not each.needs_data]
    rows = [row(each, model, place) for place, each in enumerate(candidates, 1)]
    table = costs()
    return Recommendation(
        model=model,
        device=_described(serving.device),
        context=context,
        concurrency=serving.concurrency,
        positions=most,
        unquantized=_of_room(unquantized),
        recipes=rows,
        left_out=left_out,
        best=fitting[0].recipe if fitting else None,
        best_without_data=free[0].recipe if free else None,
        advice=None if fitting else _advice(candidates, places, serving),
        notes=notes,
        costs={"model": table["model"], "text": table["text"]},
    )


def _candidates(places: Places, progress: Progress) -> tuple[list[Candidate], list[dict[str, str]]]:
    """The recipes that the devices can serve, in order, and why not the others."""
    found, left_out = [], []
    for name in shipped_recipes():
        try:
            found.append(places.candidate(name))
        except InputError as error:
            progress.detail(f"{name}: {error.what}")
            left_out.append({"recipe": name, "why": error.what})
    return sorted(found, key=lambda candidate: candidate.order), left_out


def _described(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "count": device.count,
        "kind": device.kind,
        "memory_bytes": device.nbytes,
        "engine": device.engine,
        "notes": list(device.notes),
        "source": device.source,
    }


def _of_room(room: Room) -> dict[str, Any]:
    return {
        "fits": room.fits,
        "devices": room.devices,
        "weights_bytes": room.weights,
        "cache_bytes": room.cache,
        "reserve_bytes": room.reserve,
        "usable_bytes": room.usable,
        "max_context": room.max_context,
    }


def _advice(candidates: list[Candidate], places: Places, serving: Serving) -> str:
    """What would fit: less context, more devices, or devices with more memory."""
    if not candidates:
        return "`quantcli inspect --support --for DEVICE` shows what the device can serve"
    longest = max(candidates, key=lambda each: each.room.max_context)
    smallest = candidates[0]
    ways = []
    if longest.room.max_context:
        ways.append(f"`{longest.recipe}` fits with --context {longest.room.max_context}")
    more = (n for n in _MORE if n > serving.device.count and places.fits_on(smallest, n))
    if number := next(more, None):
        ways.append(f"`{smallest.recipe}` fits on {number} x {serving.device.name}")
    if not ways:
        needed = decimal(math.ceil(smallest.room.needed / SHARE))
        ways.append(f"`{smallest.recipe}`, the smallest, needs {needed} of memory in each device")
    return "; ".join(ways)
