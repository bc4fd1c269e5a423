"""The cost of DeepSeek-V3 on this machine: core seconds for each GB of weights, and for each layer.

Conversions are real ones of tensors of its shapes, forked off a process that has imports behind it,
less the time of a nearly empty model. Learning is a real calibration of one layer of full width on 4
samples of 256 tokens for one epoch. That is one of the recipe's 480 steps, of the same size, so that
the time of a step is not scaled: there are only more of them. What is scaled: the layer has 8 experts,
which all tokens choose, in place of 256. A token still meets 8, but each expert of the full model has
1/32 of the tokens of a batch. The time of such thin products over that of the ones here multiplies all
passes.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import deepseek
from common import RECIPES, ROOT, Usage, conversion, fork, qwen3, reap, warm_up, write_model
from quantcli.checkpoint.spec import TensorSpec

if TYPE_CHECKING:
    from quantcli.calibration.session import Session

KINDS = ("experts", "other matrices", "copies")
SAMPLES, LENGTH, EPOCHS = 128, 256, 15  # of recipes/w4a4_flatquant.yaml and of its preset
STEP = 4  # samples
_EXPERTS = 8  # of the layer that learns here: as many as a token chooses
_VOCABULARY = 16384  # more than the tokenizer has
_SMALL = TensorSpec("model.layers.0.self_attn.q_proj.weight", "BF16", (64, 64))


@dataclass(frozen=True)
class Costs:
    """Core seconds on this machine.

    converting: for each GB of source, by kind.
    reading:    for each GB of a layer, by one thread.
    loading:    for each GB of a layer, after that: experts put together, in float32, by all threads.
    forward:    of all samples through one layer, as floats.
    learning:   of a layer: passes before and after, and all steps, which two threads share.
    steps:      the part of `learning` that two threads share.
    rounding:   of a layer's codes by GPTQ.
    """

    converting: dict[str, float]
    reading: float
    loading: float
    forward: float
    learning: float
    steps: float
    rounding: float


def measured(conversions: Conversions, folder: Path) -> Costs:
    """All costs, in some minutes. folder: for models of up to 2 GB."""
    layer = folder / "layer"
    nbytes = _write_layer(layer)
    loading = _loading(layer, folder / "learned", nbytes)
    learning = _learning(layer, folder / "learned")
    shutil.rmtree(layer)
    return Costs(_converting(conversions, folder), *loading, *learning)


def tensors_of(kind: str) -> list[TensorSpec]:
    """Tensors of a kind, about a GB."""
    sparse, dense = deepseek.layer(deepseek.DENSE), deepseek.layer(0)
    if kind == "experts":
        return [spec for spec in sparse if ".experts." in spec.name][: 3 * 10]
    if kind == "copies":
        rows = deepseek.VOCABULARY // 2
        return [TensorSpec("model.embed_tokens.weight", "BF16", (rows, deepseek.HIDDEN)), _SMALL]
    attention = [spec for spec in dense if spec.name.endswith(("q_a_proj.weight", "o_proj.weight"))]
    return [*attention, *(spec for spec in dense if ".mlp." in spec.name)]


class Conversions:
    """Conversions to w8a8_dynamic by two threads, in forks of this process."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self._folder, self._rounds = folder, rounds
        empty, out = folder / "empty", folder / "out"
        write_model(empty, qwen3(1, hidden=128, vocab=16))
        warm_up(conversion("w8a8_dynamic", empty, out))
        shutil.rmtree(out)
        self._start = Usage(0.0, 0.0, 0.0, 0)
        self._start = self.of(empty)

    def of(self, model: Path) -> Usage:
        """The median of some rounds, without what a nearly empty model takes."""
        self._once(model)  # the next one finds the memory that this one has freed
        used = [self._once(model) for _ in range(self._rounds)]
        median = (
            statistics.median(getattr(u, name) for u in used) - getattr(self._start, name)
            for name in ("wall", "user", "system")
        )
        return Usage(*median, max(u.peak for u in used))

    def _once(self, model: Path) -> Usage:
        out, log = self._folder / "out", self._folder / "log"
        code, used = reap(fork(conversion("w8a8_dynamic", model, out, "--workers", "2"), log))
        if code:
            raise SystemExit(f"conversion exits with {code}:\n{log.read_text()}")
        shutil.rmtree(out)
        return used


def _converting(conversions: Conversions, folder: Path) -> dict[str, float]:
    """For each GB of source, by kind."""
    costs = {}
    for kind in KINDS:
        nbytes = write_model(folder / "model", tensors_of(kind), shards=1)
        costs[kind] = conversions.of(folder / "model").cpu / nbytes * 1e9
        shutil.rmtree(folder / "model")
    return costs


