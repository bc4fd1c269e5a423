"""Machine code of the kernels: compiled by numba once for a CPU, kept in a folder of the user's, and
loaded by llvmlite.

To load takes a few hundredths of a second; numba, which takes a third of one to import, is needed only
to compile. Threads and processes may share the folder: a file appears in it whole, and one that does
not have its checksum is compiled again.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from blake3 import blake3

Function: TypeAlias = Callable[..., None]
Say: TypeAlias = Callable[[str], None]  # takes a message for people; raises nothing
SWITCH = "QUANTCLI_KERNELS"  # environment variable: "off" leaves all work to torch
CACHE = "QUANTCLI_CACHE"  # environment variable: the folder for machine code
_HASH_BYTES = 32
_KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_SOURCES = (
    "__init__.py", "formulas.py", "lanes.py", "loops.py", "zero_points.py", "machine.py", "compile.py",
)  # fmt: skip


class _Kernels:
    """The kernels of this process."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self.say: Say | None = None
        self._functions: dict[tuple[str, ...], Function] = {}
        self._engines: list[Any] = []  # own the memory of the functions
        self._lock = threading.Lock()

    def get(self, key: tuple[str, ...]) -> Function | None:
        """The function of a kernel; None if there is none here. Threads wait for the first of them."""
        function = self._functions.get(key)
        if function is not None or self.problem is not None:
            return function
        with self._lock:
            function = self._functions.get(key)
            if function is None and self.problem is None:
                try:
                    code = self._stored(key)
                    function = self._functions[key] = self._load(code or self._compiled(key))
                except Exception as error:  # a library that cannot be imported, or fails on this CPU
                    self.problem = f"{type(error).__name__}: {error}"
        return function

    def _stored(self, key: tuple[str, ...]) -> bytes | None:
        folder = _folder(_fingerprint())
        return None if folder is None else _read(folder / _file(key))

    def _compiled(self, key: tuple[str, ...]) -> bytes:
        from quantcli.core.kernels.compile import compiled

        folder = _folder(_fingerprint())
        if self.say is not None:
            kept = f"kept in {folder.parent}" if folder else "which no folder of this user's can keep"
            self.say(f"compiling kernels for this CPU, {kept}: a few seconds")
            self.say = None
        content = compiled(*key)
        if folder is not None:
            _write(folder / _file(key), content)
        return content

    def _load(self, content: bytes) -> Function:
        import llvmlite.binding as llvm

        if not self._engines:  # numba does it, too, but is rarely imported
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
        symbol, arguments, code = _parts(content)
        target = llvm.Target.from_triple(llvm.get_process_triple())
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target.create_target_machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        address = engine.get_function_address(symbol)
        if not address:
            raise ValueError(f"no function {symbol}")
        self._engines.append(engine)
        return _callable(address, arguments)


def _parts(content: bytes) -> tuple[str, str, bytes]:
    """Symbol, kinds of arguments, and object file. ValueError if they are not whole."""
    header, _, code = content.partition(b"\n")
    values = json.loads(header)
    kinds = [type(value) for value in values] if isinstance(values, list) else []
    if kinds != [str, str, int] or values[2] != len(code) or not {*values[1]} <= _KINDS.keys():
        raise ValueError("object file is not whole")
    return values[0], values[1], code


def _file(key: tuple[str, ...]) -> str:
    return "-".join(key) + ".o"


def _callable(address: int, arguments: str) -> Function:
    """A C function that numba compiled: it takes the place of a result and of an error first. Ctypes
    releases the GIL while it runs.
    """
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *(_KINDS[kind] for kind in arguments)
    )
    function = prototype(address)
    places = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    result, failure = (ctypes.addressof(place) for place in places)

    def call(*values: Any, _keep: Any = places) -> None:
        status = function(result, failure, *values)
        assert status == 0, status

    return call


_KERNELS = _Kernels()
_SHAPES_ONLY = ContextVar("shapes_only", default=False)


