"""A conversion in a process of its own, with the instruction set that the reference had.

The environment must be set before torch is loaded, hence the process. It prints what it had.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CAP = "AVX512_CORE"


def convert(model: Path, recipe: Path, out: Path) -> str:
    """The instruction set of torch's own kernels in a process that was capped: AVX512, AVX2 or other.

    AVX512 says all: oneDNN's AVX512_CORE needs the same extensions (F, BW, DQ, VL), and the cap keeps
    it from using newer ones, AVX512_BF16 and AMX, which add up bfloat16 products in another order. A
    cap above what the CPU has does nothing.
    """
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.capped", str(model), str(recipe), str(out)],
        cwd=ROOT,
        env=environment | {"ONEDNN_MAX_CPU_ISA": CAP},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["cap"] == CAP
    return str(told["capability"])


def main(model: str, recipe: str, out: str) -> None:
    """What the process does."""
    import torch

    from quantcli.commands import quantize as commands

    commands.quantize(commands.plan(Path(recipe), model=model, out=Path(out)))
    cap = os.environ["ONEDNN_MAX_CPU_ISA"]
    print(json.dumps({"cap": cap, "capability": torch.backends.cpu.get_cpu_capability()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
