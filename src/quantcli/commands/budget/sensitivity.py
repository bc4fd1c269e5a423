"""`inspect --sensitivity`: the measurement of a budget alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.hub import display_name
from quantcli.commands.job import open_both, with_text
from quantcli.core.disk import check_file, write_file
from quantcli.core.errors import InputError
from quantcli.core.events import SILENT, Progress
from quantcli.recipe.written import BUDGET, GivenRecipe, name_of

if TYPE_CHECKING:
    from quantcli.calibration.resources import Resources
    from quantcli.calibration.sensitivity.arithmetic import Only

_USUAL = {
    "target": "compressed-tensors",
    "budget": {"bits_per_quantizable": 64.0},  # it is not spent
    "rules": [{"role": ["attention", "mlp", "expert", "shared_expert", "ssm"], "scheme": BUDGET}],
    "calibration": {"samples": 64, "length": 256},
}


@dataclass(frozen=True)
class SensitivityOptions:
    """What to measure.

    data:   a text; None: that of the recipe, or weights alone if it names none.
    recipe: with a budget, whose schemes and modules are measured; None: schemes with float inputs for
            the linears of layers, as compressed-tensors stores them.
    only:   what is quantized: "weights" or "inputs"; None: both.
    folder: where numbers are kept, so that an interrupted measurement continues; None: nowhere.
    page:   an HTML file for the same result with charts.
    """

    data: str | None = None
    recipe: GivenRecipe | None = None
    only: str | None = None
    folder: Path | None = None
    page: Path | None = None

    def __post_init__(self) -> None:
        if self.only not in {None, "weights", "inputs"}:
            fix = "give weights or inputs"
            raise InputError(f"unknown side `{self.only}`", where=f"--only {self.only}", fix=fix)


def sensitivity(
    model: str,
    options: SensitivityOptions,
    resources: Resources | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """How much each group of modules that must have one scheme costs under each scheme: JSON-able.

    on_text: whether errors are the KL that they make, in nats per token; else they are the squared
             error of weights over their sum of squares, summed over modules.
    schemes: {"name", "bits", "bytes", "error"} each, for all groups together; the last one is `keep`.
    units:   {"unit", "place", "modules", "weights", "errors", "bytes", "left_float", "unreached"} each:
             by scheme, and what remains of the model's error if this group alone stays float; the most
             sensitive first. unreached: whether nothing was measured, so that errors are 0.

    InputError for a model, a text or a recipe that cannot be used.
    """
    if options.page is not None:
        check_file("--report", options.page)
    recipe = _USUAL if options.recipe is None else options.recipe
    opened = open_both(recipe, model, with_text((), options.data), "inspect", progress)
    if opened.written.file.budget is None:
        raise InputError(
            "the recipe has no budget, which says what schemes to measure",
            where=name_of(recipe),
            fix="add `budget: {bits_per_quantizable: 5.0, schemes: [...]}`, or leave --recipe out",
        )
    progress.say(f"measuring the sensitivity of {model}")

    from quantcli.calibration.resources import Resources
    from quantcli.calibration.sensitivity.arithmetic import check_only
    from quantcli.calibration.sensitivity.measure import check_folder
    from quantcli.commands.budget import measuring
    from quantcli.commands.budget.options import options_of, schemes_of
    from quantcli.core.threads import default_workers
    from quantcli.planning.budget.units import units_of

    resources = resources or Resources(workers=default_workers())
    written = opened.written
    trust = resources.trust_remote_code
    variants = options_of(written, schemes_of(written), opened.checkpoint, trust_remote_code=trust)
    source = measuring.source_of(variants[0].plan)
    given = {"--only": options.only, "--folder": options.folder}
    if source is None and (unused := [f"{name} {value}" for name, value in given.items() if value]):
        raise InputError(
            "without a text weights alone are measured, in one go",
            where=unused[0],
            fix="leave it out, or add --data FILE",
        )
    only: Only = "weights" if options.only == "weights" else "inputs" if options.only else None
    check_only((item for variant in variants for item in variant.items.values()), only)
    if options.folder is not None:
        check_folder(options.folder, f"--folder {options.folder}")
    with TemporaryDirectory(prefix="quantcli-") as name:
        folder = Path(name) / "sensitivity" if options.folder is None else options.folder.resolve()
        text = None
        if source is not None:
            text = measuring.read_text(source, variants[0].plan, resources, progress)
            calibrations = folder.with_name(f"{folder.name}.calibration")
            variants = measuring.calibrated(variants, calibrations, resources, progress)
        errors = measuring.errors_of(variants, text, folder, resources, progress, only)
    units = units_of(variants)
    unreached = measuring.unmeasured(units, errors, progress)
    nothing = [0.0] * len(variants)
    rows = []
    for unit in units.units:
        own = [errors.get(module, nothing) for module in unit.modules]
        rows.append([math.fsum(column) for column in zip(*own, strict=True)])
    names = [variant.name for variant in variants]
    totals = [math.fsum(column) for column in zip(*rows, strict=True)]
    groups = [
        {
            "unit": unit.name,
            "place": place,
            "modules": list(unit.modules),
            "weights": unit.weights,
            "errors": dict(zip(names, row, strict=True)),
            "bytes": dict(zip(names, unit.nbytes, strict=True)),
            "left_float": {
                name: total - error for name, total, error in zip(names, totals, row, strict=True)
            },
            "unreached": unit.name in unreached,
        }
        for place, (unit, row) in enumerate(zip(units.units, rows, strict=True))
    ]
    order = sorted(range(len(rows)), key=lambda place: (-max(rows[place]), place))
    schemes = []
    for place, (name, total) in enumerate(zip(names, totals, strict=True)):
        choice = units.uniform(place)
        bits = None if choice is None else round(units.bits(choice), 6)
        nbytes = None if choice is None else units.nbytes(choice)
        schemes.append({"name": name, "bits": bits, "bytes": nbytes, "error": total})
    report = {
        "path": display_name(opened.checkpoint.path),
        "target": variants[0].plan.target.name,
        "on_text": source is not None,
        "only": options.only,
        "schemes": schemes,
        "units": [groups[place] for place in order],
    }
    if options.page is not None:
        from quantcli.verification.report.budget import sensitivity_page

        write_file(options.page.resolve(), sensitivity_page(report).encode())
    return report
