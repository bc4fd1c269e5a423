"""What the benchmarks share: synthetic models, measured child processes, tables.

Importing this imports no torch. A child's peak memory begins with that of the process it was forked
from, so the process that measures must stay smaller than the one that is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantcli.checkpoint.header import encode_header
from quantcli.checkpoint.spec import TensorSpec

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
QUANTCLI: tuple[str | Path, ...] = (sys.executable, "-m", "quantcli")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_POOL = 8 * 2**20  # random weights to cut tensors from, in elements


@dataclass(frozen=True)
class Usage:
    """What a child process took: seconds, and bytes of peak resident memory."""

    wall: float
    user: float
    system: float
    peak: int

    @property
    def cpu(self) -> float:
        """CPU seconds of all its threads."""
        return self.user + self.system


def measure(*command: str | Path, env: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end, output thrown away; `env` is added to the environment.

    RuntimeError with its stderr if it fails.
    """
    arguments = [str(word) for word in command]
    variables = os.environ | dict(env or {})
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=errors, env=variables)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            words = errors.read().decode(errors="replace")
            raise RuntimeError(f"{arguments} exited with {child.returncode}:\n{words}")
    return Usage(wall, used.ru_utime, used.ru_stime, used.ru_maxrss * 1024)


def conversion(recipe: str, model: Path, out: Path, *options: str) -> list[str]:
    """The words after `quantcli` that convert `model` with a recipe of this repository."""
    words = ["quantize", RECIPES / f"{recipe}.yaml", "--model", model, "--out", out, "--quiet"]
    return [str(word) for word in (*words, *options)]


def quantize(recipe: str, model: Path, out: Path, *options: str) -> Usage:
    """Convert `model` in a process of its own and delete the output."""
    used = measure(*QUANTCLI, *conversion(recipe, model, out, *options))
    shutil.rmtree(out)
    return used


def quantize_to(
    out: Path,
    recipe: Path,
    model: Path,
    *,
    overrides: tuple[str, ...] = (),
    workers: int = 2,
    block_elements: int | None = None,
) -> None:
    """Convert `model` in this process, with torch; `block_elements` is not on the command line."""
    from quantcli.commands import quantize as commands
    from quantcli.commands.job import JobOptions
    from quantcli.convert.execute import RunOptions, execute

    job = commands.plan(
        recipe, model=str(model), out=out, overrides=overrides, options=JobOptions(workers)
    )
    blocks: dict[str, Any] = {} if block_elements is None else {"block_elements": block_elements}
    execute(job.plan, job.out, RunOptions(workers, **blocks))


def warm_up(words: Sequence[str]) -> None:
    """Run a quantcli command in this process, output thrown away: children forked from now on have
    behind them what the command has imported, compiled or loaded. Torch keeps to one thread, without
    which forking is not safe.
    """
    import torch

    from quantcli.__main__ import main

    torch.set_num_threads(1)
    nowhere, stdout = os.open(os.devnull, os.O_WRONLY), os.dup(1)
    os.dup2(nowhere, 1)
    try:
        main(list(words))
    except SystemExit as end:
        if end.code:
            raise
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def fork(words: Sequence[str], log: Path, around: AbstractContextManager[object] | None = None) -> int:
    """Start a quantcli command in a fork of this process, within `around` there; its output goes to
    `log`. Returns the child's process id.
    """
    child = os.fork()
    if child:
        return child
    code: object = 99
    try:
        from quantcli.__main__ import main

        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        with around or nullcontext():
            main(list(words))
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code if isinstance(code, int) else 98)


def reap(child: int) -> tuple[int, Usage]:
    """Wait for a forked child: its exit code, negative where a signal ended it, and what it took."""
    started = time.perf_counter()
    _, status, used = os.wait4(child, 0)
    wall = time.perf_counter() - started
    usage = Usage(wall, used.ru_utime, used.ru_stime, used.ru_maxrss * 1024)
    return os.waitstatus_to_exitcode(status), usage


def qwen3(layers: int, *, hidden: int = 2048, vocab: int = 16384) -> list[TensorSpec]:
    """The tensors of a dense Qwen3 with tied embeddings; 101 MB a layer where hidden is 2048."""
    specs = [_weight("model.embed_tokens", vocab, hidden), _weight("model.norm", hidden)]
    for layer in range(layers):
        name = f"model.layers.{layer}"
        specs += [_weight(f"{name}.{norm}", hidden) for norm in _NORMS]
        specs += _attention(f"{name}.self_attn", hidden)
        specs += _mlp(f"{name}.mlp", hidden, 3 * hidden)
    return specs


