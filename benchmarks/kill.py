"""SIGKILL at random moments of a conversion; the same command again must give the same bytes.

Each round forks a process that has torch and quantcli imported already, so that the moments
(seeded, uniform over the time of an uninterrupted run) fall into the run itself. The child calls
the command line's `main`. After the kill, an output that is there must be whole and identical;
otherwise the same command runs again, to its end, and its output must be. Nothing may be left.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import time
from collections import Counter
from pathlib import Path

from common import RECIPES, ROOT, Line, finish, hashes, parser, workplace

STAGES = (
    "no directory yet",
    "before the first shard was whole",
    "between shards",
    "at the sidecars, all shards whole",
    "after publish, still running",
    "run already over",
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-qwen3")
    arguments.add_argument("--recipe", default="w8a8_dynamic")
    options = arguments.parse_args()
    moments = random.Random(options.seed)
    with workplace(options.dir) as folder:
        out, log = folder / "out", folder / "log"
        words = ["quantize", str(RECIPES / f"{options.recipe}.yaml"), "--model", str(options.model)]
        words += ["--out", str(out), "--set", "max_shard=2MB", "--quiet"]
        warm_up([*words, "--plan"])
        durations = []
        for _ in range(9):
            shutil.rmtree(out, ignore_errors=True)
            started = time.perf_counter()
            code = wait(start(words, log))
            durations.append(time.perf_counter() - started)
            if code:
                raise SystemExit(f"the uninterrupted run exits with {code}:\n{log.read_text()}")
        whole = hashes(out)
        shards = [name for name in whole if name.endswith(".safetensors")]
        duration = statistics.median(durations)
        stages: Counter[str] = Counter()
        failures: list[str] = []
        for number in range(options.rounds):
            shutil.rmtree(out)
            moment = moments.uniform(0, duration)
            child = start(words, log)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            over = wait(child) != -signal.SIGKILL
            stage = STAGES[-1] if over else stage_of(out, shards)
            stages[stage] += 1
            where = f"round {number}, {1000 * moment:.1f} ms, {stage}"
            if not out.exists() and (code := wait(start(words, log))):
                failures.append(f"{where}: second run exits with {code}: {log.read_text()}")
                shutil.rmtree(folder / "out.partial", ignore_errors=True)
                out.mkdir(exist_ok=True)
                continue
            if hashes(out) != whole:
                failures.append(f"{where}: other bytes")
            if left := {path.name for path in folder.iterdir()} - {"out", "log"}:
                failures.append(f"{where}: left behind {sorted(left)}")
                shutil.rmtree(folder / "out.partial", ignore_errors=True)
    detail = f"{options.rounds} kills over {duration:.3f} s, {len(shards)} shards"
    if failures:
        detail += "; " + "; ".join(failures[:5])
    lines = [Line("rounds that went wrong", len(failures), "", 0, detail)]
    lines += [Line(f"killed: {stage}", stages[stage], "") for stage in STAGES]
    finish(lines, as_json=options.json)


def warm_up(words: list[str]) -> None:
    """Import all that a run imports. Single-threaded, so that children can be forked off safely."""
    import torch

    import quantcli.execute
    from quantcli.cli import main as run

    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    stdout = os.dup(1)
    os.dup2(quiet, 1)
    try:
        run(words)
    except SystemExit as end:
        if end.code:
            raise
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(quiet)
    assert quantcli.execute


def start(words: list[str], log: Path) -> int:
    """Fork a child that runs the command line; its words go to `log`. Returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        from quantcli.cli import main as run

        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        run(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 98
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """The exit code of a child; negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stage_of(out: Path, shards: list[str]) -> str:
    """How far a killed run had come, from what it left."""
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        return STAGES[4]
    if not partial.exists():
        return STAGES[0]
    done = sum((partial / shard).exists() for shard in shards)
    return STAGES[1] if not done else STAGES[2] if done < len(shards) else STAGES[3]


if __name__ == "__main__":
    main()
