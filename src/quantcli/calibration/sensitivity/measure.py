"""A measurement on disk, which an interrupted run continues; and the estimate without a text.

sensitivity.json           the key: model, text, schemes; written first
sensitivity-00003.json     a layer: by module, the KL of each scheme
*states-00003.safetensors  hidden states and gradients; only while a measurement is under way
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantcli.calibration.replay.devices import open_device
from quantcli.calibration.sensitivity.arithmetic import Only, quantizer_of
from quantcli.calibration.sensitivity.passes import Errors, FloatModel
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.tensors import read_tensor
from quantcli.core.disk import disk_errors, lock, write_file
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.place import check_ancestor
from quantcli.core.untrusted.tables import read_table
from quantcli.planning.budget.units import Option

HEAD = "sensitivity.json"
_DAMAGED = "delete the file: the layer is measured again"
_LAYERS, _STATES = "sensitivity-*.json", "*states-*"


@dataclass(frozen=True)
class Measuring:
    """How to measure.

    key:    of all that decides the numbers; numbers under another key are deleted.
    folder: where they are kept.
    only:   what of a module is quantized; None: weights and inputs.
    """

    key: str
    folder: Path
    workers: int
    only: Only = None
    trust_remote_code: bool = False


def measure(
    options: Sequence[Option], batches: Sequence[Batch], how: Measuring, progress: Progress
) -> Errors:
    """The KL that each module makes under each option, in nats per token. Modules that no token
    reaches, or that are outside of the layers, are missing.

    InputError if the folder holds something else, and for a model that does not predict text.
    """
    _begin(how, progress)
    with disk_errors(how.folder), _locked(how.folder):
        model = FloatModel(
            options[0].plan.checkpoint,
            batches,
            how.folder,
            workers=how.workers,
            progress=progress,
            trust_remote_code=how.trust_remote_code,
        )
        errors: Errors = {}
        found = [_stored(how.folder, index, len(options)) for index in range(model.layers)]
        for own in filter(None, found):
            errors |= own
        missing = [index for index, own in enumerate(found) if own is None]
        if missing:
            model.forward()
            _backward(model, max(missing), options, how, errors, progress)
        for file in how.folder.glob(_STATES):
            file.unlink()
    return dict(sorted(errors.items()))


def _backward(
    model: FloatModel,
    last: int,
    options: Sequence[Option],
    how: Measuring,
    errors: Errors,
    progress: Progress,
) -> None:
    """Measure layers from `last` down to the first."""
    if last == model.layers - 1 or not model.continue_backward(last):
        last = model.layers - 1
        model.begin_backward()
    progress.begin_layers(model.layers, model.layers - 1 - last, model.tokens)
    for index in range(last, -1, -1):
        name = model.skeleton.layers[index][0]
        progress.begin_layer(name, model.layers - 1 - index, passes=3 + len(options))
        quantizers = [quantizer_of(o.items, o.plan.target, how.only) for o in options]
        own = model.layer(index, quantizers)
        errors |= own
        write_file(_path(how.folder, index), (json.dumps(own, indent=1) + "\n").encode())
        progress.layer(name, model.layers - 1 - index)
        progress.keeps(f"the layers from {name} on, in {how.folder}")


def _path(folder: Path, index: int) -> Path:
    return folder / f"sensitivity-{index:05d}.json"


def _stored(folder: Path, index: int, options: int) -> Errors | None:
    """What an earlier run has found for a layer; None if it is not there."""
    path = _path(folder, index)
    if not path.exists():
        return None
    table = read_table(path, fix=_DAMAGED)
    errors: Errors = {}
    for module in table:
        values = table.sequence(module)
        sound = all(isinstance(value, int | float) and 0 <= value < math.inf for value in values)
        if len(values) != options or not sound:
            what = "the file does not hold a measurement"
            raise InputError(what, where=str(path), fix=_DAMAGED)
        errors[module] = [float(value) for value in values]
    return errors


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """MachineError if another run measures here."""
    with (folder / HEAD).open("rb") as file:
        lock(file.fileno(), folder)
        yield


def check_folder(folder: Path, where: str) -> None:
    """InputError or MachineError for a folder that cannot hold a measurement. where: what names it."""
    check_ancestor(folder, fix="give another folder")
    if folder.is_dir() and not (folder / HEAD).is_file() and any(folder.iterdir()):
        fix = "name another folder, or delete this one"
        raise InputError("the folder is not a measurement", where=where, fix=fix)


def _begin(how: Measuring, progress: Progress) -> None:
    """Make the folder, or delete another measurement that is in it."""
    head = how.folder / HEAD
    content = (json.dumps({"key": how.key}) + "\n").encode()
    with disk_errors(how.folder):
        how.folder.mkdir(parents=True, exist_ok=True)
        if head.exists() and head.read_bytes() == content:
            return
        if head.exists():
            with _locked(how.folder):
                progress.say(f"{how.folder} holds another measurement: it is replaced")
                for file in [*how.folder.glob(_LAYERS), *how.folder.glob(_STATES)]:
                    file.unlink()
        write_file(head, content)


def estimate(options: Sequence[Option], progress: Progress) -> Errors:
    """For each module and option the squared error of its weight over its sum of squares: it stands for
    the error of outputs if nothing is known of inputs. Reads each weight once for each option."""
    open_device("cpu")
    modules = dict.fromkeys(module for option in options for module in option.items)
    tensors = options[0].plan.checkpoint.tensors
    quantizers = [quantizer_of(option.items, option.plan.target) for option in options]
    nbytes = sum(tensors[f"{module}.weight"].nbytes for module in modules)
    progress.begin(nbytes, 1)
    errors: Errors = {}
    for module in modules:
        stored = tensors[f"{module}.weight"]
        weight = read_tensor(stored)
        exact = weight.double()
        signal = float(exact.square().sum()) or 1.0
        errors[module] = []
        for option, quantizer in zip(options, quantizers, strict=True):
            error = 0.0
            if (item := option.items.get(module)) is not None:
                if item.scheme.numerics.transform or item.stats:
                    raise InputError(
                        f"`{item.scheme.name}` needs a text to be measured",
                        where=f"`{module}`",
                        fix="give calibration.data, or --data FILE",
                    )
                quantized = quantizer(module, weight, None)
                assert quantized is not None
                values = item.scheme.dequantize(quantized[1])[:, : weight.shape[1]]
                error = float((values.double() - exact).square().sum())
            errors[module].append(error / signal)
        progress.advance(stored.nbytes)
    return errors
