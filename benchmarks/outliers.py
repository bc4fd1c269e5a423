"""What `quantcli inspect --outliers` costs: CPU seconds per GB of bfloat16, and peak memory.

CPU is that of the whole command less that for a model of next to nothing; memory is the peak above
`python -c 'import torch'`, which must not grow with the model.
"""

from __future__ import annotations

import shutil
import statistics
import sys

from common import QUANTCLI, Line, finish, measure, parser, qwen3, workplace, write_model

BAR = 128.0  # MiB


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, nargs="+", default=[4, 9], help="101 MB each")
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    lines = []
    with workplace(options.dir) as folder:
        model = folder / "model"
        bare = statistics.median(measure(sys.executable, "-c", "import torch").peak for _ in range(3))
        start = 0.0
        for layers in (0, *options.layers):
            nbytes = write_model(model, qwen3(layers) if layers else qwen3(1, hidden=16, vocab=16))
            used = [
                measure(*QUANTCLI, "inspect", "--outliers", model, "--json")
                for _ in range(options.rounds)
            ]
            cpu = statistics.median(u.cpu for u in used)
            peak = (statistics.median(u.peak for u in used) - bare) / 2**20
            size = f"{nbytes / 1e9:.1f} GB"
            lines.append(Line(f"memory above import torch, {size}", peak, "MiB", BAR))
            if layers:
                wall = statistics.median(u.wall for u in used)
                rate = (cpu - start) / (nbytes / 1e9)
                lines.append(Line(f"CPU, {size}", rate, "s/GB", None, f"{wall:.1f} s in all"))
            else:
                start = cpu
            shutil.rmtree(model)
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
