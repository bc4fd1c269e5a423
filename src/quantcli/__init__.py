"""quantcli: quantize Hugging Face checkpoints for serving engines, streaming and provable.

The Python API; docs/python.md shows it. Each name is imported when it is first used, so that
`import quantcli` is fast.

- quantize, plan: convert a checkpoint with a recipe; what that would write
- release: several checkpoints of one model
- prepare: the same in steps, as a Job: plan, calibrate, convert
- calibrate: keep the statistics for a conversion
- recommend: the shipped recipes for a model on a device, the best first
- pack: write a quantized checkpoint in another format
- verify: check a quantized checkpoint
- reproduce: make one again by its recipe, and compare every byte
- sign, bom: sign all files of a checkpoint; its bill of materials
- inspect, support: the contents of a checkpoint; the pairs of scheme and target that go together
- Planned, Converted, Calibrated, Repacked, Merged, Packed, Verification, Comparison, Inspection,
  Outliers, Support, Recommendation, Released, Reproduction, Signature, Bom: the results
- Event: what `on_progress` is called with
- QuantError and its kinds AnswerNo, InputError, MachineError: the errors
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from quantcli.commands.api import (
        calibrate,
        inspect,
        pack,
        plan,
        prepare,
        quantize,
        recommend,
        support,
        verify,
    )
    from quantcli.commands.release.api import release
    from quantcli.commands.release.outcome import Released
    from quantcli.commands.results import (
        Calibrated,
        Comparison,
        Converted,
        Inspection,
        Merged,
        Outliers,
        Packed,
        Planned,
        Recommendation,
        Repacked,
        Reproduction,
        Support,
        Verification,
    )
    from quantcli.commands.steps import Job
    from quantcli.commands.trust.bom import Bom, bom
    from quantcli.commands.trust.reproduce import reproduce
    from quantcli.commands.trust.sign import Signature, sign
    from quantcli.core.errors import AnswerNo, InputError, MachineError, QuantError
    from quantcli.core.events import Event

__version__ = "0.1.0"

_HOME = {
    "Job": "commands.steps",
    "Bom": "commands.trust.bom",
    "bom": "commands.trust.bom",
    "calibrate": "commands.api",
    "inspect": "commands.api",
    "pack": "commands.api",
    "plan": "commands.api",
    "prepare": "commands.api",
    "quantize": "commands.api",
    "recommend": "commands.api",
    "release": "commands.release.api",
    "reproduce": "commands.trust.reproduce",
    "Released": "commands.release.outcome",
    "sign": "commands.trust.sign",
    "Signature": "commands.trust.sign",
    "support": "commands.api",
    "verify": "commands.api",
    "Calibrated": "commands.results",
    "Comparison": "commands.results",
    "Converted": "commands.results",
    "Inspection": "commands.results",
    "Merged": "commands.results",
    "Outliers": "commands.results",
    "Packed": "commands.results",
    "Planned": "commands.results",
    "Recommendation": "commands.results",
    "Repacked": "commands.results",
    "Reproduction": "commands.results",
    "Support": "commands.results",
    "Verification": "commands.results",
    "AnswerNo": "core.errors",
    "InputError": "core.errors",
    "MachineError": "core.errors",
    "QuantError": "core.errors",
    "Event": "core.events",
}
__all__ = [
    "AnswerNo",
    "Bom",
    "Calibrated",
    "Comparison",
    "Converted",
    "Event",
    "InputError",
    "Inspection",
    "Job",
    "MachineError",
    "Merged",
    "Outliers",
    "Packed",
    "Planned",
    "QuantError",
    "Recommendation",
    "Released",
    "Repacked",
    "Reproduction",
    "Signature",
    "Support",
    "Verification",
    "__version__",
    "bom",
    "calibrate",
    "inspect",
    "pack",
    "plan",
    "prepare",
    "quantize",
    "recommend",
    "release",
    "reproduce",
    "sign",
    "support",
    "verify",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f"quantcli.{_HOME[name]}"), name)
    raise AttributeError(f"module 'quantcli' has no attribute {name!r}")
