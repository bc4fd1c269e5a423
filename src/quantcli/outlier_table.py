"""What `inspect --outliers` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantcli.console import count

if TYPE_CHECKING:
    from quantcli.console import Output

_ROWS = 20
_NAMED = 5


def show_outliers(out: Output, account: dict[str, Any]) -> None:
    """The worst modules of `outliers.inspect_outliers`, what the numbers are, a rule for a recipe."""
    modules, ranked_by = account["modules"], account["ranked_by"]
    operands = sorted(account["operands"], key=lambda operand: operand != ranked_by)
    columns = ["module", "shape", *operands, "amax/rms", "kurtosis", "channel", "of the median"]
    rows = [_row(module, operands) for module in modules[:_ROWS]]
    out.table(columns, rows, {*columns[2:]})
    out.line()
    if len(modules) > _ROWS:
        out.line(f"more          {count(len(modules) - _ROWS, 'module')}; --json lists all")
    out.line(
        f"order         worst first by the SQNR of weights in {ranked_by}; 6 dB less is an error of "
        "twice the size"
    )
    for operand in operands:
        out.line(f"schemes       {operand}: {', '.join(account['operands'][operand])}")
    out.line("channel       the input channel (column) with the largest rms, over the median of all")
    out.line("inputs        not seen here: outlier channels of activations do not show in weights")
    for others in account["left_out"]:
        number = count(others["tensors"], "tensor")
        out.line(f"left out      {number}, {others['why']}: {', '.join(others['names'])}")
    for module in modules:
        if bad := module["not_finite"]:
            place = f"`{module['module']}`{bad['index']}"
            out.line(f"damaged       {place} is {bad['value']}: fetch the model again")
    _show_advice(out, account["advice"])


def _row(module: dict[str, Any], operands: list[str]) -> list[str]:
    bad = module["not_finite"]
    decibels = [module["sqnr_db"][operand] for operand in operands]
    return [
        module["module"],
        str(module["shape"]),
        *(bad["value"] if bad else "exact" if db == 200 else f"{db:.1f} dB" for db in decibels),
        _number(module["amax_over_rms"], ".1f"),
        _number(module["kurtosis"], ".2f"),
        _number(module["channel"], "d"),
        _number(module["channel_ratio"], ".2f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _show_advice(out: Output, advice: dict[str, Any] | None) -> None:
    if advice is None:
        out.line("advice        none: no module is far below the median of its kind")
        return
    far = advice["far_below"]
    for entry in far[:_NAMED]:
        out.line(
            f"far below     {entry['module']}: {entry['sqnr_db']:.1f} dB; the median of "
            f"{entry['kind']} is {entry['median_db']:.1f} dB"
        )
    if len(far) > _NAMED:
        out.line(f"far below     {count(len(far) - _NAMED, 'more module')}")
    kept = count(advice["modules"], "module")
    out.line(f"advice        keep {kept} float, with what must have their scheme; before other rules:")
    for line in advice["yaml"].splitlines():
        out.line(line)
