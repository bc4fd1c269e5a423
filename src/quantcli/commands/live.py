"""A transformers model in memory as a checkpoint, without a copy of its weights.

The checkpoint is the one that `save_pretrained` would write: the same names, shapes, order and
`config.json`. Its weight file has a header and no data; rows are read from the model's own parameters.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quantcli.calibration.sets.identity import content_digest
from quantcli.calibration.text.documents import sentence
from quantcli.calibration.text.tokenizer import quiet
from quantcli.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quantcli.checkpoint.header import StoredTensor, encode_header
from quantcli.checkpoint.memory import MemoryFile, Span
from quantcli.checkpoint.spec import DTYPES, TensorSpec, safetensors_dtype, torch_dtype
from quantcli.core.disk import disk_errors
from quantcli.core.errors import InputError

if TYPE_CHECKING:
    from quantcli.core.events import Progress

_WEIGHTS = "model.safetensors"
_FOLDER_FIX = "save the model with save_pretrained, and give the folder"
_CONVERTED = 2  # groups of converted tensors that are kept for the next rows


def live_checkpoint(model: Any, tokenizer: Any, progress: Progress) -> Checkpoint:
    """The checkpoint that `model.save_pretrained` and `tokenizer.save_pretrained` would write.

    The model stays as it is. Do not change it while the checkpoint is in use. Raises InputError for
    what is not a transformers model, and for one whose weights are quantized, sharded or not all in
    memory.
    """
    _check(model)
    name = type(model).__name__
    progress.say(f"reading {name} from memory")
    if tokenizer is None:
        progress.say(
            "no `tokenizer` was given: the output has none, and text for a calibration needs one"
        )
    parent = Path(tempfile.mkdtemp(prefix="quantcli-"))
    try:
        folder = parent.resolve() / name
        folder.mkdir()
        with quiet():
            saved = _saved(model)
            _write_files(folder, model, tokenizer)
        checkpoint = _checkpoint(folder, saved, _Folder(parent))
    except BaseException:
        shutil.rmtree(parent, ignore_errors=True)
        raise
    return checkpoint


class _Folder:
    """A temporary folder, which is deleted when nobody refers to this any more."""

    def __init__(self, path: Path) -> None:
        weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)


def _check(model: Any) -> None:
    """InputError for a model that cannot be read."""
    from transformers import PreTrainedModel

    kind = type(model).__name__
    where = f"model: {kind}"
    wrapped = hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False)
    if wrapped:
        fix = "merge the adapter first: model = model.merge_and_unload()"
        raise InputError("the model has an adapter", where=where, fix=fix)
    if not isinstance(model, PreTrainedModel):
        fix = "give a folder, a Hub id, or a model of the class PreTrainedModel"
        raise InputError(f"`model` is a {kind}, not a transformers model", where=where, fix=fix)
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        fix = "load the float model, or give the folder of the quantized one"
        raise InputError("the model in memory is quantized", where=where, fix=fix)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor) or type(tensor) not in {Tensor, nn.Parameter}:
            fix = f"gather the weights first; or {_FOLDER_FIX}"
            what = f"`{name}` is a {type(tensor).__name__}: its values are not in one place"
            raise InputError(what, where=where, fix=fix)
        if tensor.device.type == "meta":
            fix = "load the model without offloading, such as device_map='cpu'"
            raise InputError(f"`{name}` is not in memory", where=where, fix=fix)
        if tensor.layout is not torch.strided or safetensors_dtype(tensor.dtype) not in DTYPES:
            what = f"`{name}` is {tensor.dtype}, {tensor.layout}: safetensors cannot hold it"
            raise InputError(what, where=where, fix="convert it to a float dtype")


# -- files


def _write_files(folder: Path, model: Any, tokenizer: Any) -> None:
    """config.json and all other files that the library writes next to the weights."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    try:
        if model.is_remote_code():
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # what the library does not like about a config
        what = f"transformers cannot write the model's files: {sentence(error)}"
        raise InputError(what, where=f"model: {type(model).__name__}") from None


def _checkpoint(folder: Path, saved: Mapping[str, _Saved], kept: _Folder) -> Checkpoint:
    """The checkpoint in `folder`, whose weights are `saved`."""
    specs = [
        TensorSpec(name, safetensors_dtype(tensor.dtype), tuple(tensor.shape))
        for name, tensor in saved.items()
    ]
    specs = _in_order(specs)
    header = encode_header(specs)
    spans, position = [], len(header)
    for spec in specs:
        spans.append(Span(position, position + spec.nbytes, saved[spec.name].values))
        position += spec.nbytes
    path = folder / _WEIGHTS
    with disk_errors(path), path.open("wb") as file:
        file.write(header)
        file.truncate(position)  # a hole
    opened = open_checkpoint(folder)
    weights = MemoryFile.of(opened.path / _WEIGHTS, spans, kept)
    tensors = {
        name: StoredTensor(stored.spec, weights, stored.offset)
        for name, stored in opened.tensors.items()
    }
    checkpoint = replace(opened, tensors=tensors, in_memory=True)
    # An interrupted run continues if no file has another time: with other weights it has.
    number = int(content_digest(checkpoint)[:15], 16)
    for name in checkpoint.stamps:
        os.utime(folder / name, ns=(number, number))
    return replace(checkpoint, stamps=open_checkpoint(folder).stamps)


