"""What learned transforms lose, beside codes rounded to nearest, with the engine's arithmetic.

    python benchmarks/flatquant.py [--model DIR] [--text FILE] [--data FILE] [--preset fast] [--inject]
                                   [--mx] [--golden MODEL CHECKPOINT | --layer]

For w4a4_flatquant and w4a4_flatquant_tp1 next to int4, or with --mx for mxfp4_flatquant next to mxfp4:
perplexity over that of the float model, mean change of a token's log-probability, how much of the gap
between nearest and float is closed, CPU seconds. --inject as in perplexity.py. --golden compares the
layers of a checkpoint of another producer with ours of the same model, on the same inputs. --layer
times steps of learning in one layer of real size (hidden 4096, MLP 14336), 4 samples of 256 tokens.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

import torch

from perplexity import ROOT, inject, windows
from quantcli.calibration.replay.served import Forward, Served, log_probs
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.core.events import Progress

NEAREST = """\
target: {target}
rules:
  - match: ["*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"]
    scheme: {{name: w4a4_dynamic, clip: none}}
  - match: "*_proj"
    scheme: {others}
"""


def convert(recipe: Path, model: Path, out: Path, sets: list[str]) -> float:
    """Convert a model; CPU seconds."""
    began = time.process_time()
    commands.quantize(commands.plan(recipe, model=str(model), out=out, overrides=tuple(sets)))
    return time.process_time() - began


def layer_sqnr(model: Path, checkpoint: Path, batches: list[Batch]) -> list[float]:
    """Signal over noise of each layer's output, in dB, on the float model's inputs."""
    found = []
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        plain = Forward(open_checkpoint(model), batches, Path(first))
        made = Forward(Served.open(checkpoint), batches, Path(second))
        for index in range(len(plain.skeleton.layers)):
            inputs = plain.states
            held = {n: inputs.get(n).clone() for n in range(len(batches))}
            outputs = made.layer(index, _Held(held), range(len(batches)))
            plain.layer(index)
            signal = noise = 0.0
            for n, made_here in outputs.items():
                expected = plain.states.get(n).double()
                signal += float(expected.square().sum())
                noise += float((made_here.double() - expected).square().sum())
            found.append(10 * math.log10(signal / noise))
    return found


class _Steps(Progress):
    """CPU seconds between steps of learning; ends the run after some of them."""

    def __init__(self, count: int) -> None:
        self.seconds: list[float] = []
        self._count, self._before = count, 0.0

    def step(
        self, done: int, total: int, *, noun: str = "batch", tokens: int = 0, loss: float | None = None
    ) -> None:
        """After the first, each step is timed."""
        if noun == "step":
            now = time.process_time()
            if done > 1:
                self.seconds.append(now - self._before)
            self._before = now
            if len(self.seconds) == self._count:
                raise KeyboardInterrupt


def layer_seconds(folder: Path, data: Path, count: int = 3) -> list[float]:
    """CPU seconds of some steps of w4a4_flatquant in a layer of real size, with random weights."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=4096, hidden_size=4096, intermediate_size=14336, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    for file in (ROOT / "examples/tiny-qwen3").glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    del model
    sets = [f"calibration.data={data}", "calibration.samples=4"]
    sets += ["rules.0.scheme={name: w4a4_flatquant, epochs: 9}"]
    recipe = ROOT / "recipes/w4a4_flatquant.yaml"
    job = commands.plan(recipe, model=str(folder / "model"), out=folder / "out", overrides=tuple(sets))
    steps = _Steps(count)
    try:
        commands.quantize(job, steps)
    except KeyboardInterrupt:
        return steps.seconds
    raise AssertionError("the run ended before its steps")


class _Held:
    def __init__(self, states: dict[int, torch.Tensor]) -> None:
        self._states = states

    def get(self, batch: int) -> torch.Tensor:
        """Hidden states of a batch."""
        return self._states[batch]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny-qwen3")
    parser.add_argument("--text", type=Path, default=ROOT / "examples/evaluation.txt")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/calibration.txt")
    parser.add_argument("--preset", default="paper", choices=["paper", "fast"])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--inject", action="store_true")
    parser.add_argument("--mx", action="store_true")
    parser.add_argument("--golden", type=Path, nargs=2, metavar=("MODEL", "CHECKPOINT"))
    parser.add_argument("--layer", action="store_true")
    given = parser.parse_args()
    name = "mxfp4_flatquant" if given.mx else "w4a4_flatquant"
    scheme = f"rules.{int(given.mx)}.scheme={{name: {name}, preset: {given.preset}}}"
    sets = [f"calibration.data={given.data}", f"calibration.samples={given.samples}", scheme]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.layer:
            seconds = layer_seconds(folder, given.data)
            print(json.dumps({"cpu_seconds_a_step": seconds}))
            return
        if given.golden:
            model, theirs = given.golden
            batches = windows(model, given.text, 4, 64)
            ours = folder / "ours"
            few = ["calibration.length=64"]
            convert(ROOT / "recipes/w4a4_flatquant.yaml", model, ours, [*sets, *few])
            result = {
                who: [round(db, 2) for db in layer_sqnr(model, checkpoint, batches)]
                for who, checkpoint in (("ours", ours), ("theirs", theirs))
            }
            print(json.dumps({**result, "worst": {who: min(dbs) for who, dbs in result.items()}}))
            return
        model = inject(given.model, folder / "model") if given.inject else given.model
        batches = windows(model, given.text, given.windows, given.length)
        base = torch.cat(log_probs(open_checkpoint(model), batches, workers=2))
        plain = math.exp(-base.mean())
        result = {"float": plain}
        int4 = (("w4a4_flatquant", "w8a8_dynamic"), ("w4a4_flatquant_tp1", None))
        for kind, others in [("mxfp4_flatquant", None)] if given.mx else int4:
            own = others or "{name: w4a4_dynamic, clip: none}"
            recipe = folder / f"{kind}-nearest.yaml"
            recipe.write_text(NEAREST.format(target="ascend", others=own))
            if given.mx:
                recipe = ROOT / "recipes/mxfp4.yaml"
            gap = None
            for path, options in ((recipe, []), (ROOT / f"recipes/{kind}.yaml", sets)):
                out = folder / path.stem
                seconds = convert(path, model, out, options)
                scores = torch.cat(log_probs(Served.open(out), batches, workers=2))
                perplexity = math.exp(-scores.mean())
                change = float((scores - base).abs().mean())
                gap = gap or perplexity - plain
                closed = 1 - (perplexity - plain) / gap
                result[path.stem] = {"ratio": perplexity / plain, "log_prob_change": change,
                                     "closed": closed, "cpu_seconds": seconds}  # fmt: skip
                print(
                    f"{path.stem:<28} {perplexity:.4f}  x {perplexity / plain:.4f}  mean |change| "
                    f"{change:.4f}  closes {100 * closed:.0f} %  {seconds:.0f} CPU s"
                )
        print(json.dumps(result))


if __name__ == "__main__":
    main()
