"""What a budget gains over the same scheme for all modules, on text that was not measured on.

    python benchmarks/budget.py [--model DIR] [--data FILE] [--text FILE] [--target NAME] [--bits B]
        [--rounding gptq]

`quantcli quantize` spends B bits for each weight on --data and converts; each scheme alone is converted
likewise. All are judged on --text by the engine's arithmetic: the mean absolute change of the
log-probability of its tokens. The bar is on the budget's change over that of the best uniform recipe
that is not larger than the budget. Uniform recipes that are larger are shown, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import ROOT, Line, finish, parser, workplace
from gptq import windows
from quantcli.calibration.replay.served import Served, log_probs
from quantcli.calibration.resources import Resources
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.commands.budget.spending import spend

BAR = 0.85
ROLES = ["attention", "mlp", "expert", "shared_expert", "ssm"]
_GROUPS: list[Any] = [{"name": "w4a16", "group_size": size} for size in (128, 64, 32)]
SCHEMES: dict[str, list[Any]] = {
    "compressed-tensors": [
        *_GROUPS,
        {"name": "w4a16", "group_size": 32, "symmetric": False},
        {"name": "w8a16"},
    ],
    "gptq": [*_GROUPS, {"name": "w8a16"}],
    "ascend": [{"name": "w4a4_dynamic"}, {"name": "w8a8_dynamic"}, {"name": "w8a16"}],
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", type=Path, default=ROOT / "examples/tiny-qwen3")
    arguments.add_argument("--data", type=Path, default=ROOT / "examples/calibration.txt")
    arguments.add_argument("--text", type=Path, default=ROOT / "examples/evaluation.txt")
    arguments.add_argument("--samples", type=int, default=64, help="of --data, of --length tokens")
    arguments.add_argument("--windows", type=int, default=40, help="of --text, of --length tokens")
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--bits", type=float, default=5.0, help="for each weight")
    arguments.add_argument("--target", default="compressed-tensors", choices=list(SCHEMES))
    arguments.add_argument("--rounding", default="nearest", choices=["nearest", "gptq"])
    options = arguments.parse_args()
    torch.set_num_threads(1)
    schemes = [
        scheme | ({"weight_rounding": options.rounding} if options.rounding != "nearest" else {})
        for scheme in SCHEMES[options.target]
    ]
    calibration = {
        "data": str(options.data.resolve()),
        "samples": options.samples,
        "length": options.length,
        "dtype": "float32",
    }
    batches = windows(options.model, options.text, options.windows, options.length)
    exact = log_probs(open_checkpoint(options.model), batches)
    with workplace(options.dir) as folder:
        lines = list(compare(folder, options, schemes, calibration, batches, exact))
    finish(lines, as_json=options.json)


def compare(
    folder: Path,
    options: Any,
    schemes: list[Any],
    calibration: dict[str, Any],
    batches: list[Batch],
    exact: list[Tensor],
) -> Iterator[Line]:
    """Changes by the budget, and by each scheme for all modules."""
    recipe = {
        "target": options.target,
        "budget": {"bits_per_quantizable": options.bits, "schemes": schemes},
        "rules": [{"role": ROLES, "scheme": "budget"}],
        "calibration": calibration,
    }
    spent = spend(recipe, model=str(options.model), out=str(folder / "mixed"), resources=Resources())
    changes = {"mixed": change(str(spent.recipe), options.model, folder / "mixed", batches, exact)}
    report = spent.report
    bits = {"mixed": report["bits"]}
    all_bits = report["uniform_bits"]
    for place, name in enumerate(report["options"][:-1]):
        uniform = recipe | {"rules": [{"role": ROLES, "scheme": schemes[place]}]}
        del uniform["budget"]
        if options.rounding == "nearest":
            del uniform["calibration"]
        changes[name] = change(uniform, options.model, folder / str(place), batches, exact)
        bits[name] = all_bits[name]
    for figures in report["candidates"]:
        ratio = figures["kl"] / figures["predicted"]
        yield Line(f"KL on held-out text over its prediction: {figures['name']}", ratio, "x")
    rivals = [name for name in bits if name != "mixed" and bits[name] <= options.bits]
    best = min(rivals, key=lambda name: changes[name])
    for name, value in changes.items():
        yield Line(f"change of log-probability: {name}", value, "", None, f"{bits[name]:.3f} bits")
    what = f"budget of {options.bits:g} bits over {best}"
    yield Line(what, changes["mixed"] / changes[best], "x", BAR, f"{options.target}")


def change(recipe: Any, model: Path, out: Path, batches: list[Batch], exact: list[Tensor]) -> float:
    """The mean absolute change of log-probabilities by a recipe, which is carried out."""
    commands.quantize(commands.plan(recipe, model=str(model), out=out))
    found = log_probs(Served.open(out), batches)
    return float((torch.cat(found).double() - torch.cat(exact).double()).abs().mean())


if __name__ == "__main__":
    main()
