"""A recipe with a budget becomes an ordinary one: measured, allocated, confirmed, written."""

from __future__ import annotations

import glob
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from quantcli.commands.job import (
    USUAL,
    JobOptions,
    accepted_place,
    calibration_folder,
    default_name,
    needless,
    open_both,
)
from quantcli.core.disk import write_file
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress
from quantcli.core.text import size
from quantcli.recipe.written import BUDGET, GivenRecipe, WrittenRecipe, name_of, read_recipe

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.calibration.sensitivity.passes import Errors, FloatModel
    from quantcli.calibration.text.examples import Examples
    from quantcli.checkpoint.checkpoint import Checkpoint
    from quantcli.commands.budget.measuring import Text
    from quantcli.planning.budget.units import Units

_TRIES = 6  # of a limit of perplexity
_POINTS = 24  # of the curve of error against bytes


@dataclass(frozen=True)
class Spent:
    """A budget that was spent.

    recipe: the file of the ordinary recipe. model: as it was given, or as the recipe with the budget
    names it. out: where the checkpoint goes. calibrates: whether the recipe needs data. report:
    JSON-able data.
    """

    recipe: Path
    model: str
    out: str
    calibrates: bool
    report: dict[str, Any]


class Request(NamedTuple):
    """A recipe, what it is applied to, the place of the result, and how it is to be run."""

    recipe: GivenRecipe
    overrides: tuple[str, ...]
    model: str | Checkpoint | None
    out: str | Path | None
    options: JobOptions


def without_budget(
    request: Request,
    *,
    resources: Resources,
    progress: Progress,
    examples: Examples | None = None,
) -> Request:
    """The request as it was given, if its recipe has no budget; else with the one that `spend` writes.

    examples: data in place of a text. InputError as `spend` raises it, and for a model in memory or
    such data, which the recipe that is written could not name.
    """
    recipe, overrides, model, out, options = request
    if read_recipe(recipe, overrides).file.budget is None:
        return request
    if examples is not None or not isinstance(model, str | None):
        what = "a budget is spent on a model and a text that are files"
        raise InputError(what, where=name_of(recipe), fix="save the model; name the text as `data`")
    spent = spend(
        recipe,
        model=model,
        out=None if out is None else str(out),
        overrides=overrides,
        options=options,
        resources=resources,
        progress=progress,
    )
    if not spent.calibrates:
        options = replace(options, calibration=None)
    return Request(spent.recipe, (), spent.model, spent.out, options)


def spend(
    recipe: GivenRecipe,
    *,
    model: str | Checkpoint | None = None,
    out: str | None = None,
    overrides: tuple[str, ...] = (),
    options: JobOptions = USUAL,
    resources: Resources | None = None,
    progress: Progress = SILENT,
) -> Spent:
    """Choose schemes within a recipe's budget, and write the recipe that names them to OUT.recipe.yaml,
    with a page that shows the choice.

    out: the place of the checkpoint. options: of the conversion that follows.
    The same input gives the same recipe. InputError for a budget that cannot be met, with the least
    that can, and for a place that the conversion would refuse.
    """
    opened = open_both(recipe, model, overrides, "quantize", progress)
    written = opened.written
    named = out or written.file.output or default_name(opened.model, recipe)
    progress.say(f"spending the budget of {name_of(recipe)} for {opened.model}")

    from quantcli.calibration.resources import Resources
    from quantcli.calibration.sensitivity.measure import check_folder
    from quantcli.commands.budget.measuring import calibrated, errors_of, read_text, source_of
    from quantcli.commands.budget.options import options_of, schemes_of
    from quantcli.convert.destination import destination_of
    from quantcli.planning.budget.units import units_of
    from quantcli.verification.report.budget import budget_page

    resources = resources or Resources()
    place = destination_of(named, progress)
    accepted_place(place, options, opened.checkpoint.path)
    trust = resources.trust_remote_code
    variants = options_of(written, schemes_of(written), opened.checkpoint, trust_remote_code=trust)
    if options.calibration is not None and not any(v.plan.needs_calibration for v in variants):
        raise needless("--calibration", options.calibration)
    _check_possible(written, units_of(variants))
    source = source_of(variants[0].plan)
    if source is None and written.file.budget and written.file.budget.max_ppl_ratio is not None:
        raise InputError(
            "a limit of perplexity needs a text, and the recipe names none",
            where=written.document.where((BUDGET, "max_ppl_ratio")),
            fix="give the recipe `calibration: {data: FILE}`, or --data FILE",
        )
    measured = place.sibling(".sensitivity")
    if source is not None:
        check_folder(measured, str(measured))
    text = None if source is None else read_text(source, variants[0].plan, resources, progress)
    folder = options.calibration or calibration_folder(place)
    variants = calibrated(variants, folder, resources, progress)
    errors = errors_of(variants, text, measured, resources, progress)
    units = units_of(variants)
    spending = _Spending(written, units, errors, text, resources, progress)
    report = spending.choose()
    file, page = place.sibling(".recipe.yaml"), place.sibling(".budget.html")
    content = _document(written, units, report["choice"], file, name_of(recipe))
    write_file(file, content.encode())
    write_file(page, budget_page(report, opened.model).encode())
    for line in _lines(units, report):
        progress.say(line)
    progress.say(f"the recipe of this choice is {file}; {page} shows it")
    return Spent(file, opened.model, named, _calibrates(written, units, report["choice"]), report)


