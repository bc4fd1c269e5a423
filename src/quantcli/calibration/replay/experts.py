"""All tokens through every expert of a layer, next to the model's own forward.

Modules of experts have one of three interfaces:

* (tokens, numbers of the experts of each token, their weights): transformers, for nearly all families.
  Each expert is run on all tokens.
* (rows of all experts, one expert after the other), as Llama 4 has it: the block around them is run
  again, with a router that chooses every expert. So inputs are scaled as the router would scale them.
* a list of modules, as code that comes with a model often has it: each module is run on the tokens that
  the block around the list is given. Rows that a module is given on its own must be among these.

What these runs give is dropped.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantcli.calibration.replay.skeleton import Segments
from quantcli.calibration.replay.taps import Matrix
from quantcli.core.errors import InputError
from quantcli.targets.vllm_family import EXPERT

_ROUTED = 3  # arguments: tokens, numbers of experts, weights


@dataclass(frozen=True)
class Experts:
    """The experts of a layer.

    host:     the module whose first argument holds the tokens.
    matrices: of each expert.
    together: whether all experts are given the very tokens, so that their inputs are one.
    run:      runs experts on tokens [n, k]: all of them, or at least those with the given numbers.
    alone:    modules of single experts.
    """

    host: nn.Module
    matrices: Mapping[int, frozenset[Matrix]]
    together: bool
    run: Callable[[Tensor, Iterable[int]], None]
    alone: tuple[nn.Module, ...] = ()

    @property
    def parameters(self) -> frozenset[str]:
        """Names of their parameters."""
        return frozenset(m.parameter for matrices in self.matrices.values() for m in matrices)

    def with_any(self, matrices: Collection[Matrix]) -> list[int]:
        """Numbers of the experts that have one of some matrices."""
        return [number for number, own in self.matrices.items() if not own.isdisjoint(matrices)]


def experts_of(name: str, layer: nn.Module, segments: Segments) -> list[Experts]:
    """The experts of a layer by its name, its module and the stored weights of its parameters.

    InputError for experts whose module has another interface.
    """
    fused: dict[str, dict[int, set[Matrix]]] = defaultdict(lambda: defaultdict(set))
    listed: dict[str, dict[int, set[Matrix]]] = defaultdict(lambda: defaultdict(set))
    for parameter, experts in segments.items():
        if not any(EXPERT.fullmatch(s.module) for parts in experts for s in parts):
            continue
        if len(experts) > 1:
            owner = parameter.rpartition(".")[0]
            for number in range(len(experts)):
                fused[owner][number].add(Matrix(parameter, number))
        elif match := re.fullmatch(r"(.*\bexperts)\.(\d+)\..*", parameter):
            listed[match[1]][int(match[2])].add(Matrix(parameter))
        else:
            raise _unknown(parameter, "is not in a list of experts")
    found = [_fused(name, layer, owner, numbers) for owner, numbers in fused.items()]
    return found + [_listed(name, layer, owner, numbers) for owner, numbers in listed.items()]


def _inner(name: str, layer: nn.Module, path: str) -> nn.Module:
    """A module of a layer by its name in the model."""
    return layer.get_submodule(path.removeprefix(name).removeprefix("."))


def _frozen(numbers: Mapping[int, set[Matrix]]) -> dict[int, frozenset[Matrix]]:
    return {number: frozenset(matrices) for number, matrices in sorted(numbers.items())}


def _fused(name: str, layer: nn.Module, owner: str, numbers: Mapping[int, set[Matrix]]) -> Experts:
    module: Any = _inner(name, layer, owner)
    arguments = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if len(arguments) == _ROUTED:

        def run(tokens: Tensor, numbers: Iterable[int]) -> None:
            weights = tokens.new_ones((len(tokens), 1))
            for number in numbers:
                index = torch.full((len(tokens), 1), number, device=tokens.device)
                module.forward(tokens, index, weights)

        return Experts(module, _frozen(numbers), True, run)
    if len(arguments) == 1:
        block: Any = _inner(name, layer, owner.rpartition(".")[0])

        def again(tokens: Tensor, numbers: Iterable[int]) -> None:
            with _AllChosen():
                block.forward(tokens[None])

        return Experts(block, _frozen(numbers), False, again)
    names = ", ".join(argument.name for argument in arguments)
    raise _unknown(owner, f"has the arguments {names}")


def _listed(name: str, layer: nn.Module, owner: str, numbers: Mapping[int, set[Matrix]]) -> Experts:
    modules: Any = _inner(name, layer, owner)

    def run(tokens: Tensor, numbers: Iterable[int]) -> None:
        for number in numbers:
            modules[number](tokens)

    host = _inner(name, layer, owner.rpartition(".")[0])
    return Experts(host, _frozen(numbers), True, run, tuple(modules[n] for n in sorted(numbers)))


def _unknown(experts: str, what: str) -> InputError:
    return InputError(
        f"not all tokens can be passed through `{experts}`: it {what}",
        where="calibration.all_tokens",
        fix="set calibration.all_tokens to false",
    )


class _AllChosen(TorchFunctionMode):
    """Within it a router that takes the best of its experts takes all of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "topk":
            x = kwargs.pop("input", args[0] if args else None)
            dim = kwargs.pop("dim", args[2] if len(args) > 2 else -1)
            kwargs.pop("k", None)
            return func(x, x.shape[dim], dim, *args[3:], **kwargs)
        return func(*args, **kwargs)


@contextmanager
def before_experts(
    experts: Iterable[Experts],
    show: Callable[[Experts, Tensor], None],
    check: Callable[[Experts, Tensor], None],
) -> Iterator[None]:
    """While it is open, `show` is given the tokens [n, k] of experts before they run on their own, and
    `check` the rows [m, k] that single experts are given."""

    def hook(block: Experts, see: Callable[[Experts, Tensor], None]) -> Any:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            tokens = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            see(block, tokens.reshape(-1, tokens.shape[-1]))

        return before

    hooks = [(block.host, hook(block, show)) for block in experts]
    hooks += [(module, hook(block, check)) for block in experts for module in block.alone]
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module, before in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def must_be_rows(experts: Experts, rows: Tensor, tokens: Tensor) -> None:
    """InputError if single experts are given other rows than those that all of them were shown."""
    if len(rows) and not bool((tokens == rows[0]).all(1).any()):
        names = min(experts.parameters)
        raise _unknown(names, "reads other values than the block around the experts")
