"""What a low-rank branch in 16 bits gains (SVDQuant), against the same bytes spent in other ways.

    python benchmarks/svdquant.py [--model DIR] [--data FILE] [--text FILE] [--ranks 4 16 32]

A linear becomes y = Q(x) Q(R)^T + (x A^T) B^T. Channels of its input are smoothed first, by s =
sqrt(rms(x) / max|w|); B A is the best approximation of the smoothed weight by so many columns (SVD in
float64), rounded to bfloat16, and R is the rest. The other ways: groups of 64 or 32 columns, and the
modules with the largest errors in 8 bits, as many as the branch's bytes pay for. `smoothed` is the
scheme alone after the same smoothing.

The branch's share of bytes is large in small models: rank 32 costs 0.25 bits a weight if the hidden
size is 4096, as rank 4 does if it is 512. Bits are stored bits of a linear's weight. The error is that
of outputs, relative, on inputs of the float model from --data; the root of its mean square over all
linears. KL divergence and change of log-probability are means over --text, by the engine's arithmetic.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common import ROOT
from gptq import windows
from quantcli.calibration.methods.awq import Tokens
from quantcli.calibration.replay.engine import EngineLinears
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.served import token_log_probs
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.replay.taps import Matrices, Matrix, Tap
from quantcli.calibration.text.dataset import Batch
from quantcli.calibration.watch import Watch, watched
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.numerics import Parts
from quantcli.core.threads import one_thread
from quantcli.schemes.base import Scheme
from quantcli.schemes.nvfp4 import NvFp4
from quantcli.schemes.w4a4_dynamic import W4A4Dynamic
from quantcli.schemes.w4a16 import W4A16
from quantcli.schemes.w8a8_dynamic import W8A8Dynamic
from quantcli.schemes.w8a16 import W8A16

CPU, BF16 = torch.device("cpu"), torch.bfloat16
TOKENS = 512  # of each input, to judge errors on
BASES: dict[str, tuple[Scheme, float, Scheme, float]] = {  # with bits, and what 8 bits are next to it
    "int4 g128": (W4A16(clip="inputs"), 4 + 16 / 128, W8A16(clip="inputs"), 8.0),
    "nvfp4": (NvFp4(), 4.5, W8A8Dynamic(clip="inputs"), 8.0),
    "w4a4": (W4A4Dynamic(clip="inputs"), 4.0, W8A8Dynamic(clip="inputs"), 8.0),
}


@dataclass(frozen=True)
class Way:
    """A way to spend bytes. rank: None for no branch. bits8: average bits, if some modules have 8."""

    name: str
    scheme: Scheme
    base: float
    smooth: bool = False
    rank: int | None = None
    bits8: float | None = None
    eight: tuple[Scheme, float] | None = None

    def bits(self, n: int, k: int) -> float:
        """Stored bits of a weight [n, k] in four bits, for each of its numbers."""
        return self.base + (0 if self.rank is None else 16 * self.rank * (n + k) / (n * k))


class Linear:
    """A linear as it would be computed: smoothed, with the branch if there is one."""

    def __init__(self, scheme: Scheme, weight: Tensor, x: Tensor, way: Way) -> None:
        """weight: float32 [n, k]; x: some of its inputs [tokens, k]."""
        scale = torch.ones(weight.shape[1])
        if way.smooth:
            rms, amax = x.square().mean(0).sqrt(), weight.abs().amax(0)
            scale = torch.where((rms > 0) & (amax > 0), (rms / amax).sqrt(), 1.0)
        self.scale = scale
        rest = weight * scale
        self.branch: tuple[Tensor, Tensor] | None = None
        if way.rank is not None:
            u, s, v = torch.linalg.svd(rest.double(), full_matrices=False)
            b, a = (u * s)[:, : way.rank].to(BF16).float(), v[: way.rank].to(BF16).float()
            self.branch, rest = (a, b), rest - b @ a
        self.scheme, read = scheme, x / scale
        stats = {"input_square": read.square().mean(0)}
        observer = scheme.observer(BF16)
        if observer is not None:
            observer.update(read, 0)
            stats |= observer.stats()
        constants: Parts = dict(scheme.constants(stats, BF16))
        constants |= {"weight_amax": rest.abs().amax().view(1), "weight_coarse": torch.tensor([False])}
        self.parts = scheme.quantize(rest, BF16, constants)

    def forward(self, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
        """x [..., k] -> [..., n]."""
        read = x / self.scale
        y = self.scheme.forward(read, self.parts, bias)
        if self.branch is not None:
            a, b = self.branch
            y = y + read @ a.T @ b.T
        return y


class States(dict[int, Tensor]):
    """Hidden states by batch."""

    def carried(self, batch: int) -> dict[str, object]:
        """Nothing else."""
        return {}

    def get(self, batch: int) -> Tensor:  # type: ignore[override]
        """Those of a batch."""
        return self[batch]

    def put(self, batch: int, hidden: Tensor, carry: object) -> None:
        """A sink."""
        self[batch] = hidden


def ways(base: str, ranks: Sequence[int], bits: Callable[[Way], float]) -> list[Way]:
    """All ways of one base. bits: of a way, on average over the model."""
    scheme, width, eight, more = BASES[base]
    found = [Way(base, scheme, width), Way(f"{base}, smoothed", scheme, width, smooth=True)]
    for rank in ranks:
        way = Way(f"{base}, smoothed, rank {rank}", scheme, width, smooth=True, rank=rank)
        found.append(way)
        found.append(
            Way(f"{base}, 8 bits for the worst, bytes of rank {rank}", scheme, width,
                bits8=bits(way), eight=(eight, more))
        )  # fmt: skip
    if isinstance(scheme, W4A16):
        for size in (64, 32):
            smaller = scheme.model_copy(update={"group_size": size})
            found.append(Way(f"int4 g{size}", smaller, 4 + 16 / size))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny-qwen3")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/calibration.txt")
    parser.add_argument("--text", type=Path, default=ROOT / "examples/evaluation.txt")
    parser.add_argument("--windows", type=int, default=16, help="of each text, of 256 tokens")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 32])
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    given = parser.parse_args()
    data, text = (windows(given.model, file, given.windows, 256) for file in (given.data, given.text))
    with torch.no_grad(), one_thread():
        print("| way | bits | error | KL | change |\n|---|---|---|---|---|")
        rows = []
        for base in given.bases:
            for row in judged(given.model, data, text, base, given.ranks):
                rows.append(row)
                print("| {} | {:.2f} | {:.4f} | {:.5f} | {:.4f} |".format(*row), flush=True)
    print(json.dumps(rows))


def judged(
    model: Path, data: list[Batch], text: list[Batch], base: str, ranks: Sequence[int]
) -> list[tuple[str, float, float, float, float]]:
    """Each way: bits of a weight, error, KL divergence, change."""
    skeleton = Skeleton(open_checkpoint(model), "F32", trust_remote_code=False)
    shapes = {
        name: stored.spec.shape
        for name, stored in skeleton.checkpoint.tensors.items()
        if name.endswith("_proj.weight")
    }
    total = sum(n * k for n, k in shapes.values())

    def average(way: Way) -> float:
        return sum(n * k * way.bits(n, k) for n, k in shapes.values()) / total

    tried = ways(base, ranks, average)
    inputs = collected(skeleton, data, set(shapes))
    plain = {name: lost(BASES[base][0], name, skeleton, inputs[name], tried[0]) for name in shapes}
    replay = Replay(skeleton, text, device=CPU, workers=2)
    first = States()
    replay.begin(first.put)
    states: dict[str, States] = {way.name: first for way in tried} | {"float": first}
    squares, bits = dict.fromkeys(states, 0.0), {way.name: average(way) for way in tried}
    high = {way.name: worst(way, plain, shapes) for way in tried}
    for way in tried:
        if way.eight is not None:
            bits[way.name] = sum(
                n * k * (way.eight[1] if name in high[way.name] else way.base)
                for name, (n, k) in shapes.items()
            ) / total  # fmt: skip
    for index, (name, layer) in enumerate(skeleton.layers):
        with skeleton.loaded(index, read_tensor, CPU):
            matrices, after = Matrices(name, layer), {}
            for which, before in states.items():
                engine = None
                if (mine := next((way for way in tried if way.name == which), None)) is not None:

                    def quantizer(
                        module: str, rows: Tensor, bias: Tensor | None, way: Way = mine
                    ) -> tuple[Linear, Parts] | None:
                        weight = f"{module}.weight"
                        if weight not in shapes:
                            return None
                        eight = way.eight is not None and weight in high[way.name]
                        scheme = way.eight[0] if eight and way.eight else way.scheme
                        linear, x = Linear(scheme, rows, inputs[weight], way), inputs[weight]
                        squares[way.name] += relative(linear, rows, x) / len(shapes)
                        return linear, {}

                    engine = EngineLinears(matrices, skeleton.segments(index), quantizer)
                after[which] = States()
                tap = None if engine is None else lambda _, e=engine, m=matrices: Tap(m, e)
                replay.run(index, layer, before, after[which].put, tap)
            states = after
    ends = {which: replay.endings(its) for which, its in states.items()}
    found = {way.name: [0.0, 0.0] for way in tried}
    for batch in text:
        logits = {which: next(each) for which, each in ends.items()}
        p, was = logits["float"].log_softmax(-1), token_log_probs(logits["float"], batch)
        for way in tried:
            q = logits[way.name].log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1).double().mean()
            change = (token_log_probs(logits[way.name], batch) - was).abs().double().mean()
            found[way.name][0] += float(kl) / len(text)
            found[way.name][1] += float(change) / len(text)
    return [(way.name, bits[way.name], squares[way.name] ** 0.5, *found[way.name]) for way in tried]


def collected(skeleton: Skeleton, data: list[Batch], names: set[str]) -> dict[str, Tensor]:
    """Some inputs of each weight in the float model, [tokens, k]."""
    replay = Replay(skeleton, data, device=CPU, workers=2)
    states, found = States(), {}
    replay.begin(states.put)
    for index, (name, layer) in enumerate(skeleton.layers):
        with skeleton.loaded(index, read_tensor, CPU):
            matrices, after = Matrices(name, layer), States()
            mine = [weight for weight in sorted(names) if weight.startswith(f"{name}.")]
            kept = {weight: Tokens(-(-TOKENS // len(data))) for weight in mine}
            watch = Watch({Matrix(weight): [tokens] for weight, tokens in kept.items()})

            def tap(number: int, watch: Watch = watch, matrices: Matrices = matrices) -> object:
                return watched(watch, matrices, number, data[number])

            replay.run(index, layer, states, after.put, tap)  # type: ignore[arg-type]
            states = after
        for weight, tokens in kept.items():
            rows = tokens.rows()
            assert rows is not None
            found[weight] = rows
    return found


def relative(linear: Linear, weight: Tensor, x: Tensor) -> float:
    """The squared error of outputs over their sum of squares."""
    y = x @ weight.T
    return float((linear.forward(x, {}) - y).double().square().sum() / y.double().square().sum())


def lost(scheme: Scheme, name: str, skeleton: Skeleton, x: Tensor, way: Way) -> float:
    """The relative squared error of a weight in a scheme."""
    weight = read_tensor(skeleton.checkpoint.tensors[name]).float()
    return relative(Linear(scheme, weight, x, way), weight, x)


def worst(way: Way, errors: dict[str, float], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """The weights that get 8 bits: the largest errors for their bytes first, while bytes are left."""
    if way.eight is None or way.bits8 is None:
        return set()
    total = sum(n * k for n, k in shapes.values())
    left, chosen = total * (way.bits8 - way.base), set()
    for name in sorted(errors, key=lambda name: -errors[name]):
        n, k = shapes[name]
        cost = n * k * (way.eight[1] - way.base)
        if cost <= left:
            chosen.add(name)
            left -= cost
    return chosen


if __name__ == "__main__":
    main()
