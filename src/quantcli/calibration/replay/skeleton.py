"""A model without its weights: built from config.json, filled one part at a time from the checkpoint.

transformers builds the modules and converts stored tensors to parameters (it keeps experts fused that
files hold one by one); nothing here knows an architecture. Stacks that the planner or a conversion took
apart are put together first, as transformers knows them by the names on disk.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.calibration.replay.library import build_model, conversions, part_of
from quantcli.calibration.replay.next_token import library_names
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.head import generates
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import torch_dtype
from quantcli.core.errors import InputError
from quantcli.planning.reach import NextTokenLayer
from quantcli.sources.stacked import MergedExperts, merged_experts

Read = Callable[[StoredTensor], Tensor]  # a stored tensor's values, edited as the caller likes


NO_DATA = "use schemes that need no data, such as w8a8_dynamic"


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of a matrix that are one weight of the checkpoint."""

    start: int
    stop: int
    module: str  # of the checkpoint, without ".weight"


# by parameter: for each expert its segments, in order
Segments = Mapping[str, list[list[Segment]]]


Source = StoredTensor | MergedExperts  # a tensor with a name that the library knows


@dataclass
class Group:
    """Source tensors that one conversion of the library turns into one or more parameters."""

    target: str  # the first parameter's name
    converter: Any  # the library's WeightConverter; None if a tensor is only renamed
    sources: list[tuple[str, str, Source]] = field(default_factory=list)  # (name, pattern, tensor)

    @property
    def stored(self) -> list[StoredTensor]:
        """All stored tensors."""
        return [
            stored
            for _, _, source in self.sources
            for stored in (source.matrices if isinstance(source, MergedExperts) else (source,))
        ]

    @property
    def renamed(self) -> StoredTensor | None:
        """The stored tensor that the parameter is, but for its name; None if it is made of more."""
        source = self.sources[0][2]
        return source if self.converter is None and isinstance(source, StoredTensor) else None

    def convert(self, read: Read, model: Any) -> dict[str, Tensor]:
        """Parameters by name, from the tensors that `read` gives."""

        def value(source: Source) -> Tensor:
            if isinstance(source, MergedExperts):
                return source.stack.merge([read(matrix) for matrix in source.matrices])
            return read(source)

        if self.converter is None:
            return {self.target: value(self.sources[0][2])}
        converter = copy.deepcopy(self.converter)
        if any(isinstance(source, MergedExperts) for _, _, source in self.sources):
            _turn_over(converter)
        for name, pattern, source in self.sources:
            converter.add_tensor(self.target, name, pattern, lambda s=source: value(s))
        converted = converter.convert(self.target, model=model, config=model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in converted.items()}


def _turn_over(converter: Any) -> None:
    """Let a converter transpose in any case: merged stacks have the published layout, and the library
    would tell it by sides, which may be equal."""
    for operation in converter.operations:
        if getattr(operation, "check_dims", False):
            operation.check_dims = False


