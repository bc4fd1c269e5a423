"""Options of the Python API by name: their types for type checkers, and their checks for everyone.

Names are those of the command line, with `_` for `-`.
"""

from __future__ import annotations

import functools
import inspect
import os
import reprlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import (
    Any,
    Protocol,
    TypedDict,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    overload,
    runtime_checkable,
)

from quantcli.core.disk import machine_error
from quantcli.core.errors import InputError, MachineError
from quantcli.verification.options import VerifyOptions

F = TypeVar("F", bound=Callable[..., Any])
PathLike = str | os.PathLike[str]


@runtime_checkable
class LiveModel(Protocol):
    """A transformers model in memory (PreTrainedModel)."""

    def state_dict(self) -> Mapping[str, Any]:
        """Its parameters and buffers by name."""


@runtime_checkable
class LiveTokenizer(Protocol):
    """A tokenizer or a processor of transformers."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write its files."""


_Assignments = str | Sequence[str] | Mapping[str, Any]


class Calibrating(TypedDict, total=False):
    """Options of what calibrates."""

    set: _Assignments
    data: PathLike | None
    workers: int | None
    fresh: bool
    executor: str
    device: str
    max_memory: int | str | None
    trust_remote_code: bool


class Planning(TypedDict, total=False):
    """Options of a plan."""

    set: _Assignments
    data: PathLike | None
    workers: int | None
    fresh: bool
    force: bool
    checksum: bool
    calibration: PathLike | None
    part: str | None
    executor: str
    sign: PathLike | None
    hash_model: bool
    for_: str | None
    trust_remote_code: bool


class Converting(Planning, total=False):
    """Options of a conversion, which may calibrate first."""

    device: str
    max_memory: int | str | None


class Reproducing(TypedDict, total=False):
    """Options of `reproduce`."""

    workers: int | None
    fresh: bool
    calibration: PathLike | None
    executor: str
    device: str
    max_memory: int | str | None
    trust_remote_code: bool


class Packing(TypedDict, total=False):
    """Options of `pack`."""

    set: _Assignments
    workers: int | None
    fresh: bool
    force: bool
    checksum: bool
    sign: PathLike | None
    hash_model: bool


class Verifying(TypedDict, total=False):
    """Options of `verify`: the fields of VerifyOptions."""

    identity: PathLike | None
    signer: str | None
    full: bool
    against: PathLike | None
    calibration: PathLike | None
    run: bool
    data: PathLike | Sequence[PathLike] | None
    samples: int
    length: int
    layer: str | Sequence[str] | None
    served: str | None
    tasks: PathLike | Sequence[PathLike] | None
    task_docs: int | None
    tp: str
    recipe: PathLike | None
    min_sqnr: float | None
    max_ppl_ratio: float | None
    max_kl: float | None
    baseline: PathLike | None
    not_worse: bool
    card: bool
    junit: PathLike | None
    report: PathLike | None
    workers: int | None
    executor: str
    trust_remote_code: bool


DEFAULTS: dict[str, Any] = {
    "set": (), "data": None, "workers": None, "fresh": False, "force": False, "checksum": True,
    "calibration": None, "part": None, "executor": "threads", "for_": None, "device": "cpu",
    "max_memory": None, "trust_remote_code": False, "sign": None, "hash_model": False,
}  # fmt: skip


def takes(options: type | None = None, defaults: Mapping[str, Any] = DEFAULTS) -> Callable[[F], F]:
    """Make a function one of the API.

    options: a TypedDict, whose keys the function takes as keywords; it is called with all of them.
    Values of a wrong type are InputErrors, and errors of the system are MachineErrors.
    """
    hints = {} if options is None else get_type_hints(options)

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        kind = inspect.Parameter.KEYWORD_ONLY
        keywords = [
            inspect.Parameter(name, kind, default=defaults[name], annotation=hint)
            for name, hint in hints.items()
        ]
        public = signature.replace(parameters=[*own, *keywords])
        types_of = functools.cache(lambda: {**get_type_hints(function), **hints})

        @functools.wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            bound = public.bind(*args, **given)  # TypeError for a keyword that does not exist
            for name, value in bound.arguments.items():
                if name in types_of():
                    check(name, value, types_of()[name])
            missing = {name: defaults[name] for name in hints if name not in given}
            with system_errors():
                return function(*args, **given, **missing)

        checked.__signature__ = public  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise an error of the system as a MachineError, as the command line reports it."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise MachineError(error.strerror or str(error)) from None
        raise machine_error(error, Path(error.filename)) from None


