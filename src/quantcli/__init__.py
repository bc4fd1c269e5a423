"""quantcli: quantize Hugging Face checkpoints for serving engines, streaming and provable.

The public API. Each name is imported when it is first used, so that `import quantcli` is fast:

- inspect, support: the contents of a checkpoint; the pairs of scheme and target that go together
- plan, quantize: check a conversion; run it
- plan_calibration, calibrate: the same for a calibration on its own
- plan_pack, pack: the same for a checkpoint in another format
- verify: check a quantized checkpoint
- load_recipe, open_checkpoint, make_plan, Checkpoint: the steps of a plan
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_HOME = {
    "inspect": "commands.inspect",
    "support": "commands.inspect",
    "plan": "commands.quantize",
    "quantize": "commands.quantize",
    "plan_calibration": "commands.calibrate",
    "calibrate": "commands.calibrate",
    "plan_pack": "commands.pack",
    "pack": "commands.pack",
    "verify": "commands.verify",
    "load_recipe": "recipe.recipe",
    "open_checkpoint": "checkpoint.checkpoint",
    "make_plan": "planning.planner",
    "Checkpoint": "checkpoint.checkpoint",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f"quantcli.{_HOME[name]}"), name)
    raise AttributeError(f"module 'quantcli' has no attribute {name!r}")