def _calibrates(written: WrittenRecipe, units: Units, choice: Sequence[int]) -> bool:
    """Whether the recipe of a choice needs data."""
    needs_data = any(units.options[option].plan.needs_calibration for option in choice)
    return needs_data or bool(written.file.kv_cache or written.file.methods)


def _limit(written: WrittenRecipe, units: Units) -> float | None:
    """The most bytes that units may take together; None for a limit of perplexity."""
    budget = written.file.budget
    assert budget is not None
    if budget.bits_per_quantizable is not None:
        return budget.bits_per_quantizable * units.weights / 8
    if budget.output_gib is not None:
        return budget.output_gib * 2**30 - units.fixed_nbytes
    return None


def _sizes(written: WrittenRecipe, units: Units) -> list[tuple[int | None, ...]]:
    """What a limit counts of each unit and option: for `output_gib` bytes on disk, else packed."""
    budget = written.file.budget
    assert budget is not None
    on_disk = budget.output_gib is not None
    return [unit.nbytes if on_disk else unit.packed for unit in units.units]


def _check_possible(written: WrittenRecipe, units: Units) -> None:
    """InputError for a budget of bytes that not even the smallest schemes keep."""
    limit = _limit(written, units)
    sizes = _sizes(written, units)
    least = sum(min(nbytes for nbytes in own if nbytes is not None) for own in sizes)
    if limit is None or least <= limit:
        return
    budget = written.file.budget
    assert budget is not None
    if budget.bits_per_quantizable is not None:
        key, bits = "bits_per_quantizable", 8 * least / units.weights
        what = f"{bits:.4f} bits for each weight"
        fix = f"set budget.{key} to {math.ceil(bits * 1e4) / 1e4:g} or more"
    else:
        key, gib = "output_gib", (least + units.fixed_nbytes) / 2**30
        what = f"{gib:.6f} GiB, {size(units.fixed_nbytes)} of which the budget does not choose"
        fix = f"set budget.{key} to {math.ceil(gib * 1e6) / 1e6:g} or more"
    raise InputError(
        f"the budget cannot be met: its smallest schemes take {what}",
        where=written.document.where((BUDGET, key)),
        fix=f"{fix}, or add smaller schemes",
    )