def qwen3_moe(layers: int, experts: int, *, hidden: int, width: int) -> list[TensorSpec]:
    """The tensors of a Qwen3-MoE with one 2-D tensor per expert and projection."""
    specs = [_weight("model.embed_tokens", 4096, hidden), _weight("model.norm", hidden)]
    for layer in range(layers):
        name = f"model.layers.{layer}"
        specs += [_weight(f"{name}.{norm}", hidden) for norm in _NORMS]
        specs += _attention(f"{name}.self_attn", hidden)
        specs.append(_weight(f"{name}.mlp.gate", experts, hidden))
        for expert in range(experts):
            specs += _mlp(f"{name}.mlp.experts.{expert}", hidden, width)
    return specs


def _attention(name: str, hidden: int) -> list[TensorSpec]:
    sides = {"q_proj": hidden, "k_proj": hidden // 2, "v_proj": hidden // 2, "o_proj": hidden}
    return [_weight(f"{name}.{module}", side, hidden) for module, side in sides.items()]


def _mlp(name: str, hidden: int, width: int) -> list[TensorSpec]:
    up = [_weight(f"{name}.{module}", width, hidden) for module in ("gate_proj", "up_proj")]
    return [*up, _weight(f"{name}.down_proj", hidden, width)]


def _weight(module: str, *shape: int) -> TensorSpec:
    return TensorSpec(f"{module}.weight", "BF16", shape)


def write_model(
    folder: Path, specs: Sequence[TensorSpec], *, shards: int = 4, sparse: bool = False
) -> int:
    """Write a bf16 model of about equal shards, tensor by tensor; returns the bytes of its weights.

    Weights are normal with deviation 0.02, cut at seeded places from one seeded pool: real bytes,
    made at the speed of the disk. `sparse` leaves them out: files of the same size without data.
    """
    folder.mkdir()
    pool = np.empty(0, np.uint16) if sparse else _random_bf16(_POOL)
    cuts = np.random.default_rng(1)
    total = sum(spec.nbytes for spec in specs)
    groups: list[list[TensorSpec]] = [[] for _ in range(shards)]
    position = 0
    for spec in specs:
        groups[min(position * shards // total, shards - 1)].append(spec)
        position += spec.nbytes
    groups = [group for group in groups if group]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= {spec.name: file for spec in group}
        with (folder / file).open("wb") as stream:
            stream.write(encode_header(group))
            if sparse:
                stream.truncate(stream.tell() + sum(spec.nbytes for spec in group))
                continue
            for spec in group:
                left = spec.nbytes // 2
                while left:
                    start = int(cuts.integers(len(pool)))
                    values = pool[start : start + left]
                    stream.write(values.data)
                    left -= len(values)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return total


def _random_bf16(count: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Normal values with deviation 0.02 as the bits of bf16, cut off rather than rounded."""
    random = np.random.default_rng(0)
    bits = np.empty(count, np.uint16)
    step = 2**20
    for start in range(0, count, step):
        values = random.standard_normal(min(step, count - start), np.float32) * np.float32(0.02)
        bits[start : start + step] = values.view(np.uint32) >> 16
    return bits


def drop_caches() -> bool:
    """Write what waits to the disk and empty the page cache of the machine; False if only root may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """A new directory in `folder` (default: that for temporary files), deleted in the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quantcli-bench-", dir=folder) as name:
        yield Path(name).resolve()


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by relative path."""
    table = {}
    for path in sorted(p for p in folder.rglob("*") if not p.is_dir()):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        table[path.relative_to(folder).as_posix()] = digest
    return table


@dataclass(frozen=True)
class Line:
    """One measured value and its bars, if it has any: `bar` is a maximum, `floor` a minimum."""

    what: str
    value: float
    unit: str
    bar: float | None = None
    detail: str = ""
    floor: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the bars are met. NaN meets none."""
        above = self.floor is None or self.value >= self.floor
        return above and (self.bar is None or self.value <= self.bar)

    @property
    def bars(self) -> str:
        """The bars as text; empty if the value is for information."""
        low = [] if self.floor is None else [f">= {self.floor:g}"]
        return ", ".join(low + ([] if self.bar is None else [f"<= {self.bar:g}"]))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", action="store_true", help="print one JSON document")
    made.add_argument("--dir", type=Path, help="where to work [default: a temporary directory]")
    return made


def finish(lines: Sequence[Line], *, as_json: bool) -> None:
    """Print the result, as a markdown table or as JSON, and exit with 1 if a bar is not met."""
    ok = all(line.ok for line in lines)
    if as_json:
        print(json.dumps({"ok": ok, "lines": [asdict(line) | {"ok": line.ok} for line in lines]}))
    else:
        print("| what | value | bar | | detail |\n|---|---|---|---|---|")
        for line in lines:
            verdict = "" if not line.bars else "ok" if line.ok else "MISSED"
            value = f"{line.value:.3g} {line.unit}".strip()
            print(f"| {line.what} | {value} | {line.bars} | {verdict} | {line.detail} |")
    sys.exit(0 if ok else 1)


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