def _in_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Tensors in the order of the library's own writer, which is shown empty tensors."""
    from safetensors.torch import save

    by_name = {spec.name: spec for spec in specs}
    empty = {name: torch.empty(0, dtype=torch_dtype(spec.dtype)) for name, spec in by_name.items()}
    content = save(empty)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [by_name[name] for name in header if name in by_name]


# -- weights as they are saved


@dataclass(frozen=True)
class _Saved:
    """A tensor as it would be saved. values: gives it."""

    shape: torch.Size
    dtype: torch.dtype
    values: Callable[[], Tensor]


def _saved(model: Any) -> dict[str, _Saved]:
    """The tensors that `save_pretrained` would write, by name."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    where = f"model: {type(model).__name__}"
    try:
        state = remove_tied_weights_from_state_dict(state, model)
    except RuntimeError as error:
        what = f"weights share memory in a way that cannot be saved: {sentence(error)}"
        raise InputError(what, where=where, fix="give each parameter its own memory") from None
    try:
        try:
            return _converted(model, state, views=True)
        except (RuntimeError, ValueError):  # an operation needs contiguous tensors
            return _converted(model, state, views=False)
    except Exception as error:  # conversions of the library, which may not be reversible
        what = f"transformers cannot bring the weights into the form of a checkpoint: {sentence(error)}"
        raise InputError(what, where=where, fix=_FOLDER_FIX) from None


def _converted(model: Any, state: Mapping[str, Tensor], *, views: bool) -> dict[str, _Saved]:
    """The state as the library converts it for saving: experts apart, old names.

    The conversion runs once on tensors without data, and is watched. What comes out as a view of a
    parameter is read from that parameter; the rest is computed when it is read. views: leave out copies
    that only make tensors contiguous.
    """
    from transformers.core_model_loading import revert_weight_conversion

    origins = _Origins(views)
    stand_ins = {
        name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        for name, tensor in state.items()
    }
    for name, tensor in stand_ins.items():
        origins.add([tensor], frozenset({name}))
    with origins:
        saved = revert_weight_conversion(model, dict(stand_ins))
    whole = {_storage(tensor): name for name, tensor in stand_ins.items()}
    groups = _Groups(model, state, views)
    found = {}
    for name, tensor in saved.items():
        parameter = whole.get(_storage(tensor))
        if parameter is not None:
            view = _view(state[parameter], tensor)
            found[name] = _Saved(tensor.shape, tensor.dtype, partial(_itself, view))
        else:
            values = groups.reader(name, origins.of(tensor))
            found[name] = _Saved(tensor.shape, tensor.dtype, values)
    return found


def _view(parameter: Tensor, stand_in: Tensor) -> Tensor:
    """The view of a parameter that `stand_in` is of its stand-in."""
    offset = parameter.storage_offset() + stand_in.storage_offset()
    return parameter.detach().as_strided(stand_in.shape, stand_in.stride(), offset)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


class _Origins(TorchFunctionMode):
    """Notes for each storage from which tensors its values come."""

    def __init__(self, views: bool) -> None:
        super().__init__()
        self._views = views
        self._names: dict[int, frozenset[str]] = {}
        self._alive: list[Tensor] = []  # or another tensor could get the storage's address

    def add(self, tensors: Iterable[Tensor], names: frozenset[str]) -> None:
        """Note tensors; those that share a known storage stay what they are."""
        for tensor in tensors:
            self._alive.append(tensor)
            self._names.setdefault(_storage(tensor), names)

    def of(self, tensor: Tensor) -> frozenset[str]:
        """The names of the tensors that a tensor is made of."""
        return self._names[_storage(tensor)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._views and func is Tensor.contiguous:
            return args[0]
        given = kwargs or {}
        result = func(*args, **given)
        made_of = [self.of(t) for t in _tensors([args, given]) if _storage(t) in self._names]
        self.add(_tensors(result), frozenset().union(*made_of))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


@dataclass
class _Groups:
    """Tensors that are computed from several parameters, a group at a time."""

    model: Any
    state: Mapping[str, Tensor]
    views: bool
    _kept: OrderedDict[frozenset[str], dict[str, Tensor]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reader(self, name: str, parameters: frozenset[str]) -> Callable[[], Tensor]:
        """A function that gives the tensor `name`, which is made of `parameters`."""
        return lambda: self._values(parameters)[name]

    def _values(self, parameters: frozenset[str]) -> dict[str, Tensor]:
        """All that is made of some parameters; the last few groups are kept."""
        from transformers.core_model_loading import revert_weight_conversion

        with self._lock:
            if parameters not in self._kept:
                some = {name: self.state[name].detach() for name in sorted(parameters)}
                with torch.no_grad(), _Origins(self.views):
                    self._kept[parameters] = revert_weight_conversion(self.model, some)
                while len(self._kept) > _CONVERTED:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(parameters)
            return self._kept[parameters]