def check(name: str, value: Any, hint: Any) -> None:
    """InputError for a value that is not of a type."""
    kinds = get_args(hint) if get_origin(hint) in {Union, types.UnionType} else (hint,)
    plain = tuple(get_origin(kind) or kind for kind in kinds)
    is_flag = isinstance(value, bool) and bool not in plain
    numbers = (int, *plain) if float in plain else plain
    is_letters = isinstance(value, str) and Sequence in plain and str not in plain  # not a list
    if isinstance(value, numbers) and not is_flag and not is_letters:
        least, most = _LIMITS.get(name, (value, value))
        if not isinstance(value, int) or least <= value <= most:
            return
        fix = f"give a number from {least} to {most}"
        raise InputError(f"`{name}` is {value}", where=f"{name}={value}", fix=fix)
    named = [_NAMES.get(kind, kind.__name__) for kind in plain]
    words = " or ".join(dict.fromkeys(named))
    what = f"`{name}` is {reprlib.repr(value)}"
    raise InputError(what, where=f"{name}={reprlib.repr(value)}", fix=f"give {words}")


_LIMITS = {"workers": (1, 1024), "samples": (1, 2**20), "length": (2, 2**20),
           "task_docs": (1, 2**31)}  # fmt: skip
_NAMES = {
    bool: "True or False", int: "a whole number", float: "a number", str: "text", os.PathLike: "a path",
    type(None): "None", LiveModel: "a transformers model", LiveTokenizer: "a tokenizer",
    Iterable: "a list", Sequence: "a list", Mapping: "a mapping", Callable: "a function",
}  # fmt: skip


def path_of(value: PathLike | None) -> Path | None:
    """A path as the functions below the API take it."""
    return None if value is None else Path(value)


@overload
def place_of(value: PathLike) -> Path | str: ...


@overload
def place_of(value: PathLike | None) -> Path | str | None: ...


def place_of(value: PathLike | None) -> Path | str | None:
    """An output as the functions below the API take it: a URL stays text."""
    return value if isinstance(value, str) else path_of(value)


def assignments(values: _Assignments) -> tuple[str, ...]:
    """Values of `set` as KEY=VALUE, the values as YAML. InputError for one that is not text."""
    if isinstance(values, str):
        return (values,)
    if not isinstance(values, Mapping):
        for value in values:
            check("set", value, str)
        return tuple(values)
    from quantcli.core.untrusted.yaml_text import write_value

    try:
        return tuple(
            f"{key}={value if isinstance(value, str) else write_value(value)}"
            for key, value in values.items()
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"`set` has a value that YAML cannot hold: {error}", where="set=") from None


def verify_defaults() -> dict[str, Any]:
    """The options of `verify` as the command line names them, and their defaults."""
    return {_AS_TYPED.get(name, name): _DEFAULTS[name] for name in _FIELDS}


def verify_options(checkpoints: Sequence[PathLike], options: Mapping[str, Any]) -> VerifyOptions:
    """The options of `verify` as the functions below the API take them."""
    first, *others = map(str, checkpoints)
    named = {
        name: _as_field(name, options[_AS_TYPED.get(name, name)], hint)
        for name, hint in _FIELDS.items()
    }
    return VerifyOptions(first, tuple(others), **named)


def _as_field(name: str, value: Any, hint: Any) -> Any:
    """A path as a field has it: as Path or as text; one or several of them as a list of texts."""
    if list[str] in get_args(hint) and value is not None:
        several = [value] if isinstance(value, str | os.PathLike) else value
        for each in several:
            check(name, each, PathLike)
        return [*map(str, several)]
    if isinstance(value, str | os.PathLike):
        return Path(value) if Path in get_args(hint) else str(value)
    return value


_AS_TYPED = {"page": "report"}  # fields of VerifyOptions -> options
_DEFAULTS = {field.name: field.default for field in fields(VerifyOptions)}
_FIELDS = {  # those that are options
    name: hint
    for name, hint in get_type_hints(VerifyOptions).items()
    if name not in {"checkpoint", "others"}
}
