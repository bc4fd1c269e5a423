"""Runs readers over inputs that nobody would write: `python -m tests.fuzz.run --help`.

Each reader runs in a process of its own. With atheris, coverage says which inputs are worth changing
again; without it, or with --runs, good inputs are changed at random, the same ones for the same seed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import mmap
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import mutate
from tests.fuzz.readers import READERS, Read, Reader

CORPUS = Path(__file__).parent / "corpus"
MOST_SECONDS = 1.0  # of CPU time, for one run
MOST_BYTES = 512 * 2**20  # for one run
_HANGS = 20.0  # seconds of wall time without an end
_LONGEST = 2**21  # bytes of an input
_NUMBERS = 64  # bytes before it


@dataclass
class Fault:
    """What a reader should not have done. key: the same for the same cause."""

    key: str
    text: str
    data: bytes


def attempt(read: Read, data: bytes) -> tuple[Fault | None, float, bool]:
    """One run: its fault, its seconds of CPU time, and whether the input was refused."""
    from quantcli.core.errors import QuantError

    fault, refused, begin = None, False, time.thread_time()
    try:
        read(data)
    except QuantError as error:
        refused = True
        str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        fault = Fault(_key(error), "".join(traceback.format_exception(error)[-3:]), data)
    return fault, time.thread_time() - begin, refused


def _key(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "quantcli" in f.filename]
    last = frames[-1] if frames else None
    return (
        f"{type(error).__name__} at {last.filename.rpartition('/src/')[2]}:{last.lineno}"
        if last
        else repr(error)
    )


class Board:
    """Memory that a reader's process shares with the one that watches it."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, _NUMBERS + _LONGEST)

    def write(self, number: int, data: bytes) -> None:
        """The input that is about to be read."""
        self._map[_NUMBERS : _NUMBERS + len(data)] = data
        self._map[:16] = number.to_bytes(8, "little") + len(data).to_bytes(8, "little")

    def read(self) -> tuple[int, bytes]:
        """The last one."""
        number, size = (int.from_bytes(self._map[i : i + 8], "little") for i in (0, 8))
        return number, bytes(self._map[_NUMBERS : _NUMBERS + size])


@dataclass
class Outcome:
    """What came of a reader's runs."""

    reader: str
    runs: int = 0
    refused: int = 0
    seconds: float = 0.0  # of wall time
    worst: float = 0.0  # seconds of CPU time of one run
    nbytes: int = 0  # that memory grew by, at most
    faults: dict[str, Fault] = field(default_factory=dict)

    def add(self, fault: Fault) -> None:
        """Note a fault, of each kind the shortest input."""
        before = self.faults.get(fault.key)
        if before is None or len(fault.data) < len(before.data):
            self.faults[fault.key] = fault

    def read(self, read: Read, data: bytes) -> None:
        """One more run."""
        fault, seconds, refused = attempt(read, data)
        if fault is None and seconds > MOST_SECONDS:
            fault = Fault("slow", f"{seconds:.1f} s of CPU time", data)
        if fault is not None:
            self.add(fault)
        self.runs += 1
        self.refused += refused
        self.worst = max(self.worst, seconds)

    def __str__(self) -> str:
        each = self.seconds / max(1, self.runs)
        return (
            f"{self.reader:18} {self.runs:9,} runs  {1 / each if each else 0:8,.0f}/s  "
            f"{self.refused / max(1, self.runs):4.0%} refused  worst {self.worst:.3f} s  "
            f"memory +{self.nbytes / 2**20:.0f} MiB  {len(self.faults)} faults"
        )


