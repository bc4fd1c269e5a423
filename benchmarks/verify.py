"""What verification costs: structure, --full, --against.

CPU seconds and peaks of forked children in which everything is imported; GB are of the quantized
checkpoint. --against is compared with the conversion of the same model by W8A8 dynamic, both without
what they cost on a nearly empty model. Rounds alternate, medians count.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from common import (
    RECIPES,
    Line,
    Usage,
    finish,
    parser,
    quantize_to,
    qwen3,
    reap,
    workplace,
    write_model,
)

STRUCTURE_BAR, FULL_BAR, AGAINST_BAR, PEAK_BAR = 5.0, 1.0, 3.0, 96.0


def forked(work: Callable[[], object]) -> Usage:
    """What a function takes in a child process."""
    child = os.fork()
    if not child:
        code = 99
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    code, used = reap(child)
    if code:
        raise SystemExit(f"a child exits with {code}")
    return used


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--layers", type=int, nargs=2, default=[9, 36], help="101 MB each")
    options = arguments.parse_args()
    import torch

    from quantcli.verification.depths import verify
    from quantcli.verification.options import VerifyOptions

    torch.set_num_threads(1)
    lines = []
    with workplace(options.dir) as folder:
        lines.append(structure(folder))

        def prepared(layers: int) -> tuple[Path, Path, int]:
            model, out = folder / f"model{layers}", folder / f"out{layers}"
            specs = qwen3(layers) if layers else qwen3(1, hidden=16, vocab=16)
            write_model(model, specs)
            (model / "tokenizer.json").write_text("{}")
            quantize_to(out, RECIPES / "w8a8_dynamic.yaml", model)
            return model, out, sum(f.stat().st_size for f in out.glob("*.safetensors"))

        empty, small, large = (prepared(layers) for layers in (0, *options.layers))
        verify(VerifyOptions(empty[1], full=True, against=str(empty[0])))  # everything is imported
        bare = forked(lambda: None).peak

        def check(made: tuple[Path, Path, int], *, full: bool, against: bool) -> Usage:
            model = str(made[0]) if against else None
            wanted = VerifyOptions(made[1], full=full, against=model, workers=2)

            def work() -> None:
                report = verify(wanted)
                assert report.ok, report.findings

            return forked(work)

        def convert(model: Path) -> Usage:
            again = folder / "again"
            used = forked(lambda: quantize_to(again, RECIPES / "w8a8_dynamic.yaml", model))
            shutil.rmtree(again)
            return used

        used: dict[str, list[float]] = {name: [] for name in ("full", "against", "quantize", "start")}
        for _ in range(options.rounds):
            used["full"].append(
                check(small, full=True, against=False).cpu - check(empty, full=True, against=False).cpu
            )
            used["against"].append(
                check(small, full=False, against=True).cpu - check(empty, full=False, against=True).cpu
            )
            used["quantize"].append(convert(small[0]).cpu - convert(empty[0]).cpu)
        full, against, quantize = (
            statistics.median(used[name]) for name in ("full", "against", "quantize")
        )
        size = small[2] / 1e9
        lines.append(
            Line("--full", full / size, "CPU s/GB", 1 / FULL_BAR, f"{size / full:.2f} GB/CPU s")
        )
        detail = f"{against:.2f} over {quantize:.2f} CPU s of {size:.2f} GB"
        lines.append(Line("--against / quantize", against / quantize, "", AGAINST_BAR, detail))
        for made in (small, large):
            peak = check(made, full=False, against=True).peak - bare
            what = f"--against, {made[2] / 1e9:.1f} GB"
            lines.append(Line(what, peak / 2**20, "MiB", PEAK_BAR, "above the imports, 2 workers"))
    finish(lines, as_json=options.json)


def structure(folder: Path) -> Line:
    """10,000 tensors in 200 shards, of which no byte is read: the files have holes for weights."""
    from quantcli.verification.structure import verify_structure

    model, out = folder / "wide", folder / "wide-out"
    specs = qwen3(480, hidden=64, vocab=64)
    write_model(model, specs, sparse=True)
    (model / "tokenizer.json").write_text("{}")
    sets = (f"max_shard={sum(s.nbytes for s in specs) // 2 // 196}",)
    quantize_to(out, RECIPES / "w8a8_dynamic.yaml", model, overrides=sets)
    started = time.perf_counter()
    found = verify_structure(out)
    wall = time.perf_counter() - started
    assert found.report.ok, found.report.findings
    assert found.stored is not None
    shards = len(found.stored.checkpoint.shards)
    tensors = len(found.stored.checkpoint.tensors)
    shutil.rmtree(model)
    shutil.rmtree(out)
    return Line("structure", wall, "s", STRUCTURE_BAR, f"{tensors:,} tensors in {shards} shards")


if __name__ == "__main__":
    main()
