"""Conversion of quantized sources to W8A8_DYNAMIC, against that of the bf16 model of the same shapes.

CPU time is user + system seconds of the whole command, less those of a nearly empty model, and the
median of a few rounds in which the kinds take turns. Memory is the peak of that process above that of
`python -c 'import torch'`. Codes are random; scales are small.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common import Line, Usage, finish, measure, parser, quantize, qwen3, workplace, write_model
from quantcli.checkpoint.header import encode_header
from quantcli.checkpoint.spec import TensorSpec

RATIO = 2.5  # of CPU time, of FP8 blocks
MEMORY = 96.0  # MiB
GROUP = 128
KINDS = {
    "fp8 blocks": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fp8 per channel": {"quant_method": "fbgemm_fp8"},
    "compressed-tensors int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
                "input_activations": {
                    "num_bits": 8, "type": "int", "strategy": "token", "dynamic": True,
                },
            }
        },
    },
    "compressed-tensors int4": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP,
                    "symmetric": False,
                },
                "input_activations": None,
            }
        },
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False},
    "gptq act-order": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True},
}  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=8, help="101 MB of bf16 each [default: 8]")
    arguments.add_argument("--hidden", type=int, default=2048)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    lines = []
    with workplace(options.dir) as folder:
        out, specs = folder / "out", qwen3(options.layers, hidden=options.hidden)
        write_model(folder / "empty", qwen3(1, hidden=16, vocab=16))
        write_model(folder / "bf16", specs)
        for kind, settings in KINDS.items():
            write_source(folder / kind, specs, kind, settings)
        used: dict[str, list[Usage]] = {name: [] for name in ("empty", "bf16", *KINDS)}
        for _ in range(options.rounds):
            for name, found in used.items():
                words = ("--no-checksum", "--workers", str(options.workers))
                found.append(quantize("w8a8_dynamic", folder / name, out, *words))
        bare = statistics.median(measure(sys.executable, "-c", "import torch").peak for _ in range(5))
        start = statistics.median(usage.cpu for usage in used.pop("empty"))
        cpu = {name: statistics.median(u.cpu for u in found) - start for name, found in used.items()}
        for name, found in used.items():
            bar = RATIO if name == "fp8 blocks" else None
            said = f"{cpu[name]:.2f} s of CPU"
            lines.append(Line(f"{name}: time of bf16", cpu[name] / cpu["bf16"], "x", bar, said))
            peak = max(usage.peak for usage in found) - bare
            said = f"{options.workers} workers"
            lines.append(Line(f"{name}: memory", peak / 2**20, "MiB", MEMORY, said))
        shutil.rmtree(folder / "bf16")
    finish(lines, as_json=options.json)


def write_source(folder: Path, specs: list[TensorSpec], kind: str, settings: object) -> None:
    """A model of one file whose projections are quantized."""
    random = np.random.default_rng(0)
    tensors: list[tuple[TensorSpec, bytes]] = []
    for spec in specs:
        if not spec.name.endswith("_proj.weight"):
            tensors.append((spec, np.full(spec.shape, 0x3C00, "<u2").tobytes()))
            continue
        tensors += module(spec.name.removesuffix(".weight"), *spec.shape, kind, random)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(encode_header(spec for spec, _ in tensors))
        for _, data in tensors:
            stream.write(data)
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16"}
    table = {**config, "tie_word_embeddings": True, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(table))


def module(
    name: str, n: int, k: int, kind: str, random: np.random.Generator
) -> Iterator[tuple[TensorSpec, bytes]]:
    """The tensors of one projection."""

    def codes(suffix: str, dtype: str, *shape: int) -> tuple[TensorSpec, bytes]:
        spec = TensorSpec(f"{name}.{suffix}", dtype, shape)
        data = random.integers(0, 256, spec.nbytes, np.uint8)
        if dtype == "F8_E4M3":
            data[data & 0x7F == 0x7F] = 0x30  # NaN
        return spec, data.tobytes()

    def scale(suffix: str, dtype: str, *shape: int) -> tuple[TensorSpec, bytes]:
        values = random.uniform(1e-3, 2e-3, shape).astype("<f2" if dtype == "F16" else "<f4")
        return TensorSpec(f"{name}.{suffix}", dtype, shape), values.tobytes()

    groups = -(-k // GROUP)
    if kind == "fp8 blocks":
        yield codes("weight", "F8_E4M3", n, k)
        yield scale("weight_scale_inv", "F32", -(-n // 128), -(-k // 128))
    elif kind == "fp8 per channel":
        yield codes("weight", "F8_E4M3", n, k)
        yield scale("weight_scale", "F32", n, 1)
    elif kind == "compressed-tensors int8":
        yield codes("weight", "I8", n, k)
        yield scale("weight_scale", "F32", n, 1)
    elif kind == "compressed-tensors int4":
        yield codes("weight_packed", "I32", n, k // 8)
        yield scale("weight_scale", "F32", n, groups)
        yield codes("weight_zero_point", "I32", n // 8, groups)
        yield TensorSpec(f"{name}.weight_shape", "I64", (2,)), np.array([n, k], "<i8").tobytes()
    else:
        shape = (k, n // 8) if kind == "awq" else (k // 8, n)
        yield codes("qweight", "I32", *shape)
        yield codes("qzeros", "I32", groups, n // 8)
        yield scale("scales", "F16", groups, n)
        if kind != "awq":
            order = random.permutation(k) if kind == "gptq act-order" else np.arange(k)
            index = (order // GROUP).astype("<i4")
            yield TensorSpec(f"{name}.g_idx", "I32", (k,)), index.tobytes()


if __name__ == "__main__":
    main()