def _rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bound_memory() -> None:
    """Let this process have little more memory than it has: what asks for more fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (soft, soft))


def _work(reader: Reader, board: Board, pipe: Any, numbers: range, until: float, seed: int) -> None:
    """The process of a reader: runs of some numbers, until a time."""
    outcome = Outcome(reader.name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as folder:
        read = reader.make(Path(folder))
        seeds = list(reader.seeds())
        for data in [*seeds, *seeds]:  # the first times it imports
            attempt(read, data)
        _bound_memory()
        before, begin = _rss(), time.monotonic()
        for number in numbers:
            if number % 64 == 0 and time.monotonic() > until:
                break
            data = mutate(seeds[number % len(seeds)], reader.kind, number + seed * 10**9, reader.words)
            board.write(number, data)
            outcome.read(read, data)
        outcome.seconds, outcome.nbytes = time.monotonic() - begin, _rss() - before
    pipe.send(outcome)


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run(reader: Reader, runs: int, seconds: float, seed: int) -> Outcome:
    """Changes of good inputs at random, in a process that is begun again if an input ends it."""
    context, until = multiprocessing.get_context("fork"), time.monotonic() + seconds
    total, first = Outcome(reader.name), 0
    while first < runs and time.monotonic() < until:
        board, (mine, theirs) = Board(), context.Pipe(duplex=False)
        args = (reader, board, theirs, range(first, runs), until, seed)
        process = context.Process(target=_work, args=args)
        process.start()
        theirs.close()
        ended, outcome = _watch(process, board, mine)
        if outcome is not None:
            _merge(total, outcome)
            break
        if process.exitcode == 1:
            raise SystemExit(f"{reader.name}: the harness itself failed, see above")
        number, data = board.read()
        total.add(Fault(ended, f"{ended}, input {number}", data))
        total.runs += number + 1 - first
        first = number + 1
    return total


def _watch(process: Any, board: Board, pipe: Any) -> tuple[str, Outcome | None]:
    """Wait for what a process sends in the end, or for its end. Kills one that hangs."""
    last, since = board.read()[0], time.monotonic() + 60  # it imports first
    while not pipe.poll(1.0):
        number = board.read()[0]
        if number != last:
            last, since = number, time.monotonic()
        elif time.monotonic() > since + _HANGS:
            process.kill()
            process.join()
            return "it hangs", None
    outcome = None
    with suppress(EOFError):
        outcome = pipe.recv()
    process.join()
    return f"the process ended with {process.exitcode}", outcome


def _merge(total: Outcome, more: Outcome) -> None:
    total.runs += more.runs
    total.refused += more.refused
    total.seconds += more.seconds
    total.worst = max(total.worst, more.worst)
    total.nbytes = max(total.nbytes, more.nbytes)
    for fault in more.faults.values():
        total.add(fault)


def _guided(reader: Reader, seconds: float, seed: int) -> Outcome:
    """The same with atheris, whose library ends the process itself."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_guide, args=(reader, theirs, seconds, seed))
    process.start()
    theirs.close()
    outcome = Outcome(reader.name)
    with suppress(EOFError):
        while True:
            outcome = mine.recv()  # the last one counts
    process.join()
    return outcome


def _guide(reader: Reader, pipe: Any, seconds: float, seed: int) -> None:
    import atheris

    folder = Path(tempfile.mkdtemp(dir=_fast_folder()))
    place = folder / "corpus"
    place.mkdir()
    with atheris.instrument_imports(include=["quantcli"]):
        read = reader.make(folder)
        for number, data in enumerate(reader.seeds()):
            attempt(read, data)
            (place / str(number)).write_bytes(data)
    outcome, begin, before, sent = Outcome(reader.name), time.monotonic(), _rss(), time.monotonic()

    def one(data: bytes) -> None:
        nonlocal sent
        outcome.read(read, data)
        if time.monotonic() > sent + 1:
            sent = time.monotonic()
            outcome.seconds, outcome.nbytes = sent - begin, _rss() - before
            pipe.send(outcome)

    def change(data: bytes, most: int, number: int) -> bytes:
        if number % 3 == 0:
            return atheris.Mutate(data, most)
        try:
            return mutate(data, reader.kind, number, reader.words)[:most]
        except (ValueError, RecursionError):  # not JSON: it was changed before
            return mutate(data, "text", number)[:most]

    options = [f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-max_len=65536", "-verbosity=0"]
    options += [f"-timeout={_HANGS:.0f}", f"-artifact_prefix={folder_of(reader)}/hang-", str(place)]
    atheris.Setup([reader.name, *options], one, custom_mutator=change)
    atheris.Fuzz()


def folder_of(reader: Reader) -> Path:
    """Where inputs are kept that a reader failed at."""
    folder = Path(os.environ.get("FUZZ_FOUND", CORPUS)) / reader.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep(reader: Reader, outcome: Outcome) -> None:
    """Write the inputs of faults, and print them."""
    for fault in outcome.faults.values():
        path = folder_of(reader) / f"found-{hashlib.sha256(fault.data).hexdigest()[:12]}"
        path.write_bytes(fault.data)
        print(
            f"  {fault.key}: {path}\n    {fault.data[:300]!r}\n    {fault.text.strip()[-600:]}",
            flush=True,
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", help="names of readers [default: all]")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all readers together")
    parser.add_argument("--runs", type=int, help="of each reader, with no limit of time")
    parser.add_argument("--bars", action="store_true", help="as many runs as each reader has to stand")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("atheris", "random"))
    options = parser.parse_args()
    chosen = [READERS[name] for name in options.readers or READERS]
    counted = options.runs is not None or options.bars
    engine = options.engine or ("atheris" if importlib.util.find_spec("atheris") else "random")
    seconds = options.minutes * 60 / len(chosen)
    failed = 0
    for reader in chosen:
        if engine == "atheris" and not counted:
            outcome = _guided(reader, seconds, options.seed)
        else:
            runs = (options.runs or reader.runs) if counted else sys.maxsize
            outcome = run(reader, runs, float("inf") if counted else seconds, options.seed)
        print(outcome, flush=True)
        keep(reader, outcome)
        failed += bool(outcome.faults)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
