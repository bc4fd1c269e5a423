"""What each shipped recipe costs the bundled model: the figures that `quantcli recommend` shows.

Each recipe converts examples/tiny-qwen3, calibrating on examples/calibration.txt if it needs data, and
`quantcli verify --run` compares the result with the float model on windows of 256 tokens of
examples/evaluation.txt. The figure is the mean over tokens of the absolute change of a token's
log-probability. Recipes for mixtures of experts refuse this model, which is dense: they have no figure.
--write writes the figures into the package.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from common import QUANTCLI, ROOT, conversion, parser, workplace
from quantcli.core.untrusted.yaml_text import read_yaml, write_yaml
from quantcli.recipe.shipped import shipped_recipes

MODEL = ROOT / "examples" / "tiny-qwen3"
TEXT = ROOT / "examples" / "evaluation.txt"
COSTS = ROOT / "src" / "quantcli" / "commands" / "choosing" / "costs.yaml"
LENGTH = 256
HEAD = """\
# The cost of each recipe for the bundled model, from benchmarks/recipe_costs.py; do not edit.
# mean_change: mean over tokens of the absolute change of a token's log-probability, in nats.
"""


def cost(recipe: str, folder: Path, samples: int) -> float | None:
    """The mean change of the model by a recipe; None if the recipe refuses a dense model."""
    out = folder / recipe
    made = subprocess.run([*QUANTCLI, *conversion(recipe, MODEL, out)], capture_output=True, text=True)
    if made.returncode == 2 and "matches no module" in made.stderr:
        return None
    made.check_returncode()
    words = ["verify", out, "--against", MODEL, "--run", "--data", TEXT, "--samples", samples]
    words += ["--length", LENGTH, "--json"]
    checked = subprocess.run([*QUANTCLI, *map(str, words)], capture_output=True, text=True)
    return float(json.loads(checked.stdout)["run"]["mean_abs_logprob_change"])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--samples", type=int, default=32, help="windows of text")
    arguments.add_argument("--only", nargs="+", metavar="RECIPE")
    arguments.add_argument("--write", action="store_true", help="write costs.yaml of the package")
    options = arguments.parse_args()
    changes: dict[str, float | None] = {}
    if options.only and COSTS.exists():  # figures of the others stay
        changes = read_yaml(COSTS.read_bytes(), str(COSTS)).data["mean_change"]
    with workplace(options.dir) as folder:
        for recipe in options.only or shipped_recipes():
            change = cost(recipe, folder, options.samples)
            changes[recipe] = None if change is None else float(f"{change:.4g}")
            if not options.json:
                print(f"{recipe:30}{changes[recipe]}", flush=True)
    table: dict[str, object] = {
        "model": MODEL.name,
        "text": f"{options.samples} windows of {LENGTH} tokens of {TEXT.name}",
        "mean_change": dict(sorted(changes.items())),
    }
    if options.json:
        print(json.dumps(table))
    if options.write:
        COSTS.write_text(HEAD + write_yaml(table))


if __name__ == "__main__":
    main()
