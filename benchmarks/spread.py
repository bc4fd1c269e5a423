"""What a calibration on a cluster costs over one in threads: CPU seconds, without start-up.

    python benchmarks/spread.py [--samples N] [--hidden N] [--rounds N] [--recipes NAME ...]

The requests of three nodes are done one after another in this process, so that nothing but the work is
counted: the driver's own, the float pass and the layers, or the passes of each layer. Models are built
before. Runs alternate; the least of each is compared. The files must be the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calibration import make_model
from common import Line, finish, hashes, parser, workplace
from quantcli.calibration.calibrate import Share
from quantcli.calibration.resources import Resources
from quantcli.calibration.spread import run as spread
from quantcli.calibration.spread import worker
from quantcli.commands import calibrate as commands
from quantcli.core.cluster.executor import Executor
from quantcli.core.events import Progress

NODES = 3
BAR = 1.05
RECIPES = {
    "w8a8_static": (),
    "w8a8_static_smooth": (),
    "w4a16_gptq": (),
    "w4a4_flatquant": ("rules.0.scheme={name: w4a4_flatquant, epochs: 3}",),
}


class Clock(Progress):
    """CPU seconds from the first layer on."""

    began = 0.0

    def begin_layers(self, layers: int, done: int, tokens: int) -> None:
        self.began = time.process_time()


class OneByOne:
    """A crew of so many nodes, in this process. seconds: of CPU, by function."""

    size, threads = NODES, 1

    def __init__(self, work: worker.Work) -> None:
        self.seconds: Counter[str] = Counter()
        self._work = work
        worker._process(work)

    def run(
        self,
        function: Callable[[worker.Work, Any, Progress], Any],
        requests: Sequence[Any],
        *,
        noun: str,
        progress: Progress,
        done: Callable[[int, Any], None] = lambda index, result: None,
    ) -> list[Any]:
        results = []
        for index, request in enumerate(requests):
            began = time.process_time()
            results.append(function(self._work, request, progress))
            self.seconds[function.__name__] += time.process_time() - began
            done(index, results[-1])
        return results


def seconds(recipe: str, model: Path, out: Path, samples: int, *, shared: bool) -> tuple[float, str]:
    """CPU seconds of a calibration, and what they were spent on."""
    crews: list[OneByOne] = []

    def on_cluster(
        shares: Sequence[Share], work: worker.Work, resources: Resources, progress: Progress
    ) -> None:
        crews.append(OneByOne(work))
        spread.calibrate(shares, work, crews[0], progress)

    spread.on_cluster = on_cluster
    text = Path(__file__).parents[1] / "examples/calibration.txt"
    sizes = (f"calibration.data={text}", f"calibration.samples={samples}", "calibration.length=256")
    overrides = (*sizes, *RECIPES[recipe])
    session = commands.plan_calibration(recipe, model=str(model), out=out, overrides=overrides)
    executor, clock = Executor("local") if shared else None, Clock()
    commands.calibrate(session, Resources(executor=executor), clock)
    spent = time.process_time() - clock.began
    return spent, ", ".join(
        f"{name} {s:.1f} s" for name, s in crews[0].seconds.items()
    ) if crews else ""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=48)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--recipes", nargs="+", choices=[*RECIPES], default=[*RECIPES])
    given = options.parse_args()
    lines = []
    with workplace(given.dir) as root:
        make_model(root / "model", given.layers, given.hidden)
        for recipe in given.recipes:
            alone, shared, parts = [], [], ""
            for number in range(given.rounds):
                outs = [root / f"{recipe}-{number}-{how}" for how in ("threads", "shared")]
                alone.append(seconds(recipe, root / "model", outs[0], given.samples, shared=False)[0])
                spent, parts = seconds(recipe, root / "model", outs[1], given.samples, shared=True)
                shared.append(spent)
                if hashes(outs[0]) != hashes(outs[1]):
                    raise SystemExit(f"{recipe}: files differ")
            detail = f"{min(shared):.1f} s over {min(alone):.1f} s; {parts}"
            what = f"{recipe}, CPU on {NODES} nodes over one"
            bar = BAR if recipe == "w4a4_flatquant" else None
            lines.append(Line(what, min(shared) / min(alone), "x", bar, detail))
    finish(lines, as_json=given.json)


if __name__ == "__main__":
    main()
