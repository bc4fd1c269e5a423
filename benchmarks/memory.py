"""Peak resident memory of a conversion above that of `python -c 'import torch'`.

The peak is that of a child process that runs the whole command, as the kernel counts it
(ru_maxrss). It must not grow with the model, so two sizes are converted.
"""

from __future__ import annotations

import shutil
import statistics
import sys

from common import Line, finish, measure, parser, quantize, qwen3, workplace, write_model

BARS = {"w8a8_dynamic": 64.0, "fp8_dynamic": 64.0, "vllm_w4a16": 128.0}  # MiB


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, nargs="+", default=[9, 39], help="101 MB each")
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    lines = []
    with workplace(options.dir) as folder:
        model, out = folder / "model", folder / "out"
        bare = statistics.median(measure(sys.executable, "-c", "import torch").peak for _ in range(5))
        lines.append(Line("import torch", bare / 2**20, "MiB", None, "subtracted"))
        for layers in (0, *options.layers):
            specs = qwen3(layers) if layers else qwen3(1, hidden=128, vocab=16)
            nbytes = write_model(model, specs)
            for recipe, bar in BARS.items():
                used = quantize(recipe, model, out, "--workers", str(options.workers))
                what = f"{recipe}, {nbytes / 1e9:.1f} GB"
                detail = f"{options.workers} workers, {used.wall:.1f} s"
                lines.append(Line(what, (used.peak - bare) / 2**20, "MiB", bar, detail))
            shutil.rmtree(model)
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
