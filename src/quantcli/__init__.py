"""quantcli: quantize Hugging Face checkpoints for serving engines, streaming and provable.

The public API, loaded when it is first used, so that `import quantcli` costs nothing:
load_recipe, Checkpoint, open_checkpoint, make_plan, and the functions of `quantcli.commands`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "checkpoint.checkpoint",
    "open_checkpoint": "checkpoint.checkpoint",
    "load_recipe": "recipe.recipe",
    "make_plan": "planning.planner",
    "inspect": "commands.inspect",
    "support": "commands.inspect",
    "prepare": "commands.quantize",
    "quantize": "commands.quantize",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"quantcli.{_HOME[name]}"), name)
    raise AttributeError(f"module 'quantcli' has no attribute {name!r}")