class _Spending:
    """The choice of a budget, and how it is confirmed."""

    def __init__(
        self,
        written: WrittenRecipe,
        units: Units,
        errors: Errors,
        text: Text | None,
        resources: Resources,
        progress: Progress,
    ) -> None:
        from quantcli.commands.budget.measuring import unmeasured

        self._written, self._units, self._text = written, units, text
        self._resources, self._progress = resources, progress
        kept = len(units.options) - 1
        nothing = [0.0] * len(units.options)
        self._errors = [
            [math.fsum(errors.get(m, nothing)[o] for m in unit.modules) for o in range(kept + 1)]
            for unit in units.units
        ]
        unseen = unmeasured(units, errors, progress)
        # the most bytes that they may take: nothing says how much less would cost
        self._sizes = _sizes(written, units)
        self._allowed = [
            tuple(n if o in {kept, _largest(own)} else None for o, n in enumerate(own))
            if unit.name in unseen
            else own
            for unit, own in zip(units.units, self._sizes, strict=True)
        ]
        if unseen:
            progress.say("they take the largest scheme, or stay float")
        self._unseen = unseen

    def choose(self) -> dict[str, Any]:
        """The report of the choice: confirmed on text that was not measured on, if there is text."""
        limit = _limit(self._written, self._units)
        budget = self._written.file.budget
        assert budget is not None
        if limit is None:
            assert budget.max_ppl_ratio is not None
            return self._by_perplexity(budget.max_ppl_ratio)
        choice = self._allocated(self._allowed, limit)
        rivals = [rival for rival in self._rivals(limit) if rival != choice]
        return self._report(*self._confirmed([choice, *rivals]))

    def _allocated(self, nbytes: Sequence[Sequence[int | None]], limit: float) -> list[int]:
        from quantcli.planning.budget.allocation import allocate

        choice = allocate(self._errors, nbytes, limit)
        if choice is None:  # what no token reached may not be small
            choice = allocate(self._errors, self._sizes, limit)
        assert choice is not None
        return choice

    def _rivals(self, limit: float) -> list[list[int]]:
        """Each option for all units, if it keeps the limit; the best may be the answer."""
        uniform = filter(None, map(self._units.uniform, range(len(self._units.options))))
        return [choice for choice in uniform if self._size(choice) <= limit]

    def _size(self, choice: Sequence[int]) -> int:
        """What a limit counts of a choice."""
        sizes = (own[option] or 0 for own, option in zip(self._sizes, choice, strict=True))
        return sum(sizes)

    def _predicted(self, choice: Sequence[int]) -> float:
        return math.fsum(self._errors[unit][option] for unit, option in enumerate(choice))

    def _by_perplexity(self, most: float) -> dict[str, Any]:
        """The fewest bytes with which the perplexity of held-out text stays within a ratio."""
        from quantcli.planning.budget.allocation import allocate

        allowed = math.log(most)
        for _ in range(_TRIES):
            choice = allocate(self._allowed, self._errors, allowed)
            assert choice is not None  # floats have no error
            chosen, figures = self._confirmed([choice])
            ratio = figures[0]["ppl_ratio"]
            if ratio <= most:
                return self._report(chosen, figures)
            excess = math.log(ratio) / math.log(most)
            self._progress.say(
                f"perplexity {ratio:.5f} x of held-out text, above {most:g}: choosing more precisely"
            )
            allowed /= 1.1 * excess
        raise InputError(
            f"no choice of {_TRIES} keeps the perplexity of held-out text within {most:g}",
            where=self._written.document.where((BUDGET, "max_ppl_ratio")),
            fix="allow more, or add schemes with more bits",
        )

    def _confirmed(self, candidates: Sequence[list[int]]) -> tuple[list[int], list[dict[str, Any]]]:
        """The best of some choices, and figures of all: the first is the solver's. On text the KL
        decides; without one, the estimate."""
        figures = [self._figures(choice) for choice in candidates]
        if self._text is not None:
            measured = self._run(self._text, candidates)
            figures = [{**own, **more} for own, more in zip(figures, measured, strict=True)]
        key = "predicted" if self._text is None else "kl"
        best = min(range(len(candidates)), key=lambda place: (figures[place][key], place))
        if best:
            by = "by weights alone" if self._text is None else "on held-out text"
            self._progress.say(
                f"the same scheme for all, {figures[best]['name']}, is better {by} than the mixture: "
                "it is chosen"
            )
        return candidates[best], figures

    def _figures(self, choice: Sequence[int]) -> dict[str, Any]:
        options = {self._units.options[option].name for option in choice}
        return {
            "name": options.pop() if len(options) == 1 else "mixed",
            "bytes": self._units.nbytes(choice),
            "bits": round(self._units.bits(choice), 6),
            "predicted": self._predicted(choice),
        }

    def _run(self, text: Text, candidates: Sequence[Sequence[int]]) -> list[dict[str, float]]:
        """KL and perplexity of each candidate on held-out text."""
        from quantcli.calibration.sensitivity.arithmetic import quantizer_of
        from quantcli.calibration.sensitivity.passes import FloatModel
        from quantcli.verification.on_text.figures import Predictions

        plan = self._units.options[0].plan
        found = []
        with TemporaryDirectory(prefix="quantcli-") as name:
            folder = Path(name)
            model: FloatModel = FloatModel(
                plan.checkpoint,
                text.held_out,
                folder,
                workers=self._resources.workers,
                progress=self._progress,
                trust_remote_code=self._resources.trust_remote_code,
            )
            self._progress.phase("confirming the choice on held-out text")
            model.forward()
            for number, choice in enumerate(candidates):
                own = folder / str(number)
                own.mkdir()
                quantizer = quantizer_of(self._units.items(choice), plan.target)
                states = model.quantized(quantizer, own)
                sums = Predictions()
                pairs = zip(model.logits(states), text.held_out, strict=True)
                for (expected, actual), batch in pairs:
                    sums.add(expected, actual, batch)
                figures = sums.windows.figures()
                assert figures.kl is not None
                assert figures.ppl is not None
                found.append({"kl": figures.kl.mean, "ppl_ratio": figures.ppl.ratio})
                shutil.rmtree(own)
        return found

    def _report(self, choice: list[int], figures: list[dict[str, Any]]) -> dict[str, Any]:
        units, options = self._units, self._units.options
        return {
            "choice": choice,
            "options": [option.name for option in options],
            "uniform_bits": {
                option.name: round(units.bits(same), 6)
                for place, option in enumerate(options)
                if (same := units.uniform(place)) is not None
            },
            "on_text": self._text is not None,
            "bits": round(units.bits(choice), 6),
            "bytes": units.nbytes(choice),
            "output_bytes": units.nbytes(choice) + units.fixed_nbytes,
            "predicted": self._predicted(choice),
            "candidates": figures,
            "units": [
                {
                    "unit": unit.name,
                    "modules": list(unit.modules),
                    "weights": unit.weights,
                    "scheme": options[option].name,
                    "bytes": unit.nbytes[option],
                    "errors": dict(zip((o.name for o in options), errors, strict=True)),
                    "unreached": unit.name in self._unseen,
                }
                for unit, option, errors in zip(units.units, choice, self._errors, strict=True)
            ],
            "curve": self._curve(),
        }

    def _curve(self) -> list[dict[str, float]]:
        """Bits and predicted errors of the best choices, from the smallest to float."""
        ends = [[n for n in own if n is not None] for own in self._sizes]
        least, most = sum(map(min, ends)), sum(map(max, ends))
        points = []
        for step in range(_POINTS):
            # closer together where bytes are few: that is where errors are
            limit = least + (most - least) * (step / (_POINTS - 1)) ** 2
            choice = self._allocated(self._sizes, limit)
            bits, error = self._units.bits(choice), self._predicted(choice)
            points.append({"bits": round(bits, 6), "predicted": error})
        return points


