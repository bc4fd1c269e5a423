"""Faults of disk and process, injected into commands one at a time, and what they leave.

The process imports everything once, and forks for each fault. After a fault the exit code is 0 or 3, no
message is a traceback, and OUT is absent, as it was, or whole. The same command again then gives the
bytes of an undisturbed run, and nothing else lies next to OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.injector import HARMLESS, KILL, KINDS, Fault, Injector, preload

_LIMIT = 120.0  # seconds of one command
_LONG = 800  # characters of a problem
_BAD_CODES = 98, 99  # of a child whose `main` did not exit


@dataclass
class Outcome:
    """What faults came to. points: calls that can fail, by command."""

    points: dict[str, int] = field(default_factory=dict)
    faults: int = 0
    kills: int = 0
    missed: int = 0  # faults at calls that this run did not make
    codes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Sweep:
    """Runs commands in forks of this process."""

    def __init__(self, root: Path) -> None:
        from tests.e2e.conftest import snapshot
        from tests.faults.scenarios import Place

        self._snapshot = snapshot
        self.place = Place(root)
        self.injector = Injector(root)
        self.log = root.with_name(root.name + ".log")
        self.outcome = Outcome()

    def points(self, name: str) -> dict[str, int]:
        """Calls of each kind that a command makes; it has run undisturbed then."""
        self._scenario = self.place.scenario(name)
        self._name = name
        self._set_up()
        self._warm_up()
        self._set_up()
        code, _ = self._run(None)
        assert code == 0, self.log.read_text()
        self._before = {n: self._snapshot(folder) for n, folder in self._scenario.before.items()}
        self._whole = self._snapshot(self.place.run)
        counts = self.injector.counts
        self.outcome.points[name] = sum(counts.values())
        return counts

    def _warm_up(self) -> None:
        """Run the command in this process: forks have behind them what it imports and loads."""
        from tests.e2e.conftest import run_cli

        result = run_cli(*self._scenario.words)
        assert result.code == 0, result.err

    def inject(self, fault: Fault) -> None:
        """Run the command with a fault, and then without one; note what went wrong."""
        self._set_up()
        code, words = self._run(fault)
        fired = self.injector.fired
        self.outcome.missed += not fired
        if fault.error == KILL:
            self.outcome.kills += 1
        else:
            self.outcome.faults += 1
            self.outcome.codes[str(code)] += 1
        problems = [*self._problems_of(code, words, fault, fired)]
        if problems or self._snapshot(self.place.run) != self._whole:
            problems += self._problems_again()
        if problems:
            texts = [
                problem if len(problem) < _LONG else f"... {problem[-_LONG:]}" for problem in problems
            ]
            self.outcome.failures += [f"{self._name}, {fault}: {text}" for text in texts]

    def _set_up(self) -> None:
        shutil.rmtree(self.place.run, ignore_errors=True)
        self.place.run.mkdir()
        for name, folder in self._scenario.before.items():
            shutil.copytree(folder, self.place.run / name)

    def _problems_of(self, code: int, words: str, fault: Fault, fired: bool) -> Iterator[str]:
        """What is wrong after a command with a fault."""
        if fault.error == KILL:
            if code != (-signal.SIGKILL if fired else 0):
                yield f"exit code {code}: {words}"
        elif code != 0 and (code != 3 or fault.error in HARMLESS):
            yield f"exit code {code}: {words}"
        if "Traceback" in words:
            yield f"traceback: {words}"
        if code == 3 and str(self.place.root) not in words:
            yield f"no path: {words}"
        now = self._snapshot(self.place.run)
        if not self._scenario.writes:
            if now != self._whole:
                yield "something changed"
            return
        if code == 0 and now != self._whole:
            yield f"exit code 0, but not what an undisturbed run writes: {difference(now, self._whole)}"
        out = part_of(now, "out")
        if self._scenario.whole and out not in (
            {},
            self._before.get("out"),
            part_of(self._whole, "out"),
        ):
            yield f"OUT is neither old nor whole: {difference(out, part_of(self._whole, 'out'))}"

    def _problems_again(self) -> Iterator[str]:
        """What is wrong after the same command without a fault."""
        done = part_of(self._snapshot(self.place.run), "out") == part_of(self._whole, "out")
        again = not done or "--force" in self._scenario.words or not self._scenario.whole
        code, words = self._run(None) if again else (0, "")
        if code != 0:
            yield f"again: exit code {code}: {words}"
        now = self._snapshot(self.place.run)
        if code == 0 and now != self._whole:
            yield f"again: {difference(now, self._whole)}"

    def _run(self, fault: Fault | None) -> tuple[int, str]:
        """The exit code of the command in a fork, and all that it has printed."""
        child = os.fork()
        if not child:
            code: object = _BAD_CODES[0]
            try:
                from quantcli.__main__ import main

                os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                os.dup2(2, 1)
                self.injector.arm(fault)
                main(list(self._scenario.words))
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                os._exit(code if isinstance(code, int) else _BAD_CODES[1])
        until = time.monotonic() + _LIMIT
        wait = 0.001
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return 97, f"no end after {_LIMIT:.0f} s: {self.log.read_text(errors='replace')}"
            time.sleep(wait)
            wait = min(0.01, wait * 1.5)
        return os.waitstatus_to_exitcode(done[1]), self.log.read_text(errors="replace")


def part_of(files: dict[str, str], name: str) -> dict[str, str]:
    """The files of a snapshot in a folder, by their names there."""
    return {n[len(name) + 1 :]: value for n, value in files.items() if n.startswith(f"{name}/")}


def difference(files: dict[str, str], expected: dict[str, str]) -> str:
    """The names of files that are missing, too many, or have other bytes."""
    named = {
        "missing": sorted(expected.keys() - files.keys()),
        "too many": sorted(files.keys() - expected.keys()),
        "other bytes": sorted(n for n in files.keys() & expected.keys() if files[n] != expected[n]),
    }
    return "; ".join(f"{word} {names[:6]}" for word, names in named.items() if names)


def faults_of(counts: dict[str, int]) -> list[Fault]:
    """Every fault at every call."""
    return [
        Fault(kind, number, error)
        for kind, errors in KINDS.items()
        for number in range(1, counts[kind] + 1)
        for error in errors
    ]


def kills_of(counts: dict[str, int]) -> list[Fault]:
    """SIGKILL at every call."""
    return [Fault(kind, n, KILL) for kind in KINDS for n in range(1, counts[kind] + 1)]


def sample(faults: Sequence[Fault], number: int, random: random.Random) -> list[Fault]:
    """As many faults, in their order; each kind of fault gets an even share."""
    if number >= len(faults):
        return [*faults]
    groups: dict[tuple[str, int], list[int]] = {}
    for index, fault in enumerate(faults):
        groups.setdefault((fault.kind, fault.error), []).append(index)
    for group in groups.values():
        random.shuffle(group)
    queue = [
        group.pop()
        for _ in range(max(map(len, groups.values())))
        for group in shuffled([group for group in groups.values() if group], random)
    ]
    return [faults[index] for index in sorted(queue[:number])]


def shuffled(items: list[list[int]], random: random.Random) -> list[list[int]]:
    """The items in another order."""
    random.shuffle(items)
    return items


def main() -> None:
    """Sweep, and print the outcome. Exit code 1: something went wrong."""
    from tests.faults.scenarios import SCENARIOS

    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--faults", type=int, default=2000)
    arguments.add_argument("--kills", type=int, default=300)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--commands", nargs="+", choices=SCENARIOS, default=[*SCENARIOS])
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--verbose", action="store_true")
    options = arguments.parse_args()
    preload()
    import torch

    torch.set_num_threads(1)  # without other threads forking is safe
    generator = random.Random(options.seed)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="quantcli-faults-") as folder:
        sweep = Sweep(Path(folder) / "place")
        share = len(options.commands)
        for number, name in enumerate(options.commands):
            counts = sweep.points(name)
            faults, kills = (
                sample(of(counts), total * (number + 1) // share - total * number // share, generator)
                for of, total in ((faults_of, options.faults), (kills_of, options.kills))
            )
            print(f"{name}: {counts}", file=sys.stderr, flush=True)
            for fault in [*faults, *kills]:
                found = len(sweep.outcome.failures)
                sweep.inject(fault)
                for failure in sweep.outcome.failures[found:]:
                    print(failure, file=sys.stderr, flush=True)
    sweep.outcome.seconds = time.monotonic() - started
    print(json.dumps(sweep.outcome.__dict__, indent=2))
    sys.exit(bool(sweep.outcome.failures))


if __name__ == "__main__":
    main()
