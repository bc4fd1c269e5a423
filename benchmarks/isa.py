"""The same bytes for every instruction set, and with and without compiled kernels.

The bundled model and a larger random one are converted by every recipe that needs no data, in a process
for each case; all files must have the hashes of the first case:

* compiled kernels for this CPU, and for the CPUs that x86-64-v2, -v3 and -v4 stand for (SSE4.2, AVX2,
  AVX-512), which NUMBA_CPU_NAME names; those that this CPU cannot run are left out.
* torch alone (QUANTCLI_KERNELS=off): with all of this CPU's instructions, with AVX2, with none that
  ATEN_CPU_CAPABILITY can take away.

Kernels are compiled in each case anew, into an empty cache; a case with kernels that leaves none there
has not used any, and is an error. The variables mean nothing on other architectures: there it is only
kernels against torch.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

from common import ROOT, Line, finish, hashes, measure, parser, qwen3, workplace, write_model
from convert_all import DATA_FREE

COMPILER = "numba"
TORCH = {"QUANTCLI_KERNELS": "off"}
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
# the flag of /proc/cpuinfo that says whether this CPU can run it, and the environment
LEVELS = {
    "x86-64-v2": ("sse4_2", PLAIN),
    "x86-64-v3": ("avx2", AVX2),
    "x86-64-v4": ("avx512vl", {}),
}


def cases() -> dict[str, dict[str, str]]:
    """The environment of each; the first is the one that a user has."""
    found: dict[str, dict[str, str]] = {}
    flags = Path("/proc/cpuinfo").read_text().split()
    intel = platform.machine() == "x86_64"
    if importlib.util.find_spec(COMPILER):
        found["kernels for this CPU"] = {}
        for name, (flag, environment) in LEVELS.items():
            if intel and flag in flags:
                found[f"kernels for {name}"] = {**environment, "NUMBA_CPU_NAME": name}
    found["torch alone"] = TORCH
    if intel:
        found |= {"torch alone, AVX2": TORCH | AVX2, "torch alone, plain": TORCH | PLAIN}
    return found


def main() -> None:
    options = parser(__doc__).parse_args()
    lines = []
    with workplace(options.dir) as folder:
        random = folder / "random"
        write_model(random, qwen3(1, hidden=512, vocab=1024))
        for model in (ROOT / "examples" / "tiny-qwen3", random):
            lines += compared(model, folder / f"of-{model.name}")
    finish(lines, as_json=options.json)


def compared(model: Path, folder: Path) -> list[Line]:
    """A line for each case but the first: files that are not the first's."""
    lines = []
    first: dict[str, str] = {}
    script = Path(__file__).with_name("convert_all.py")
    for number, (name, environment) in enumerate(cases().items()):
        out, cache = folder / f"{number}", folder / f"cache{number}"
        env = environment | {"XDG_CACHE_HOME": str(cache)}
        measure(sys.executable, script, model, out, env=env)
        compiled = len(list(cache.rglob("*.o")))
        if name.startswith("kernels") and not compiled:
            raise SystemExit(f"{name}: none were compiled, so torch did the work")
        found = hashes(out)
        first = first or found
        odd = sum(first.get(file) != found.get(file) for file in first.keys() | found.keys())
        what = f"{model.name}, {name}: files with other bytes"
        detail = f"{len(found)} files of {len(DATA_FREE)} recipes; {compiled} kernels compiled"
        lines.append(Line(what, odd, "", 0, detail))
    return lines


if __name__ == "__main__":
    main()
