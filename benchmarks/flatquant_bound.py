"""How far transforms of inputs could lower the error of 4-bit weights and inputs, by their kind.

    python benchmarks/flatquant_bound.py [--model DIR] [--data FILE] [--text FILE] [--windows 32]

With a transform T behind a random rotation, rounding errors of inputs x and of weights W both grow with

    J(T) = E |x T|^2 |W T^-T|^2 = tr(P S) tr(P^-1 M),   P = T T^T,  S = E x^T x,  M = W^T W

(scales are shares of a token's or a row's norm). Figures are J over that of a rotation alone, for the
matrices that read a norm: with the best scales of channels; with the best Kronecker factors and scales,
as w4a4_flatquant has them; with the best basis of the residual stream for all layers together and
scales, which folds into the weights; with any T. S is of --data; `other` is the same T on --text.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from perplexity import READERS, ROOT, windows
from quantcli.core.numerics import decompose

ROUNDS = 6  # of alternating minimizations
DAMPING = 1e-3


def root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(1e-12).sqrt()) @ vectors.T


def best(square: Tensor, weight: Tensor) -> Tensor:
    """The P with the least tr(P S) tr(P^-1 M): S^-1/2 (S^1/2 M S^1/2)^1/2 S^-1/2."""
    half = root(square)
    inverse = torch.linalg.inv(half)
    return inverse @ root(half @ weight @ half) @ inverse


def error(p: Tensor, square: Tensor, weight: Tensor) -> float:
    """J over that of a rotation."""
    found = (p * square).sum() * (torch.linalg.inv(p) * weight).sum()
    return float(found / (square.trace() * weight.trace()))


def scales(square: Tensor, weight: Tensor) -> Tensor:
    """The best diagonal P."""
    return torch.diag((weight.diagonal() / square.diagonal()).sqrt())


def kronecker(square: Tensor, weight: Tensor) -> Tensor:
    """A good P of the form diag(s) (A x B) diag(s), by turns."""
    left, right = decompose(len(square))
    b, s = torch.eye(right).double(), torch.ones(len(square)).double()
    for _ in range(ROUNDS):
        seen = (square * s[:, None] * s).view(left, right, left, right)
        read = (weight / s[:, None] / s).view(left, right, left, right)
        inverse = torch.linalg.inv(b)
        a = best(torch.einsum("arbs,rs->ab", seen, b), torch.einsum("arbs,rs->ab", read, inverse))
        inverse = torch.linalg.inv(a)
        b = best(torch.einsum("arbs,ab->rs", seen, a), torch.einsum("arbs,ab->rs", read, inverse))
        p = torch.kron(a, b)
        found = p * s[:, None] * s
        s = ((torch.linalg.inv(p) * weight).diagonal() / (p * square).diagonal()).pow(0.25)
    return found


def logarithm(matrix: Tensor) -> Tensor:
    """Of a positive definite matrix, scaled to a mean diagonal of 1."""
    values, vectors = torch.linalg.eigh(matrix / matrix.diagonal().mean())
    return (vectors * values.log()) @ vectors.T


def squares(model: torch.nn.Module, folder: Path, text: Path, count: int) -> dict[str, Tensor]:
    """E x^T x of the inputs of each linear, float64, by name."""
    sums: dict[str, Tensor] = {}
    tokens = 0

    def hook(name: str):  # noqa: ANN202
        def add(_: object, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    linears = [(n, m) for n, m in model.named_modules() if n.endswith("_proj")]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears]
    for batch in windows(folder, text, count, 256):
        with torch.no_grad():
            model(batch.input_ids)
        tokens += batch.input_ids.numel()
    for handle in handles:
        handle.remove()
    return {name: total / tokens for name, total in sums.items()}


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny-qwen3")
    parser.add_argument("--data", type=Path, default=ROOT / "examples/calibration.txt")
    parser.add_argument("--text", type=Path, default=ROOT / "examples/evaluation.txt")
    parser.add_argument("--windows", type=int, default=32)
    given = parser.parse_args()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(str(given.model), dtype=torch.float32, local_files_only=True)
    here = squares(model, given.model, given.data, given.windows)
    there = squares(model, given.model, given.text, given.windows)
    found = []  # S, S of the other text, M, in the basis of the stream: norms are folded
    for index, layer in enumerate(model.model.layers):
        for norm, readers in READERS.items():
            gain = layer.get_submodule(norm).weight.detach().double()
            rows = torch.cat([layer.get_submodule(reader).weight.detach() for reader in readers])
            weight = rows.double() * gain
            name = f"model.layers.{index}.{readers[0]}"
            turned = [table[name] / gain / gain[:, None] for table in (here, there)]
            damped = turned[0] + DAMPING * torch.diag(turned[0].diagonal().mean().expand(len(gain)))
            found.append((damped, turned[1], weight.T @ weight))
    basis = torch.linalg.eigh(sum(logarithm(best(s, m)) for s, _, m in found))[1]
    kinds = {
        "scales": scales,
        "kronecker": kronecker,
        "basis": lambda s, m: basis @ scales(basis.T @ s @ basis, basis.T @ m @ basis) @ basis.T,
        "any": best,
    }
    result = {}
    for kind, make in kinds.items():
        made = [(make(s, m), s, other, m) for s, other, m in found]
        own = [error(p, s, m) for p, s, _, m in made]
        others = [error(p, other, m) for p, _, other, m in made]
        result[kind] = {"own": sum(own) / len(own), "other": sum(others) / len(others)}
        print(f"{kind:<10} {result[kind]['own']:.3f}   other text {result[kind]['other']:.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