def kernel(*key: str) -> Function | None:
    """A kernel by its name in `loops`, and the words that it is made with. None: torch must serve."""
    if os.environ.get(SWITCH) == "off" or _SHAPES_ONLY.get():
        return None
    return _KERNELS.get(key)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Let torch serve in the block: a plan wants shapes and dtypes, and need not load machine code."""
    token = _SHAPES_ONLY.set(True)
    try:
        yield
    finally:
        _SHAPES_ONLY.reset(token)


def only_shapes() -> bool:
    """Whether this is in a block of `shapes_only`: values are zeros, and nobody looks at them."""
    return _SHAPES_ONLY.get()


@cache
def _installed() -> bool:
    return all(find_spec(library) for library in ("llvmlite", "numba"))


def available() -> bool:
    """Whether kernels are likely to serve."""
    return os.environ.get(SWITCH) != "off" and _KERNELS.problem is None and _installed()


def problem() -> str | None:
    """The reason why this process has no kernels, if that is so, with what to do about it."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH}=off"
    if _KERNELS.problem is not None and not _installed():
        return f"{_KERNELS.problem}; `pip install numba` brings them"
    return _KERNELS.problem


@contextmanager
def announced(say: Say) -> Iterator[None]:
    """Call `say` if kernels have to be compiled in the block: that takes seconds."""
    before, _KERNELS.say = _KERNELS.say, say
    try:
        yield
    finally:
        _KERNELS.say = before


def cpu() -> tuple[str, str]:
    """Name and features of the CPU to compile for.

    The environment variables NUMBA_CPU_NAME and NUMBA_CPU_FEATURES may name a lesser one.
    """
    import llvmlite.binding as llvm

    name = os.environ.get("NUMBA_CPU_NAME")
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if name is None:
        name = llvm.get_host_cpu_name()
        features = features or llvm.get_host_cpu_features().flatten()
    return name, features or ""


@cache
def _fingerprint() -> str:
    """Changes with all that the machine code depends on."""
    import llvmlite
    import llvmlite.binding as llvm

    digest = blake3()
    for file in _SOURCES:
        digest.update(Path(__file__).with_name(file).read_bytes())
    for word in (llvmlite.__version__, llvm.get_process_triple(), *cpu()):
        digest.update(b"\0" + word.encode())
    return digest.hexdigest(length=16)


@cache
def _folder(fingerprint: str) -> Path | None:
    """Where machine code is kept: in the user's cache, or else among temporary files; None if neither
    can be written by this user, nor has any, or if another user can write there.
    """
    for parent in _parents():
        places = [parent / "kernels", parent / "kernels" / fingerprint]
        if str(parent) != os.environ.get(CACHE):  # that one may be shared: a volume, say
            places.insert(0, parent)
        with suppress(OSError):
            existing = parent.parent if parent in places else parent  # the chosen one may be new, too
            existing.mkdir(parents=True, exist_ok=True)
            for place in places:  # each by itself: `parents` would leave their modes to the umask
                place.mkdir(mode=0o700, exist_ok=True)
            # one that cannot be written may be part of a container's image, with all it needs
            if all(map(_private, places)) and (
                os.access(places[-1], os.W_OK) or any(places[-1].iterdir())
            ):
                return places[-1]
    return None


def _parents() -> Iterator[Path]:
    """Folders for machine code, the better ones first."""
    base = os.environ.get("XDG_CACHE_HOME")
    if chosen := os.environ.get(CACHE):
        yield Path(chosen)
    elif base and Path(base).is_absolute():
        yield Path(base) / "quantcli"
    else:
        with suppress(RuntimeError):  # a user without a home
            yield Path("~/.cache/quantcli").expanduser()
    yield Path(tempfile.gettempdir()) / f"quantcli-{os.geteuid()}"


def _private(folder: Path) -> bool:
    """Whether a folder is this user's, and no other may write in it: code from it is run."""
    found = folder.lstat()
    owned = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return owned and not found.st_mode & 0o022 and os.access(folder, os.X_OK)


def _read(path: Path) -> bytes | None:
    """The content of a file that `_write` wrote; None if it is missing or damaged."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    digest, content = raw[:_HASH_BYTES], raw[_HASH_BYTES:]
    try:
        _parts(content)
    except (ValueError, RecursionError):
        return None
    return content if blake3(content).digest() == digest else None


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears whole. A full disk only means that the next run compiles again."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(blake3(content).digest() + content)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
