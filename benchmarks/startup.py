"""Wall seconds of `quantcli --help` and of `quantcli inspect` of a model of 10,000 tensors.

Whole child processes, medians of several. The model is headers alone: its data is a hole in the
file.
"""

from __future__ import annotations

import statistics

from common import (
    QUANTCLI,
    Line,
    finish,
    measure,
    parser,
    qwen3_moe,
    spread,
    workplace,
    write_model,
)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    with workplace(options.dir) as folder:
        model = folder / "model"
        specs = qwen3_moe(24, 138, hidden=512, width=128)
        write_model(model, specs, shards=8, sparse=True)
        commands = {
            "quantcli --help": (("--help",), 0.5),
            f"quantcli inspect, {len(specs)} tensors": (("inspect", model), 2.0),
            f"quantcli inspect --json, {len(specs)} tensors": (("inspect", model, "--json"), 2.0),
        }
        lines = []
        for what, (words, bar) in commands.items():
            used = [measure(*QUANTCLI, *words) for _ in range(options.rounds)]
            wall = [u.wall for u in used]
            detail = f"{spread(wall)}; CPU {statistics.median(u.cpu for u in used):.2f} s"
            lines.append(Line(what, statistics.median(wall), "s", bar, detail))
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
