"""Faults of disk and process injected into commands: errors of system calls, short ones, SIGKILL.

`tests/faults` has the sweep, and says what must hold after each fault. Needs `cc` and glibc.
"""

from __future__ import annotations

import json
import subprocess
import sys

from common import ROOT, Line, finish, parser

MINUTES = 60


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--faults", type=int, default=2000)
    arguments.add_argument("--kills", type=int, default=300)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    words = [f"--{name}={getattr(options, name)}" for name in ("faults", "kills", "seed")]
    command = [sys.executable, "-m", "tests.faults.sweep", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    outcome = json.loads(done.stdout)
    points = ", ".join(f"{name} {number}" for name, number in outcome["points"].items())
    codes = ", ".join(f"{code}: {number}" for code, number in sorted(outcome["codes"].items()))
    lines = [
        Line("calls that can fail", sum(outcome["points"].values()), "", detail=points),
        Line("faults injected", outcome["faults"], "", detail=f"exit codes {codes}"),
        Line("SIGKILL", outcome["kills"], ""),
        Line("faults that went wrong", len(outcome["failures"]), "", 0, outcome["failures"][:5] or ""),
        Line("time", outcome["seconds"] / 60, "min", MINUTES),
    ]
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