def _loading(model: Path, out: Path, nbytes: int) -> tuple[float, float]:
    """Reading and loading, for each GB of a layer."""
    import torch

    from quantcli.calibration.building import skeleton_of
    from quantcli.checkpoint.tensors import read_tensor

    skeleton = skeleton_of(_session(model, out).plan, trust_remote_code=False)
    stored = [tensor for group in skeleton._groups[0] for tensor in group.stored]
    whole, read = [], []
    for _ in range(3):
        began = time.process_time()
        with skeleton.loaded(0, read_tensor, torch.device("cpu")):
            whole.append(time.process_time() - began)
        began = time.process_time()
        for tensor in stored:
            read_tensor(tensor)
        read.append(time.process_time() - began)
    reading, loading = (statistics.median(taken) / nbytes * 1e9 for taken in (read, whole))
    return reading, loading - reading


def _learning(model: Path, out: Path) -> tuple[float, float, float, float]:
    """The other costs, in their order."""
    phases = _phases(model, out)
    # scaled to all samples, and to the thin products of many experts
    factor = SAMPLES / STEP * _thinner()
    passes = {name: taken * factor for name, taken in phases.items()}
    forward, steps = passes["magnitudes"], passes["learning"] * EPOCHS
    # the layer is loaded again before the loss after, which is else that of before
    others = 2 * passes["loss before"] + sum(
        taken for name, taken in passes.items() if name in ("measuring", "inputs") or "engine" in name
    )
    return forward, forward + others + steps, steps, phases["rounding"]


def _write_layer(folder: Path) -> int:
    """A model of one layer of full width with few experts, and the bundled tokenizer. Returns the bytes
    of the layer."""
    here, there = f"layers.{deepseek.DENSE}.", "layers.0."
    specs = []
    for spec in deepseek.layer(deepseek.DENSE):
        _, _, expert = spec.name.partition(".experts.")
        if expert and int(expert.partition(".")[0]) >= _EXPERTS:
            continue
        shape = (_EXPERTS, *spec.shape[1:]) if ".gate." in spec.name else spec.shape
        specs.append(TensorSpec(spec.name.replace(here, there), spec.dtype, shape))
    ends = [TensorSpec(f"{name}.weight", "BF16", (_VOCABULARY, deepseek.HIDDEN))
            for name in ("model.embed_tokens", "lm_head")]  # fmt: skip
    norm = TensorSpec("model.norm.weight", "BF16", (deepseek.HIDDEN,))
    write_model(folder, [*ends, *specs, norm], shards=1)
    few = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    few |= {"n_routed_experts": _EXPERTS, "n_group": 1, "topk_group": 1, "vocab_size": _VOCABULARY}
    (folder / "config.json").write_text(json.dumps(deepseek.CONFIG | few))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples/tiny-qwen3" / name, folder)
    return sum(spec.nbytes for spec in specs)


def _phases(model: Path, out: Path) -> dict[str, float]:
    """Core seconds of each phase of a calibration of one step."""
    from quantcli.calibration.resources import Resources
    from quantcli.commands.calibrate import calibrate
    from quantcli.core.events import Progress

    class Clock(Progress):
        def __init__(self) -> None:
            self.began = [("", time.process_time())]

        def phase(self, name: str, passes: float = 1.0) -> None:
            self.began.append((name, time.process_time()))

        def layer(self, name: str, index: int, note: str = "") -> None:
            self.phase("")

    clock = Clock()
    calibrate(_session(model, out), Resources(workers=2), clock)
    shutil.rmtree(out)
    following = [began for _, began in clock.began[1:]]
    return {
        name: end - began for (name, began), end in zip(clock.began, following, strict=False) if name
    }


def _session(model: Path, out: Path) -> Session:
    """A calibration of one step."""
    from quantcli.commands.calibrate import plan_calibration

    sets = (f"calibration.samples={STEP}", f"calibration.length={LENGTH}",
            "rules.0.scheme={name: w4a4_flatquant, epochs: 1}")  # fmt: skip
    recipe = RECIPES / "w4a4_flatquant.yaml"
    return plan_calibration(recipe, model=str(model), out=out, overrides=sets)


def _thinner() -> float:
    """The time of a pass with 256 experts over that with 8: products of an expert's tokens."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    weight = torch.randn(2 * deepseek.EXPERT, deepseek.HIDDEN)
    tokens = STEP // 2 * LENGTH

    def seconds(rows: int) -> float:
        """For one token."""
        inputs, taken = torch.randn(rows, deepseek.HIDDEN), []
        for _ in range(7):
            began = time.process_time()
            for _ in range(tokens // rows):
                torch.nn.functional.linear(inputs, weight)
            taken.append(time.process_time() - began)
        return statistics.median(taken)

    ratio = seconds(tokens * _EXPERTS // deepseek.EXPERTS) / seconds(tokens)
    torch.set_num_threads(before)
    weights = {spec.name: spec.numel for spec in deepseek.layer(deepseek.DENSE)}
    experts = sum(n for name, n in weights.items() if ".experts." in name) * _EXPERTS / deepseek.EXPERTS
    others = sum(n for name, n in weights.items() if ".experts." not in name)
    return (others + ratio * experts) / (others + experts)