def _largest(nbytes: Sequence[int | None]) -> int:
    """The option with the most bytes that is not float."""
    taken = [option for option, n in enumerate(nbytes[:-1]) if n is not None]
    return max(taken, key=lambda option: nbytes[option] or 0, default=len(nbytes) - 1)


def _document(
    written: WrittenRecipe, units: Units, choice: Sequence[int], file: Path, name: str
) -> str:
    """The recipe with rules that name the modules of each scheme."""
    from quantcli.commands.budget.options import as_written
    from quantcli.core.untrusted.yaml_text import write_yaml
    from quantcli.targets.vllm_family import EXPERT

    modules: dict[int, list[str]] = {}
    for unit, option in zip(units.units, choice, strict=True):
        expert = EXPERT.fullmatch(unit.modules[0])
        patterns = [f"{glob.escape(expert['experts'])}.*"] if expert else map(glob.escape, unit.modules)
        modules.setdefault(option, []).extend(patterns)
    chosen = [
        {"match": modules[option], "scheme": as_written(units.options[option].scheme)}
        for option in sorted(modules)
    ]
    table = written.file.model_dump(mode="json", exclude_none=True, exclude={"model", "output", BUDGET})
    rules: list[Any] = []
    for rule in table["rules"]:
        if rule["scheme"] != BUDGET:
            rules.append({key: value for key, value in rule.items() if value is not False})
        elif chosen:
            rules += chosen
            chosen = []
    table["rules"] = rules
    if not _calibrates(written, units, choice):
        table.pop("calibration", None)
    elif "data" in (block := table.get("calibration", {})) and not block["data"].startswith(
        "datasets:"
    ):
        plan = units.options[0].plan
        text = os.path.abspath(plan.recipe.data_path())  # noqa: PTH100 - keeps links
        block["data"] = os.path.relpath(text, os.path.abspath(file.parent))  # noqa: PTH100
    if not table["expect"]:
        del table["expect"]
    head = (
        f"# Schemes chosen within the budget of {Path(name).name}: {units.bits(choice):.4f} bits for "
    )
    return f"{head}each weight of its modules.\n{write_yaml(table)}"


def _lines(units: Units, report: dict[str, Any]) -> list[str]:
    """What was chosen, and how good it is."""
    counts: dict[str, int] = {}
    for unit in report["units"]:
        counts[unit["scheme"]] = counts.get(unit["scheme"], 0) + unit["weights"]
    shares = ", ".join(f"{100 * n / units.weights:.0f} % {name}" for name, n in counts.items())
    lines = [f"budget: {report['bits']:.4f} bits for each of {units.weights:,} weights: {shares}"]
    for figures in report["candidates"]:
        quality = f"predicted error {figures['predicted']:.3g}"
        if "kl" in figures:
            quality = (
                f"KL {figures['kl']:.5f}, perplexity {figures['ppl_ratio']:.4f} x on held-out text"
            )
        lines.append(f"  {figures['name']}: {figures['bits']:.4f} bits, {quality}")
    return lines
