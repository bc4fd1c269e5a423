"""Wall seconds of `quantcli quantize ... --plan` for a model of 50,000 expert matrices.

Whole child processes, the median of several. The model is headers alone: its data is a hole in the
file.
"""

from __future__ import annotations

import statistics

from common import (
    QUANTCLI,
    RECIPES,
    Line,
    finish,
    measure,
    parser,
    qwen3_moe,
    spread,
    workplace,
    write_model,
)

BAR = 10.0  # seconds; the aim is half of it


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    with workplace(options.dir) as folder:
        model = folder / "model"
        specs = qwen3_moe(48, 348, hidden=512, width=128)
        write_model(model, specs, shards=16, sparse=True)
        recipe = RECIPES / "w8a8_moe_dynamic.yaml"
        words = ("quantize", recipe, "--model", model, "--out", folder / "out", "--plan", "--json")
        used = [measure(*QUANTCLI, *words) for _ in range(options.rounds)]
    wall = [u.wall for u in used]
    matrices = sum(".experts." in spec.name for spec in specs)
    detail = (
        f"{matrices} expert matrices of {len(specs)} tensors; {spread(wall)}; "
        f"CPU {statistics.median(u.cpu for u in used):.2f} s; peak {used[0].peak / 2**20:.0f} MiB"
    )
    finish([Line("plan", statistics.median(wall), "s", BAR, detail)], as_json=options.json)


if __name__ == "__main__":
    main()
