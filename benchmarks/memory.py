"""Peak resident memory of a conversion above its imports.

The peak is that of a child process that runs the whole command, as the kernel counts it (ru_maxrss).
Imports and the loading of compiled kernels are what the same conversion of a nearly empty model takes;
that peak is shown above a bare `import torch`. The peak must not grow with the model, so two sizes are
converted. What is compiled once and kept is compiled before anything is measured.
"""

from __future__ import annotations

import shutil
import statistics
import sys

from common import Line, finish, measure, parser, quantize, qwen3, workplace, write_model

BARS = {"w8a8_dynamic": 48.0, "fp8_dynamic": 48.0, "vllm_w4a16": 48.0}  # MiB
_ROUNDS = 3


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, nargs="+", default=[9, 39], help="101 MB each")
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    lines, imports = [], {}
    with workplace(options.dir) as folder:
        model, out = folder / "model", folder / "out"
        bare = statistics.median(measure(sys.executable, "-c", "import torch").peak for _ in range(5))
        lines.append(Line("import torch", bare / 2**20, "MiB"))
        workers = ("--workers", str(options.workers))
        for layers in (0, *options.layers):
            nbytes = write_model(model, qwen3(layers) if layers else qwen3(1, hidden=128, vocab=16))
            for recipe, bar in BARS.items():
                if not layers:
                    quantize(recipe, model, out)
                used = [quantize(recipe, model, out, *workers) for _ in range(_ROUNDS)]
                peak = statistics.median(each.peak for each in used)
                above = (peak - bare) / 2**20
                detail = f"{options.workers} workers; {above:.0f} MiB above import torch"
                if not layers:
                    imports[recipe] = peak
                    what = f"{recipe}: imports and kernels, above import torch"
                    lines.append(Line(what, above, "MiB", None, "subtracted below"))
                    continue
                what = f"{recipe}, {nbytes / 1e9:.1f} GB"
                lines.append(Line(what, (peak - imports[recipe]) / 2**20, "MiB", bar, detail))
            shutil.rmtree(model)
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