class Skeleton:
    """The modules of a model, their parameters on the meta device, and their sources.

    layers: of the decoder stack, (name, module) in order; before it of an encoder's, if there is one.
    stacks: the layers of each stack, by their places in `layers`.
    unused: stored tensors that the model has no parameter for, such as draft layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        *,
        trust_remote_code: bool,
        next_token: NextTokenLayer | None = None,
    ) -> None:
        """dtype: safetensors name of the dtype to compute in. next_token: a layer that is to be a stack
        of its own, behind the decoder's.

        Raises InputError if transformers cannot build the model, no decoder stack is found, or a
        parameter of a decoder layer has no stored tensor.
        """
        self.checkpoint = checkpoint
        self.dtype = torch_dtype(dtype)
        self.next_token = next_token
        self.model = build_model(
            checkpoint,
            self.dtype,
            trust_remote_code=trust_remote_code,
            next_token=next_token is not None,
        )
        stacks = _stacks(self.model, checkpoint)
        if next_token is not None:
            stacks[-1:] = [stacks[-1][:-1], stacks[-1][-1:]]
        self.layers = [layer for stack in stacks for layer in stack]
        ends = list(accumulate(map(len, stacks)))
        self.stacks = [range(end - len(stack), end) for end, stack in zip(ends, stacks, strict=True)]
        self._groups, self.unused = self._map()
        self._dtype_of = self._dtypes()
        self._segments: dict[int, dict[str, list[list[Segment]]]] = {}
        self._transposed: set[str] = set()
        self._check()

    def _map(self) -> tuple[dict[int, list[Group]], list[str]]:
        """Every stored tensor's group, by the index of its layer; -1 for those outside of the stack."""
        sources: dict[str, Source] = dict(self.checkpoint.tensors)
        for merged in merged_experts(self.checkpoint):
            for stored in merged.matrices:
                del sources[stored.spec.name]
            sources[merged.name] = merged
        part = part_of(self.checkpoint)
        if part is not None:
            sources = {name.removeprefix(part[2]): source for name, source in sources.items()}
        if self.next_token is not None:
            number = self.stacks[-1].start
            renamed = library_names(self.checkpoint, self.next_token, sources, number)
            sources = {renamed.get(name, name): source for name, source in sources.items()}
        groups: dict[int, list[Group]] = defaultdict(list)
        by_label: dict[str, Group] = {}
        unused = []
        for name, target, pattern, converter in conversions(self.model, sources):
            if target is None:
                unused.append(name)
                continue
            if target not in by_label:
                by_label[target] = Group(target, converter)
                groups[self._owner(target)].append(by_label[target])
            by_label[target].sources.append((name, pattern or name, sources[name]))
        return groups, unused

    def _owner(self, parameter: str) -> int:
        for path, first in self._lists.items():
            if parameter.startswith(path):
                return first + int(parameter.removeprefix(path).partition(".")[0])
        return -1

    @cached_property
    def _lists(self) -> dict[str, int]:
        """The module list of each stack, with a dot, and the place of its first layer."""
        lists: dict[str, int] = {}
        for stack in self.stacks:
            lists.setdefault(self.layers[stack.start][0].rpartition(".")[0] + ".", stack.start)
        return lists

    def in_stack(self, path: str) -> bool:
        """Whether a module or a parameter is in a layer of a stack."""
        return any(path.startswith(name) for name in self._lists)

    @property
    def two_stacks(self) -> bool:
        """Whether an encoder's outputs go into the decoder."""
        return len(self.stacks) > 1 and self.next_token is None

    def _dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each parameter and buffer, as from_pretrained would make it."""
        return {name: tensor.dtype for name, tensor in self.model.state_dict().items()}

    def _check(self) -> None:
        for index, (name, layer) in enumerate(self.layers):
            have = {parameter for _, labels in self._labels(index) for parameter in labels}
            for local, _ in layer.named_parameters():
                if f"{name}.{local}" not in have:
                    raise InputError(
                        f"the model has no tensor for parameter `{name}.{local}`",
                        where=str(self.checkpoint.path),
                        fix="config.json and the weights disagree: fetch the whole model again",
                    )

    def _labels(self, index: int) -> Iterator[tuple[Group, dict[str, Tensor]]]:
        """Each group of a layer converted from tensors that hold, instead of values, their place in
        the group's sources. One column is enough: rows tell where they come from."""
        for group in self._groups[index]:
            places = {stored.spec.name: n for n, stored in enumerate(group.stored)}

            def column(stored: StoredTensor, places: Mapping[str, int] = places) -> Tensor:
                shape = stored.spec.shape
                thin = (*shape[:-1], 1) if len(shape) > 1 else shape
                return torch.full(thin, places[stored.spec.name], dtype=torch.int32)

            yield group, group.convert(column, self.model)

    def segments(self, index: int) -> dict[str, list[list[Segment]]]:
        """The stored weights in the rows of every matrix parameter of a layer, by its name.

        One list of segments for a matrix [n, k]; one per expert if experts are fused [e, n, k].
        """
        if index not in self._segments:
            self._segments[index] = self._find_segments(index)
        return self._segments[index]

    def transposed(self, index: int) -> frozenset[str]:
        """Names of a layer's parameters with `segments` that are [e, k, n]."""
        return frozenset(self._transposed.intersection(self.segments(index)))

    def _find_segments(self, index: int) -> dict[str, list[list[Segment]]]:
        segments: dict[str, list[list[Segment]]] = {}
        for group, parts in self._labels(index):
            modules = [stored.spec.name.removesuffix(".weight") for stored in group.stored]
            for parameter, labels in parts.items():
                fused = labels.dim() == 3 and group.renamed is None
                if fused and labels.shape[-1] > 1 and labels.shape[-2] == 1:
                    self._transposed.add(parameter)
                    labels = labels.transpose(-2, -1)
                if labels.dim() != 2 + fused or labels.shape[-1] != 1:
                    continue  # a vector, a convolution, or stored transposed
                rows = labels.reshape(-1, labels.shape[-2])
                segments[parameter] = [_runs(expert, modules) for expert in rows]
        return segments

    @property
    def head(self) -> list[nn.Module]:
        """The module that makes logits of hidden states, if the model has one."""
        head = self._given("get_output_embeddings")
        return [] if head is None else [head]

    @property
    def embedding(self) -> nn.Module | None:
        """The table of tokens, if the model's code says which it is."""
        return self._given("get_input_embeddings")

    def _given(self, method: str) -> nn.Module | None:
        try:
            module = getattr(self.model, method)()
        except (AttributeError, NotImplementedError):  # a model's own code may not define it
            return None
        return module if isinstance(module, nn.Module) else None

    @property
    def predicts_text(self) -> bool:
        """Whether the model puts out logits of tokens that follow, and has a head for them."""
        return self.head_stored and bool(self.head) and generates(self.checkpoint)

    @property
    def head_stored(self) -> bool:
        """Whether the head has tensors in the checkpoint, if there is one. A model of a class that the
        library does not know, such as a reward model, may be built as one with another head."""
        return all(
            self.outside(name) is not None
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if any(parameter is its for module in self.head for its in module.parameters())
        )

    @property
    def start_token(self) -> int:
        """The token that a decoder is given before the first one of a text."""
        config = self.model.config
        named = (getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad"))
        return next((token for token in named if isinstance(token, int)), 0)

    def source(self, parameter: str) -> str | None:
        """The stored tensor that a parameter is, but for its name; None if it is made of more."""
        for group in self._groups[self._owner(parameter)]:
            if group.target == parameter and group.renamed is not None:
                return group.renamed.spec.name
        return None

    def nbytes(self, index: int) -> int:
        """Bytes of a layer's parameters."""
        return sum(p.numel() * p.element_size() for p in self.layers[index][1].parameters())

    def converts(self, index: int) -> bool:
        """Whether a layer's parameters are more than stored tensors by other names."""
        return any(group.renamed is None for group in self._groups[index])

    @contextmanager
    def loaded(self, index: int, read: Read, device: torch.device) -> Iterator[nn.Module]:
        """A layer with its weights, read from the checkpoint; they are dropped at the end."""
        with self._filled(self._groups[index], read, device):
            yield self.layers[index][1]

    def move_buffers(self, device: torch.device) -> None:
        """Put the buffers of all modules, such as rotary frequencies, on a device."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(device)

    @contextmanager
    def filled(self, parameters: list[str], read: Read, device: torch.device) -> Iterator[None]:
        """Some parameters from outside of the stack, with their values."""
        groups = {id(g): g for name in parameters if (g := self.outside(name)) is not None}
        with self._filled(list(groups.values()), read, device, parameters):
            yield

    @contextmanager
    def _filled(
        self,
        groups: list[Group],
        read: Read,
        device: torch.device,
        parameters: list[str] | None = None,
    ) -> Iterator[None]:
        before: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for group in groups:
                filled = group.convert(read, self.model)
                names = (
                    [] if parameters is None else [n for n in parameters if self.outside(n) is group]
                )
                if names and not filled.keys() & set(names):  # tied: by another name
                    filled = dict(zip(names, filled.values(), strict=True))
                for name, tensor in filled.items():
                    path, _, local = name.rpartition(".")
                    module = self.model.get_submodule(path)
                    before.append((module, local, getattr(module, local)))
                    _put(module, local, tensor.to(device, self._dtype_of[name]))
            yield
        finally:
            for module, local, tensor in reversed(before):
                _put(module, local, tensor)

    def outside(self, parameter: str) -> Group | None:
        """The group of a parameter outside of the stack."""
        return self._outside.get(parameter)

    @cached_property
    def _outside(self) -> dict[str, Group]:
        groups = {group.target: group for group in self._groups[-1]}
        for names in _tied(self.model):  # an lm_head without a tensor of its own
            stored = next((groups[name] for name in names if name in groups), None)
            if stored is not None:
                groups.update({name: stored for name in names if name not in groups})
        return groups


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = tensor
    else:
        kept = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        module._parameters[name] = kept


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one object."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _runs(labels: Tensor, modules: list[str]) -> list[Segment]:
    segments = []
    start = 0
    values, counts = torch.unique_consecutive(labels, return_counts=True)
    for label, count in zip(values.tolist(), counts.tolist(), strict=True):
        segments.append(Segment(start, start + count, modules[label]))
        start += count
    return segments


def _stacks(model: Any, checkpoint: Checkpoint) -> list[list[tuple[str, nn.Module]]]:
    """The stacks of layers that text goes through: a decoder's, and before it that of an encoder."""
    where = str(checkpoint.path / "config.json")
    if model.main_input_name != "input_ids":
        raise InputError(
            f"`{type(model).__name__}` takes `{model.main_input_name}`, and cannot be run on text",
            where=where,
            fix=f"{NO_DATA}, and verify without --run",
        )
    parts = [model.get_decoder() if hasattr(model, "get_decoder") else model]
    if model.config.is_encoder_decoder and hasattr(model, "get_encoder"):
        parts.insert(0, model.get_encoder())
    stacks = [_layers_of(model, part) or _layers_of(model, model.base_model) for part in parts]
    if not all(stacks):
        raise InputError(f"no stack of layers in `{type(model).__name__}`", where=where, fix=NO_DATA)
    return stacks


def _layers_of(model: Any, part: Any) -> list[tuple[str, nn.Module]]:
    """The stack of a part of a model: of the module lists in it that are in no other, the one with the
    most parameters. Towers of multimodal models have stacks too; `get_decoder` leaves them out."""
    inside = {id(module) for module in part.modules()} if isinstance(part, nn.Module) else set()
    best: tuple[int, str, Any] = (0, "", [])
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or id(module) not in inside:
            continue
        if any(name.startswith(f"{other}.") for other in outer):
            continue
        outer.append(name)
        size = sum(parameter.numel() for parameter in module.parameters())
        best = max(best, (size, name, module), key=lambda entry: entry[0])
    return [(f"{best[1]}.{index}", layer) for index, layer in enumerate(best[2])]
