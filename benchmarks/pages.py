"""Bytes of the pages that `--report` writes, and how long they take.

The bundled model is converted and verified with all depths; its page is the first line. Larger models
have the figures of its modules, over and over: 94 layers with 128 experts, and the same where all
modules miss their limits. `inspect --outliers` likewise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

from common import RECIPES, ROOT, Line, finish, parser, quantize_to, workplace
from quantcli.commands.inspect import outliers
from quantcli.commands.verify import run
from quantcli.verification.options import VerifyOptions
from quantcli.verification.report.dashboard import dashboard
from quantcli.verification.report.outliers import outliers_page
from quantcli.verification.report.page import page

EXAMPLE = ROOT / "examples" / "tiny-qwen3"
BAR = 1.5  # MB
LAYERS, EXPERTS = 94, 128
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               *(f"mlp.experts.{expert}.{side}_proj"
                 for expert in range(EXPERTS) for side in ("gate", "up", "down")))  # fmt: skip


def many(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of modules under the names of a large mixture of experts."""
    names = (f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in PROJECTIONS)
    return [{**module, "module": name} for name, module in zip(names, cycle(modules), strict=False)]


def failed(report: dict[str, Any]) -> dict[str, Any]:
    """The report if no module reached its limit."""
    findings = [
        {"check": "sqnr", "severity": "error", "what": "SQNR is 12.34 dB; the limit is 20 dB",
         "where": f"`{module['module']}`, row 17",
         "fix": "this is damage, not rounding: copy the checkpoint again, or convert the model again"}
        for module in report["modules"]
    ]  # fmt: skip
    modules = [{**module, "ok": False, "limit_db": 99.0} for module in report["modules"]]
    return {**report, "ok": False, "modules": modules, "findings": findings}


def measured(what: str, make: Callable[[], str]) -> Line:
    """The size of a page."""
    started = time.perf_counter()
    nbytes = len(make().encode())
    seconds = time.perf_counter() - started
    return Line(what, nbytes / 1e6, "MB", BAR, f"{seconds:.1f} s")


def pages(report: dict[str, Any], ranking: dict[str, Any]) -> Iterator[Line]:
    """Pages of the bundled model, and of a large one."""
    large = {**report, "modules": many(report["modules"])}
    count = f"{len(large['modules']):,} modules"
    several = [{**report, "checkpoint": f"OUT{number}"} for number in range(8)]
    yield measured("verify, bundled model", lambda: page(report))
    yield measured(f"verify, {count}", lambda: page(large))
    yield measured(f"verify, {count}, all failed", lambda: page(failed(large)))
    yield measured("verify, 8 checkpoints", lambda: dashboard(several))
    yield measured("inspect --outliers, bundled model", lambda: outliers_page("MODEL", ranking))
    wide = {**ranking, "modules": many(ranking["modules"])}
    yield measured(f"inspect --outliers, {count}", lambda: outliers_page("MODEL", wide))


def main() -> None:
    options = parser(__doc__).parse_args()
    with workplace(options.dir) as folder:
        out = folder / "out"
        quantize_to(out, RECIPES / "w8a8_dynamic.yaml", EXAMPLE)
        text = str(EXAMPLE.parent / "evaluation.txt")
        chosen = VerifyOptions(out, full=True, against=str(EXAMPLE), run=True, data=text)
        report, ranking = run(chosen), outliers(str(EXAMPLE))
    finish(list(pages(report, ranking)), as_json=options.json)


if __name__ == "__main__":
    main()
