"""Peak resident memory of a conversion above that of importing torch and the compiler's library.

The peak is that of a child process that runs the whole command, as the kernel counts it
(ru_maxrss). It must not grow with the model, so two sizes are converted, and a nearly empty model next
to them. What is compiled once and kept is compiled before anything is measured.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import sys

from common import Line, finish, measure, parser, quantize, qwen3, workplace, write_model

BARS = {"w8a8_dynamic": 48.0, "fp8_dynamic": 48.0, "vllm_w4a16": 48.0}  # MiB
COMPILER = "llvmlite"  # loads the compiled kernels; torch does their work if it is not installed


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, nargs="+", default=[9, 39], help="101 MB each")
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    imports = "import torch"
    if importlib.util.find_spec(COMPILER):
        imports += f"; import {COMPILER}.binding"
    lines = []
    with workplace(options.dir) as folder:
        model, out = folder / "model", folder / "out"
        bare = statistics.median(measure(sys.executable, "-c", imports).peak for _ in range(5))
        lines.append(Line(imports, bare / 2**20, "MiB", None, "subtracted"))
        for layers in (0, *options.layers):
            specs = qwen3(layers) if layers else qwen3(1, hidden=128, vocab=16)
            nbytes = write_model(model, specs)
            for recipe, bar in BARS.items():
                if not layers:
                    quantize(recipe, model, out)
                used = quantize(recipe, model, out, "--workers", str(options.workers))
                what = f"{recipe}, {nbytes / 1e9:.1f} GB"
                detail = f"{options.workers} workers, {used.wall:.1f} s"
                lines.append(Line(what, (used.peak - bare) / 2**20, "MiB", bar, detail))
            shutil.rmtree(model)
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
