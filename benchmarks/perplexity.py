"""Perplexity of what recipes make of a model, with the engine's arithmetic, against the float model.

    python benchmarks/perplexity.py [--model DIR] [--text FILE] [--data FILE] [--inject | --caches]

--inject multiplies 4 channels of every norm by 50 and divides the columns that read them: the same
function, with outlier channels as large models have them. --caches quantizes the cache of keys and
values alone. Prints a table and one JSON document.
"""

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantcli.calibration.replay.served import Served, log_probs
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands

ROOT = Path(__file__).resolve().parents[1]
CACHES = {"fp8": "compressed-tensors", "fp8_per_head": "compressed-tensors", "c8": "ascend"}
READERS = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
           "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip


def inject(model: Path, folder: Path) -> Path:
    """A copy of a Llama-like model with outlier channels and the same function."""
    shutil.copytree(model, folder)
    tensors = {}
    files = sorted(Path(folder).glob("*.safetensors"))
    for file in files:
        tensors |= load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name in sorted(tensors):
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in READERS:
            channels = torch.randperm(len(tensors[name]), generator=generator)[:4]
            tensors[name][channels] *= 50
            for reader in READERS[norm]:
                tensors[f"{layer}.{reader}.weight"][:, channels] /= 50
    for file in files:
        names = load_file(file).keys()
        save_file({name: tensors[name] for name in names}, file, metadata={"format": "pt"})
    return folder


def cached(folder: Path) -> list[str]:
    """Recipes that quantize the cache alone, in `folder`: measured on the bundled text, 64 samples."""
    data = ROOT / "examples/calibration.txt"
    paths = []
    for cache, target in CACHES.items():
        paths.append(folder / f"kv_{cache}.yaml")
        paths[-1].write_text(
            f"target: {target}\nkv_cache: {cache}\nrules: [{{match: '*', scheme: keep}}]\n"
            f"calibration: {{data: {data}, samples: 64, length: 256}}\n"
        )
    return [str(path) for path in paths]


def windows(model: Path, text: Path, count: int, length: int) -> list[Batch]:
    """The first `count` windows of a text, 8 a batch."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    ids = tokenizer(text.read_text(), verbose=False)["input_ids"][: count * length]
    return [Batch(part, None) for part in torch.tensor(ids).view(count, length).split(8)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=ROOT / "examples/tiny-qwen3")
    parser.add_argument("--text", type=Path, default=ROOT / "examples/evaluation.txt")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--inject", action="store_true")
    parser.add_argument("--caches", action="store_true")
    parser.add_argument("--dtype", default="F32", choices=["F32", "BF16"])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument(
        "recipes", nargs="*", default=["w8a8_dynamic", "w8a8_static", "w8a8_static_smooth"]
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = inject(given.model, Path(folder) / "model") if given.inject else given.model
        batches = windows(model, given.text, given.windows, given.length)
        base = torch.cat(log_probs(open_checkpoint(model), batches, dtype=given.dtype, workers=2))
        result = {"float": math.exp(-base.mean())}
        print(f"{'float':<24} {result['float']:.4f}")
        for name in cached(Path(folder)) if given.caches else given.recipes:
            sets = list(given.set)
            path = Path(name) if name.endswith(".yaml") else ROOT / f"recipes/{name}.yaml"
            if given.data and "\ncalibration:" in path.read_text():
                sets.append(f"calibration.data={given.data}")
            out = Path(folder) / path.stem
            job = commands.plan(path, model=str(model), out=out, overrides=tuple(sets))
            commands.quantize(job)
            served = Served.open(out)
            scores = torch.cat(log_probs(served, batches, dtype=given.dtype, workers=2))
            perplexity = math.exp(-scores.mean())
            change = float((scores - base).abs().mean())
            ratio = perplexity / result["float"]
            result[path.stem] = {"perplexity": perplexity, "ratio": ratio, "log_prob_change": change}
            print(f"{path.stem:<24} {perplexity:.4f}  x {ratio:.4f}  mean |change| {change:.4f}")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
