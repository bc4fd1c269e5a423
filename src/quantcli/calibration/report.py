"""The report of a layer's calibration: as it is made, and as the store keeps it in JSON, untrusted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from quantcli.core.errors import InputError
from quantcli.core.untrusted.names import tensor_name_fault
from quantcli.core.untrusted.tables import Table
from quantcli.recipe.methods import recipe_methods
from quantcli.targets.vllm_family import EXPERT

EDITS = frozenset({"rows", "columns", "value"})  # the vectors of an `Edit`
_RANGES = ("input_scale", "input_min", "input_max")  # numbers of modules that tables show
TAKEN_FROM = "taken_from"  # in a layer's report: whose statistics modules without tokens take
FEW = (5, 10)  # percent of the mean of a layer's experts


@dataclass
class ModuleReport:
    """A module. tokens: rows of its input.

    routed:  those that the router gave it, if it was shown all tokens; else None.
    numbers: its stats of one number, and those that methods add, such as relative errors, by name.
    remarks: what methods have to say about it, by name.
    """

    tokens: int
    numbers: dict[str, float]
    remarks: dict[str, str] = field(default_factory=dict)
    routed: int | None = None

    def document(self) -> dict[str, Any]:
        """JSON-able data."""
        routed = {} if self.routed is None else {"routed": self.routed}
        return {"tokens": self.tokens, **routed, **self.numbers, **self.remarks}


@dataclass
class LayerReport:
    """A layer.

    edits:        vectors by tensor and kind.
    uncalibrated: modules that no token reached.
    results:      what methods report, dataclasses or JSON-able data; the list of the groups of channels
                  that one has edited is named by its `edited_as`.
    messages:     lines for people, which are not stored.
    note:         a remark for the progress display, which is not stored either.
    """

    layer: str
    modules: dict[str, ModuleReport] = field(default_factory=dict)
    edits: dict[str, dict[str, str]] = field(default_factory=dict)
    uncalibrated: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    note: str = ""

    def document(self) -> dict[str, Any]:
        """JSON-able data."""
        modules = {name: module.document() for name, module in self.modules.items()}
        return {
            "layer": self.layer,
            "modules": modules,
            "experts": expert_tokens(modules),
            "edits": self.edits,
            "uncalibrated": self.uncalibrated,
            **asdict(self)["results"],
        }


@dataclass(frozen=True)
class StoredReport:
    """A layer's report as the store has it.

    modules:      by name: `tokens`, `routed` if it was shown all tokens, and other numbers and texts.
    edits:        the places of vectors by tensor and kind, one of `EDITS`.
    uncalibrated: modules that no token reached.
    taken_from:   by module: whose statistics it takes.
    groups:       of channels that methods have edited, by the methods' `edited_as`.
    """

    modules: Mapping[str, Mapping[str, Any]]
    edits: Mapping[str, Mapping[str, str]]
    uncalibrated: tuple[str, ...]
    taken_from: Mapping[str, str]
    groups: Mapping[str, list[Any]]


def parse_report(table: Table) -> StoredReport:
    """The report in a table. InputError for a value of another type than `LayerReport` writes."""
    edits = table.tables("edits")
    for name, kinds in edits.items():
        _check_name(kinds, name)
        for kind in kinds:
            kinds.text(kind)
            if kind not in EDITS:
                kinds.refuse(kind, "is not an edit that this version knows")
    modules = table.tables("modules")
    for name, module in modules.items():
        _check_name(module, name)
        _check_module(module)
    donors = table.table(TAKEN_FROM, Table({}, table.where))
    words = filter(None, (method.edited_as for method in recipe_methods().values()))
    return StoredReport(
        {name: module.value for name, module in modules.items()},
        {name: {kind: kinds.text(kind) for kind in kinds} for name, kinds in edits.items()},
        table.texts("uncalibrated"),
        {name: donors.text(name) for name in donors},
        {word: table.sequence(word, []) for word in words},
    )


def _check_name(entry: Table, name: str) -> None:
    if (fault := tensor_name_fault(name)) is not None:
        raise InputError(fault, where=entry.where, fix=entry.fix)


def _check_module(module: Table) -> None:
    module.integer("tokens")
    module.integer("routed", None)
    for key in _RANGES:
        module.number(key, None)
    for key, value in module.value.items():
        if type(value) not in {int, float, str}:
            module.refuse(key, "should be a number or text")


def expert_tokens(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tokens that the router gave to each expert, by the name of a layer's experts: JSON-able.

    modules: documents of modules. `tokens`: by the expert's number; `mean`: of these; `below_5_pct` and
    `below_10_pct`: numbers of the experts with fewer tokens than so much of the mean. `shown`: tokens
    that each of them was shown, if these were all.
    """
    counts: dict[str, dict[int, int]] = defaultdict(dict)
    everywhere: dict[str, int] = {}
    for name, module in modules.items():
        if expert := EXPERT.fullmatch(name):
            numbers, number = counts[expert["experts"]], int(expert["index"])
            numbers[number] = max(numbers.get(number, 0), module.get("routed", module["tokens"]))
            if "routed" in module:
                everywhere[expert["experts"]] = module["tokens"]
    table: dict[str, Any] = {}
    for name, numbers in sorted(counts.items()):
        mean = sum(numbers.values()) / len(numbers)
        table[name] = {
            "tokens": {str(number): n for number, n in sorted(numbers.items())},
            "mean": mean,
            **{
                f"below_{p}_pct": [e for e, n in sorted(numbers.items()) if 100 * n < p * mean]
                for p in FEW
            },
            **({"shown": everywhere[name]} if name in everywhere else {}),
        }
    return table
