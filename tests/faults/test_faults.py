"""A sample of the sweep of faults; `make faults` does all of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.injector import KILL, KINDS, Fault
from tests.faults.sweep import sample

COMMANDS = ("quantize", "quantize --force, a file kept", "pack", "pack --merge")


@pytest.mark.faults
def test_a_sample_of_faults() -> None:
    words = ["--faults", "48", "--kills", "12", "--seed", "0", "--commands", *COMMANDS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.sweep", *words],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    outcome = json.loads(done.stdout)
    assert (outcome["faults"], outcome["kills"]) == (48, 12)
    assert outcome["missed"] <= 4  # threads share the calls in another way each time
    assert outcome["codes"]["3"] > outcome["codes"]["0"] > 0
    assert min(outcome["points"].values()) > 300


def test_a_sample_has_all_kinds() -> None:
    import random

    faults = [Fault(kind, n, e) for kind, errors in KINDS.items() for n in (1, 2, 3) for e in errors]
    pairs = {(fault.kind, fault.error) for fault in faults}
    chosen = sample(faults, len(pairs), random.Random(0))
    assert {(fault.kind, fault.error) for fault in chosen} == pairs
    assert chosen == sorted(chosen, key=faults.index)
    assert sample(faults, len(faults) + 1, random.Random(0)) == faults
    assert str(Fault("read", 3, KILL)) == "SIGKILL at read 3"
