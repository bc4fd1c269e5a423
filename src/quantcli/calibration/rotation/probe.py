"""A model with random weights, of which a layer at a time is in memory, and a few tokens for it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.calibration.channels import shape_of
from quantcli.calibration.flow import is_norm
from quantcli.calibration.replay.calls import NOTHING_CARRIED, Call, Carry, Outline
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.core.errors import InputError, QuantError

ROWS = 256  # of a table that are made: ids of tokens and positions stay below
_LENGTH = 24  # tokens of the probe
Change = Callable[[str, Tensor], Tensor]  # gives a parameter [..] with another value


def unchanged(_: str, parameter: Tensor) -> Tensor:
    """The parameter itself."""
    return parameter


@dataclass
class Probe:
    """A model's own forward, and its layers, with random weights."""

    skeleton: Skeleton
    seed: int = 0
    hidden: int = 0  # channels of the hidden states, as `begin` has shown
    used: set[str] = field(default_factory=set)  # parameters outside of the layers that were used

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = min(ROWS, self._rows(self.skeleton.embedding))
        self._ids = torch.randint(0, vocabulary, (2, _LENGTH), generator=generator)
        modules = [layer for _, layer in self.skeleton.layers]
        self._outline = Outline(modules, self.skeleton.head)
        for module in self.skeleton.model.modules():  # the plain way to multiply with experts
            config: Any = getattr(module, "config", None)
            if getattr(config, "_experts_implementation", None) is not None:
                config._experts_implementation = "eager"

    def _rows(self, table: nn.Module | None) -> int:
        weight = None if table is None else table._parameters.get("weight")
        return ROWS if weight is None else len(weight)

    @property
    def tokens(self) -> tuple[int, int]:
        """Samples, and tokens of each."""
        return tuple(self._ids.shape)  # type: ignore[return-value]

    def states(self, index: int, hidden: int) -> Tensor:
        """Random hidden states [samples, tokens, h] for a layer, by its index."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + index + 1)
        return torch.randn(*self._ids.shape, hidden, generator=generator)

    def begin(self, change: Change = unchanged, seen: Any = None) -> tuple[Tensor, list[Call]]:
        """The hidden states that the first layer is given, and how layers are called."""
        with self._outside(change, seen):
            noted = self._outline.note(self._forward)
        if noted is None:
            raise InputError(
                f"the layers of `{type(self.skeleton.model).__name__}` do not pass hidden states on as "
                "they come, so that what is done to them cannot be followed",
                where=str(self.skeleton.checkpoint.path),
                fix="leave `rotate` out",
            )
        self.hidden = noted[0].shape[-1]
        return noted

    def end(self, final: Tensor, change: Change = unchanged, seen: Any = None) -> Tensor:
        """What the model puts out for the hidden states that its last layer gives."""
        with self._outside(change, seen), self._outline.ending(final):
            out = self._forward()
        result: Tensor = out.logits if hasattr(out, "logits") else out[0]
        return result

    def _forward(self) -> Any:
        model: Any = (
            self.skeleton.model if self.skeleton.head_stored else self.skeleton.model.base_model
        )
        inputs: dict[str, Any] = {"input_ids": self._ids, "attention_mask": None}
        taken = signature(model.forward).parameters.values()
        if any(p.name == "use_cache" or p.kind is p.VAR_KEYWORD for p in taken):
            inputs["use_cache"] = False
        with torch.no_grad():
            return model(**inputs)

    @contextmanager
    def _outside(self, change: Change, seen: Any) -> Iterator[None]:
        """Within it modules outside of the layers get weights when they are first called."""
        skeleton = self.skeleton
        with ExitStack() as stack:
            for path, module in skeleton.model.named_modules():
                if skeleton.in_stack(f"{path}."):
                    continue
                own = _own(module)
                if not own:
                    continue

                def load(module: nn.Module, path: str = path, own: Any = own) -> None:
                    for local, parameter in own.items():
                        if id(module._parameters[local]) != id(parameter):
                            continue  # it was called before
                        name = f"{path}.{local}".strip(".")
                        value = change(name, self._draw(self._name_of(name), module, local, parameter))
                        if seen is not None:
                            seen.know({name: value})
                        stack.callback(module._parameters.__setitem__, local, parameter)
                        module._parameters[local] = nn.Parameter(value, requires_grad=False)

                def called(
                    module: nn.Module, _: Any, path: str = path, own: Any = own, load: Any = load
                ) -> None:
                    self.used |= {f"{path}.{local}".strip(".") for local in own}
                    load(module)

                stack.callback(module.register_forward_pre_hook(called, prepend=True).remove)
                if isinstance(module, nn.Embedding):  # models move ids to the device of their table
                    load(module)
                    stack.callback(setattr, module, "padding_idx", module.padding_idx)
                    module.padding_idx = None
            yield

    def _name_of(self, parameter: str) -> str:
        """The name by which a parameter is drawn: that of a tied one is the same."""
        group = self.skeleton.outside(parameter)
        return parameter if group is None else group.target

    @contextmanager
    def layer(self, index: int, change: Change = unchanged, seen: Any = None) -> Iterator[nn.Module]:
        """A layer with random weights. Experts have the weights of the first one, and its memory."""
        name, layer = self.skeleton.layers[index]
        transposed = self.skeleton.transposed(index)
        shared: dict[tuple[str, torch.Size], Tensor] = {}
        before: list[tuple[nn.Module, str, Any]] = []
        try:
            for path, module in layer.named_modules():
                for local, parameter in _own(module).items():
                    full = f"{name}.{path}.{local}".replace("..", ".")
                    key = shape_of(full), parameter.shape
                    if key not in shared:
                        drawn = self._draw(
                            key[0], module, local, parameter, transposed=full in transposed
                        )
                        shared[key] = nn.Parameter(change(full, drawn), requires_grad=False)
                        if seen is not None:
                            seen.know({full: shared[key]})
                    before.append((module, local, parameter))
                    module._parameters[local] = shared[key]
            yield layer
        finally:
            for module, local, parameter in reversed(before):
                module._parameters[local] = parameter

    def run(
        self, index: int, call: Call, layer: nn.Module, hidden: Tensor, carry: Carry = NOTHING_CARRIED
    ) -> tuple[Tensor, Carry]:
        """The outputs of a layer, and what is carried on. InputError if it fails."""
        try:
            with torch.no_grad():
                return call.run(layer, hidden, carry)
        except QuantError:
            raise
        except Exception as error:  # code of the library, or of the model
            message = " ".join(str(error).split())[:200]
            raise InputError(
                f"`{self.skeleton.layers[index][0]}` fails on random weights: {type(error).__name__}: "
                f"{message}",
                where=str(self.skeleton.checkpoint.path),
                fix="leave `rotate` out",
            ) from error

    def _draw(
        self, name: str, module: nn.Module, local: str, parameter: Tensor, *, transposed: bool = False
    ) -> Tensor:
        """Random numbers, float32, for a parameter: norms are near 1, matrices keep the size of their
        input. Of a table only ROWS rows; of a stack [e, ..] one matrix, which stands for all."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        shape = list(parameter.shape)
        if isinstance(module, nn.Embedding) or self._is_head(module):
            shape[0] = min(shape[0], ROWS)
        if len(shape) == 3 and isinstance(module, nn.modules.conv._ConvNd):
            return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
        if len(shape) == 3:
            width = shape[1 if transposed else 2]
            one = torch.randn(shape[1:], generator=generator) / math.sqrt(width)
            return one.expand(shape)
        drawn = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return 1 + 0.3 * drawn if is_norm(module) and local == "weight" else 0.1 * drawn
        return drawn if isinstance(module, nn.Embedding) else drawn / math.sqrt(max(1, shape[-1]))

    def value(self, name: str) -> Tensor:
        """The random numbers of a parameter of the model, by its name."""
        path, _, local = name.rpartition(".")
        module = self.skeleton.model.get_submodule(path)
        key = shape_of(name) if self.skeleton.in_stack(name) else self._name_of(name)
        return self._draw(key, module, local, module.get_parameter(local))

    def _is_head(self, module: nn.Module) -> bool:
        return any(module is head for head in self.skeleton.head)


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module has itself."""
    return {name: p for name, p in module._parameters.items() if p is not None}
