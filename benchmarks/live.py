"""Peak resident memory of a conversion of a transformers model in memory, above the model itself.

The model is built in a child process, which first converts a tiny one, so that imports and kernels are
there; then the kernel's mark of the peak is reset. So the figure is what the conversion takes above all
that. Two sizes of a dense model, and one with experts, which are stored together in memory and apart in
a checkpoint. A copy of the model would show as its size.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import Line, finish, parser, workplace

BAR = 48.0  # MiB, as for a conversion of files: benchmarks/memory.py
DENSE = {"hidden_size": 2048, "intermediate_size": 6144, "vocab_size": 16384, "head_dim": 128,
         "num_attention_heads": 16, "num_key_value_heads": 8}  # fmt: skip
EXPERTS = DENSE | {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 768}
TINY = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}  # fmt: skip
_ROUNDS = 3


def build(family: str, sizes: dict[str, Any]) -> Any:
    """A model in bfloat16 with random weights."""
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def child(family: str, sizes: dict[str, Any], recipe: str, workers: int, folder: Path) -> None:
    """Convert, and print the bytes of the model and of the peak above it."""
    import quantcli

    tiny = {**TINY, **({"num_experts": 2, "moe_intermediate_size": 64} if "Moe" in family else {})}
    quantcli.quantize(recipe, model=build(family, tiny), out=folder / "tiny", workers=workers)
    model = build(family, sizes)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    quantcli.quantize(recipe, model=model, out=folder / "out", workers=workers)
    print(json.dumps([nbytes, status("VmHWM") - before]))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--layers", type=int, nargs="+", default=[9, 18], help="101 MB each")
    arguments.add_argument("--child", nargs=3, help="for itself")
    options = arguments.parse_args()
    if options.child:
        family, sizes, recipe = options.child
        child(family, json.loads(sizes), recipe, options.workers, options.dir)
        return
    cases = [
        ("Qwen3", DENSE | {"num_hidden_layers": layers}, "w8a8_dynamic") for layers in options.layers
    ]
    cases.append(("Qwen3Moe", EXPERTS | {"num_hidden_layers": 3}, "w8a8_moe_dynamic"))
    lines = []
    for family, sizes, recipe in cases:
        found = []
        for _ in range(_ROUNDS):
            with workplace(options.dir) as folder:
                flags = ["--dir", str(folder), "--workers", str(options.workers)]
                words = [sys.executable, __file__, *flags, "--child", family, json.dumps(sizes), recipe]
                done = subprocess.run(words, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
        peak = statistics.median(above for _, above in found) / 2**20
        what = f"{recipe}, {family} of {found[0][0] / 1e9:.1f} GB in memory"
        lines.append(Line(what, peak, "MiB", BAR, f"{options.workers} workers"))
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
