"""SIGKILL at random moments of a conversion; the same command again must give the same bytes.

Each round forks a process that has torch and quantcli imported already and calls the command line's
`main`. The moments (seeded) are uniform from shortly before the folder is made to the end of an
uninterrupted run: the shortest of the last five, measured again and again as the disk varies. After the
kill, an output that is there must be whole and identical; otherwise the same command runs again, to
its end, and its output must be. Nothing may be left beside it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter, deque
from pathlib import Path

from common import RECIPES, ROOT, Line, finish, fork, hashes, parser, reap, warm_up, workplace

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
        spans: deque[tuple[float, float]] = deque(maxlen=5)
        for _ in range(5):
            shutil.rmtree(out, ignore_errors=True)
            spans.append(uninterrupted(words, log, folder / "out.partial"))
        whole = hashes(out)
        shards = [name for name in whole if name.endswith(".safetensors")]
        stages: Counter[str] = Counter()
        failures: list[str] = []
        for number in range(options.rounds):
            shutil.rmtree(out)
            if number % 4 == 3:
                spans.append(uninterrupted(words, log, folder / "out.partial"))
                shutil.rmtree(out)
            first, last = map(min, zip(*spans, strict=True))
            moment = moments.uniform(0.9 * first, last)
            child = fork(words, log)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            over = reap(child)[0] != -signal.SIGKILL
            stage = STAGES[-1] if over else stage_of(out, shards)
            stages[stage] += 1
            where = f"round {number}, {1000 * moment:.1f} ms, {stage}"
            if not out.exists() and (code := reap(fork(words, log))[0]):
                failures.append(f"{where}: second run exits with {code}: {log.read_text()}")
                shutil.rmtree(folder / "out.partial", ignore_errors=True)
                out.mkdir(exist_ok=True)
                continue
            if hashes(out) != whole:
                failures.append(f"{where}: other bytes")
            if left := {path.name for path in folder.iterdir()} - {"out", "log"}:
                failures.append(f"{where}: left behind {sorted(left)}")
                shutil.rmtree(folder / "out.partial", ignore_errors=True)
    detail = f"{options.rounds} kills, {1000 * first:.0f} to {1000 * last:.0f} ms, {len(shards)} shards"
    if failures:
        detail += "; " + "; ".join(failures[:5])
    lines = [Line("rounds that went wrong", len(failures), "", 0, detail)]
    lines += [Line(f"killed: {stage}", stages[stage], "") for stage in STAGES]
    finish(lines, as_json=options.json)


def uninterrupted(words: list[str], log: Path, partial: Path) -> tuple[float, float]:
    """Seconds until `partial` is there, and until all is done."""
    started = time.perf_counter()
    child = fork(words, log)
    while not partial.exists() and time.perf_counter() - started < 60:
        time.sleep(0.0005)
    lead = time.perf_counter() - started
    code, _ = reap(child)
    if code:
        raise SystemExit(f"the uninterrupted run exits with {code}:\n{log.read_text()}")
    return lead, time.perf_counter() - started


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
