"""Calibration: peak memory over the number of layers, and tokens per second against matmuls alone.

Memory is that of a child process that runs the whole command (ru_maxrss), above that of one that only
imports torch and transformers' model classes. Speed is that of the replay with its observers, without
imports and tokenizing, against the same multiplications of the same batches in bfloat16, on as many
threads of one core each; rounds alternate, medians are compared.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path

from common import QUANTCLI, RECIPES, ROOT, Line, finish, measure, parser, qwen3, workplace, write_model

IMPORTS = "import torch, transformers; transformers.LlamaForCausalLM; transformers.AutoTokenizer"
SLOWEST = 1 / 0.6
GROWTH_BAR = 1.1


def make_model(folder: Path, layers: int, hidden: int) -> int:
    """A Llama of random weights with the tokenizer of the bundled model; bytes of a layer."""
    write_model(folder, qwen3(layers, hidden=hidden))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "head_dim": 64,
        "vocab_size": 16384, "tie_word_embeddings": True, "max_position_embeddings": 4096,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples/tiny-qwen3" / name, folder)
    return 12 * hidden * hidden * 2


def peak(model: Path, out: Path, recipe: str, samples: int, length: int, *options: str) -> int:
    """Peak bytes of `quantcli calibrate`."""
    sizes = ("--set", f"calibration.samples={samples}", "--set", f"calibration.length={length}")
    command = (*QUANTCLI, "calibrate", RECIPES / f"{recipe}.yaml", "--model", model, "--out", out)
    used = measure(*command, "--quiet", *sizes, *options)
    shutil.rmtree(out)
    return used.peak


def seconds(model: Path, out: Path, recipe: str, samples: int, length: int, workers: int) -> float:
    """Wall time of the replay of all layers, in this process."""
    from quantcli.calibration.session import Resources
    from quantcli.commands import calibrate as commands
    from quantcli.core.events import Progress

    class Clock(Progress):
        began = ended = 0.0

        def begin_layers(self, layers: int, done: int, tokens: int) -> None:
            self.began = time.perf_counter()

        def layer(self, name: str, index: int, note: str = "") -> None:
            self.ended = time.perf_counter()

    sets = (f"calibration.samples={samples}", f"calibration.length={length}")
    path = RECIPES / f"{recipe}.yaml"
    session = commands.plan_calibration(path, model=str(model), out=out, overrides=sets)
    clock = Clock()
    commands.calibrate(session, Resources(workers=workers), clock)
    shutil.rmtree(out)
    return clock.ended - clock.began


def matmul_seconds(hidden: int, layers: int, samples: int, length: int, workers: int) -> float:
    """Wall time of the layers' multiplications alone."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from quantcli.calibration.session import BATCH_TOKENS

    shapes = [(hidden, hidden), (hidden // 2, hidden), (hidden // 2, hidden), (hidden, hidden),
              (3 * hidden, hidden), (3 * hidden, hidden), (hidden, 3 * hidden)]  # fmt: skip
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    each = max(1, BATCH_TOKENS // length)
    batches = [min(each, samples - start) for start in range(0, samples, each)]
    inputs = {k: torch.randn(each, length, k).bfloat16() for k in (hidden, 3 * hidden)}

    def work(size: int) -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]][:size], weight)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for _ in range(layers):
            list(pool.map(work, batches))
    torch.set_num_threads(before)
    return time.perf_counter() - started


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--hidden", type=int, default=1024)
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    hidden, workers = options.hidden, options.workers
    lines = []
    with workplace(options.dir) as folder:
        out = folder / "out"
        bare = statistics.median(measure(sys.executable, "-c", IMPORTS).peak for _ in range(3))
        lines.append(Line("import torch and transformers", bare / 2**20, "MiB", None, "subtracted"))
        peaks = {}
        for layers in (4, 16):
            layer_nbytes = make_model(folder / f"m{layers}", layers, hidden)
            used = peak(folder / f"m{layers}", out, "w8a8_static_smooth", 16, 256)
            peaks[layers] = used - bare
            detail = f"{layer_nbytes / 2**20:.0f} MiB a layer, 16 x 256 tokens, {workers} workers"
            lines.append(
                Line(f"peak memory, {layers} layers", peaks[layers] / 2**20, "MiB", None, detail)
            )
        growth = peaks[16] / peaks[4]
        lines.append(Line("peak memory, 16 layers over 4", growth, "x", GROWTH_BAR))
        once = ("--set", "rules.0.scheme={name: w4a4_flatquant, epochs: 1}")
        for layers in (4, 16):
            model = folder / f"learning{layers}"
            layer_nbytes = make_model(model, layers, hidden // 2)
            used = peak(model, out, "w4a4_flatquant", 16, 256, *once)
            peaks[layers] = used - bare
            what = f"peak memory while learning, {layers} layers"
            detail = f"{layer_nbytes / 2**20:.0f} MiB a layer in bfloat16, computed in float32"
            lines.append(Line(what, peaks[layers] / 2**20, "MiB", None, detail))
        growth = peaks[16] / peaks[4]
        lines.append(Line("peak memory while learning, 16 layers over 4", growth, "x", GROWTH_BAR))
        work = 4, 16, 256  # layers, samples, length
        times: dict[str, list[float]] = {"w8a8_static": [], "w8a8_static_smooth": [], "alone": []}
        for _ in range(options.rounds):
            for recipe in ("w8a8_static", "w8a8_static_smooth"):
                times[recipe].append(seconds(folder / "m4", out, recipe, *work[1:], workers))
            times["alone"].append(matmul_seconds(hidden, *work, workers))
        alone = statistics.median(times["alone"])
        tokens = work[1] * work[2]
        for recipe, bar in (("w8a8_static", SLOWEST), ("w8a8_static_smooth", None)):
            took = statistics.median(times[recipe])
            detail = f"{tokens / took:.0f} against {tokens / alone:.0f} tokens per second"
            what = f"{recipe}: time over that of its matmuls alone"
            lines.append(Line(what, took / alone, "x", bar, detail))
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
