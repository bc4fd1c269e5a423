"""`--device npu` on the stand-in for torch_npu, in a process of its own: python run_npu.py FOLDER.

Prints what happened as JSON, by case. Torch keeps a new device until the process ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantcli.calibration.replay.devices import open_device
from quantcli.core.errors import QuantError
from tests.e2e.calibrating import RECIPE, SMOOTH, Bench, make_bench, write_tokenizer
from tests.tiny_models import make_tiny

LAYERS = 2
RECIPES = {
    "static": SMOOTH,
    "histogram": SMOOTH.replace(", observer: minmax", ""),
    "quantized": SMOOTH.replace("data:", "inputs: quantized, data:"),
    "gptq": RECIPE.replace("name: w8a8_static, observer: minmax", "name: w8a16, weight_rounding: gptq"),
    "learned": RECIPE.replace("*_proj", "*.0.self_attn.?_proj").replace(
        "name: w8a8_static, observer: minmax",
        "name: w4a4_flatquant, epochs: 1, weight_rounding: gptq",
    ),
}


def error_of(action: Callable[[], object]) -> dict[str, Any]:
    """The error that an action raises."""
    try:
        action()
    except QuantError as error:
        return {"what": error.what, "fix": error.fix, "code": int(error.exit_code)}
    return {}


def main(root: Path) -> dict[str, Any]:
    """All cases. Outputs stay in `root`: CASE/cpu and CASE/npu."""
    cases: dict[str, Any] = {}
    for driver in ("absent", "conflict"):
        os.environ["STAND_IN_DRIVER"] = driver
        cases[driver] = error_of(lambda: open_device("npu"))
    del os.environ["STAND_IN_DRIVER"]
    import torch_npu

    make_tiny(root / "model", "qwen3", num_hidden_layers=LAYERS)
    write_tokenizer(root / "model")

    def bench(name: str) -> Bench:
        folder = root / name
        folder.mkdir()
        return make_bench(folder, root / "model", RECIPES[name.partition("-")[0]])

    for name in RECIPES:
        torch_npu.record = torch_npu.Record()
        box = bench(name)
        runs = {device: box.at(device).run("--device", device) for device in ("cpu", "npu")}
        cases[name] = {
            "codes": [runs[device].code for device in ("cpu", "npu")],
            "err": runs["npu"].err,
            "operations": torch_npu.record.operations,
            "float64": sorted(torch_npu.record.float64),
            "used": torch_npu.record.used,
            "most": torch_npu.record.most,
        }
    most = cases["static"]["most"]
    cases["memory"] = memory(torch_npu, bench("static-memory"), most)
    torch_npu.devices = 0
    cases["no device"] = asdict(bench("static-none").run("--device", "npu"))
    torch_npu.devices = 1
    cases["no second"] = asdict(bench("static-second").run("--device", "npu:1"))
    return cases


def memory(torch_npu: Any, box: Bench, most: int) -> list[dict[str, Any]]:
    """Runs with too little memory for a layer, then for its work after a layer is done, then enough."""
    results = []
    for capacity in (1000, most - 1000, 2**40):
        torch_npu.record = torch_npu.Record()
        torch_npu.capacity = capacity
        results.append(asdict(box.run("--device", "npu", "-v")))
    return results


if __name__ == "__main__":
    found = main(Path(sys.argv[1]))
    Path(sys.argv[1], "cases.json").write_text(json.dumps(found))
