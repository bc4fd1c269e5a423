"""`verify`, and `inspect --outliers`, as functions: their outcome as data, and written to files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.hub import find_model
from quantcli.core.disk import check_file, write_file
from quantcli.core.errors import InputError

if TYPE_CHECKING:
    from quantcli.core.events import Progress


def verify(
    checkpoint: Path,
    *,
    full: bool = False,
    against: str | None = None,
    run: bool = False,
    data: str | None = None,
    samples: int = 32,
    length: int = 256,
    tp: str = "1",
    min_sqnr: float | None = None,
    max_ppl_ratio: float | None = None,
    max_kl: float | None = None,
    junit: Path | None = None,
    page: Path | None = None,
    workers: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Verify a checkpoint; the report as JSON-able data, see docs/verify.md.

    junit, page: files to write the report to as well, whatever it says. Raises InputError for options
    that mean nothing, and where there is no checkpoint to verify.
    """
    from quantcli.core.events import SILENT
    from quantcli.core.threads import default_workers
    from quantcli.verification.depths import VerifyOptions, document
    from quantcli.verification.depths import verify as work
    from quantcli.verification.report.junit import junit as as_junit

    limits = {"min-sqnr": min_sqnr, "max-ppl-ratio": max_ppl_ratio, "max-kl": max_kl}
    for name, value in limits.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{value} is not a limit", where=f"--{name} {value}", fix="give a number")
    for option, file in (("--junit", junit), ("--report", page)):
        if file is not None:
            check_file(option, file)
            if file.resolve().is_relative_to(checkpoint.resolve()):
                what = "would become part of the checkpoint that is verified"
                raise InputError(what, where=f"{option} {file}", fix="give a file outside of it")
    if page is not None:
        from quantcli.verification.report.page import require_plotly

        require_plotly()
    options = VerifyOptions(
        checkpoint,
        full=full,
        against=None if against is None else find_model(against),
        run=run,
        data=data,
        samples=samples,
        length=length,
        tp=_sizes(tp),
        min_sqnr=min_sqnr,
        max_ppl_ratio=max_ppl_ratio,
        max_kl=max_kl,
        workers=workers or default_workers(),
        trust_remote_code=trust_remote_code,
    )
    found = document(work(options, progress or SILENT))
    if junit is not None:
        write_file(junit.resolve(), as_junit(found))
    if page is not None:
        from quantcli.verification.report.page import page as as_page

        write_file(page.resolve(), as_page(found).encode())
    return found


def _sizes(text: str) -> tuple[int, ...]:
    """Tensor parallel sizes: 1,2,4."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) <= 1024 for part in parts):
        raise InputError(
            "tensor parallel sizes are whole numbers", where=f"--tp {text}", fix="--tp 1,2,4"
        )
    return tuple(dict.fromkeys(int(part) for part in parts))
