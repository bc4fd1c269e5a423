"""Recipes that calibrate next to other producers on the CPU: seconds, memory, and what they lose.

    python benchmarks/peers_by_data.py [--model DIR] [--data FILE] [--text FILE] [--rounds 3]
                                       [--threads 1] [--environments DIR] [--msmodelslim CHECKOUT]

quantcli and its peer calibrate the same model on the same windows of --data in turns, A B A B: whole
processes with all imports, and as many threads of OpenMP for both. Medians of CPU seconds and peak
memory; the bars are on quantcli's CPU seconds over the peer's. Behind them, by the engine's arithmetic
on windows of --text: the mean change of a token's log-probability against the float model, in nats, and
perplexity over the float model's.

llm-compressor: GPTQ and AWQ, W4A16 in groups of 128. msmodelslim, if a checkout is named: FlatQuant, of
which only the training runs without an NPU (peers/with_msmodelslim.py); quantcli's seconds are those of
the whole conversion. It is judged twice: with every linear of the decoder at 4 bits, and with o_proj
and down_proj float, which quantcli gives 8 bits.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import QUANTCLI, ROOT, Line, Usage, conversion, finish, measure, parser, spread, workplace
from environments import PEERS, Stages
from quantcli.recipe.shipped import shipped_recipes

LENGTH, WINDOWS = 256, 40  # tokens of a window; windows that are judged
LLM_COMPRESSOR, MSMODELSLIM = "llm-compressor", "msmodelslim"


@dataclass(frozen=True)
class Pair:
    """A recipe, what the peer's script calls the same, and the most CPU seconds over the peer's.

    kept: linears that msmodelslim's figures are for, `all` or `some` at 4 bits.
    """

    recipe: str
    peer: str
    cell: str
    bar: float | None = None
    kept: str = ""


PAIRS = (
    Pair("w4a16_gptq", LLM_COMPRESSOR, "int4-g128-gptq", 0.3),
    Pair("w4a16_awq", LLM_COMPRESSOR, "int4-g128-awq"),
    Pair("w4a4_flatquant", MSMODELSLIM, "FlatQuant, q k v gate up", 0.2, "some"),
    Pair("w4a4_flatquant_tp1", MSMODELSLIM, "FlatQuant, all linears", 0.2, "all"),
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", type=Path, default=ROOT / "examples/tiny-qwen3")
    arguments.add_argument("--data", type=Path, default=ROOT / "examples/calibration.txt")
    arguments.add_argument("--text", type=Path, default=ROOT / "examples/evaluation.txt")
    arguments.add_argument("--samples", type=int, default=64, help=f"of --data, of {LENGTH} tokens")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--only", nargs="+", metavar="RECIPE", help="these recipes")
    arguments.add_argument(
        "--environments", type=Path, default=ROOT / "build" / "pretrained", metavar="DIR"
    )
    arguments.add_argument("--msmodelslim", type=Path, metavar="CHECKOUT")
    options = arguments.parse_args()
    stages = Stages(options.environments.resolve())
    env = {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    model, data, text = (path.resolve() for path in (options.model, options.data, options.text))
    lines: list[Line] = []
    with workplace(options.dir) as folder:
        calibrated, judged = folder / "calibrated.json", folder / "judged.json"
        apart(write_windows, model, data, options.samples, 0, calibrated)
        apart(write_windows, model, text, WINDOWS, None, judged)
        for pair in PAIRS:
            wanted = not options.only or pair.recipe in options.only
            known = pair.recipe in shipped_recipes()
            if not wanted or not known or (pair.peer == MSMODELSLIM and options.msmodelslim is None):
                continue
            ours, theirs = folder / "ours", folder / "theirs"
            source = [options.msmodelslim.resolve()] if pair.peer == MSMODELSLIM else []
            script = PEERS / f"with_{pair.peer.replace('-', '_')}.py"
            python = stages.environment(pair.peer)
            if source:
                command = (python, script, model, *source, calibrated, judged, theirs)
            else:
                command = (python, script, model, theirs, pair.cell, calibrated)
            settings = ("data", data), ("samples", options.samples), ("length", LENGTH)
            sets = [f"--set=calibration.{key}={value}" for key, value in settings]
            used: dict[str, list[Usage]] = {"ours": [], "theirs": []}
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(options.rounds):
                remove(ours, theirs, folder / "ours.calibration")
                words = conversion(pair.recipe, model, ours, *sets)
                used["ours"].append(measure(*QUANTCLI, *words, env=env))
                used["theirs"].append(measure(*command, env=env))
                seconds["ours"].append(used["ours"][-1].cpu)
                trained = json.loads(theirs.read_text())["cpu"] if source else None  # then it judges
                seconds["theirs"].append(trained or used["theirs"][-1].cpu)
            peaks = {who: statistics.median(run.peak for run in runs) for who, runs in used.items()}
            took = {
                who: f"{spread(seconds[who])} CPU s, peak {peaks[who] / 2**20:.0f} MiB" for who in used
            }
            mine, other = (statistics.median(seconds[who]) for who in ("ours", "theirs"))
            name = f"{pair.peer} {pair.cell}"
            lines.append(Line(f"CPU: {pair.recipe} / {name}", mine / other, "", pair.bar))
            lines.append(lost(pair.recipe, apart(of_checkpoint, model, judged, ours), took["ours"]))
            judge_peer, more = (of_scores, (pair.kept,)) if source else (of_checkpoint, ())
            lines.append(lost(name, apart(judge_peer, model, judged, theirs, *more), took["theirs"]))
    finish(lines, as_json=options.json)


def remove(*paths: Path) -> None:
    """What a round before has left."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process of its own: this one must stay small."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def lost(what: str, found: tuple[float, float], took: str) -> Line:
    """What one producer loses. found: mean change, and perplexity over the float model's."""
    change, ratio = found
    detail = f"perplexity x {ratio:.4f}; {took}"
    return Line(f"log-prob change: {what}", change, "nats", None, detail)


# -- in processes of their own -----------------------------------------------------------------------


def write_windows(model: Path, text: Path, count: int, seed: int | None, out: Path) -> None:
    """Token ids of windows, as JSON: what a calibration draws with a seed; the first ones without."""
    from quantcli.calibration.text.dataset import TextSource, load_dataset

    source = TextSource(str(text), str(text), count, LENGTH, seed, pack=True, batch_tokens=4 * LENGTH)
    batches = load_dataset(source, model, positions=None, vocab_size=None).batches
    out.write_text(json.dumps([row for batch in batches for row in batch.input_ids.tolist()]))


def of_checkpoint(model: Path, judged: Path, checkpoint: Path) -> tuple[float, float]:
    """Mean change, and perplexity over the float model's."""
    return judge(model, judged, scores(checkpoint, judged))


def of_scores(model: Path, judged: Path, found: Path, kept: str) -> tuple[float, float]:
    """The same of log-probabilities that a peer has written."""
    import torch

    return judge(model, judged, torch.tensor(json.loads(found.read_text())[kept]))


def judge(model: Path, judged: Path, now: Any) -> tuple[float, float]:
    """now: float [windows, length - 1]."""
    was = scores(model, judged)
    change = (now - was).double()
    return float(change.abs().mean()), float((-change.mean()).exp())


def scores(model: Path, judged: Path) -> Any:
    """Log-probabilities of all tokens but the first of a window: float32 [windows, length - 1]."""
    import torch

    from gptq import predictions
    from quantcli.calibration.text.dataset import Batch

    windows = torch.tensor(json.loads(judged.read_text()))
    return predictions(model, [Batch(part, None) for part in windows.split(8)])[0]


if __name__ == "__main__":
    main()
