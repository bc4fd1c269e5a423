"""The real engine as seen from here: its answers for a checkpoint, and how far from float they are."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
SERVE = Path(__file__).with_name("serve.py")
PROBE = Path(__file__).with_name("probe_amx.py")
PYTHON = ROOT / ".venv-engine/bin/python"
CPU = Literal["pinned", "listed", "own"]


@dataclass(frozen=True)
class Answer:
    """What vLLM made of a checkpoint.

    log_probs: of each token of each window but the first; best: the likeliest token at each place.
    continued, again: greedy continuations of the prompts, twice; texts: the first as text.
    kernels: how many modules each kernel computes. stand_ins: what vLLM's CPU build lacks and
    stand_ins.py had to compute; empty where vLLM served it alone. libraries: vLLM's own that were
    loaded. seconds: to load and to answer.
    """

    log_probs: tuple[tuple[float, ...], ...]
    best: tuple[tuple[int, ...], ...]
    continued: tuple[tuple[int, ...], ...]
    again: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    kernels: Mapping[str, int]
    stand_ins: tuple[str, ...]
    libraries: tuple[str, ...]
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp of minus the mean log-probability."""
        flat = [value for window in self.log_probs for value in window]
        return math.exp(-math.fsum(flat) / len(flat))


@dataclass(frozen=True)
class Refused:
    """vLLM did not serve it, and said this."""

    error: str


@dataclass(frozen=True)
class Distance:
    """How far a checkpoint's answer is from the float model's.

    ratio: of perplexities; error: its standard error, as the text is a sample. agreement: share of
    places with the same likeliest token. change: mean |difference| of log-probabilities, in nats a
    token.
    """

    ratio: float
    error: float
    agreement: float
    change: float


def distance(answer: Answer, base: Answer) -> Distance:
    """Of one checkpoint's answer from another's to the same windows."""
    ours, theirs = (sum(a.log_probs, ()) for a in (answer, base))
    same = [a == b for a, b in zip(sum(answer.best, ()), sum(base.best, ()), strict=True)]
    changes = [a - b for a, b in zip(ours, theirs, strict=True)]
    ratio = answer.perplexity / base.perplexity
    return Distance(
        ratio=ratio,
        error=ratio * statistics.pstdev(changes) / math.sqrt(len(changes)),
        agreement=sum(same) / len(same),
        change=math.fsum(map(abs, changes)) / len(changes),
    )


def windows(model: Path, text: Path, count: int, length: int) -> list[list[int]]:
    """The first `count` windows of `length` tokens of a text."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    ids = tokenizer(text.read_text(), verbose=False)["input_ids"]
    if len(ids) < count * length:
        raise ValueError(f"{text} has {len(ids)} tokens, not {count} x {length}")
    return [ids[start : start + length] for start in range(0, count * length, length)]


def serve(
    checkpoints: Mapping[str, Path],
    windows: Sequence[Sequence[int]],
    *,
    prompts: Sequence[Sequence[int]] = ((1, 2, 3),),
    tokens: int = 16,
    cpu: CPU = "pinned",
    untracked: Sequence[str] = (),
    log: Path | None = None,
) -> dict[str, Answer | Refused]:
    """Serve each checkpoint with vLLM. RuntimeError with the engine's words if that itself breaks down.

    windows, prompts: token ids. cpu: "pinned" to the instructions that make every CPU answer alike,
    also one made to list AMX ("listed"), or its "own": serve.py says more. untracked: checkpoints whose
    loader cannot tell vLLM what it has filled. log: where the engine's words go.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answers = Path(folder) / "request.json", Path(folder) / "answers.json"
        log = log or Path(folder) / "log"
        room = 16 * -(-(max(map(len, [*windows, *prompts])) + tokens) // 16)
        asked = {"checkpoints": {name: str(path.resolve()) for name, path in checkpoints.items()},
                 "windows": windows, "prompts": prompts, "tokens": tokens, "length": room,
                 "cpu": cpu, "untracked": untracked}  # fmt: skip
        request.write_text(json.dumps(asked))
        with log.open("w") as words:
            command = [PYTHON, SERVE, request, answers]
            done = subprocess.run(
                command, env=kept_environment(), cwd=folder, stdout=words, stderr=words
            )
        if done.returncode or not answers.exists():
            raise RuntimeError(f"vLLM exited with {done.returncode}:\n{log.read_text()[-4000:]}")
        found: dict[str, Any] = json.loads(answers.read_text())
    return {name: _answer(one) for name, one in found.items()}


def flags() -> set[str]:
    """What this CPU can do, in Linux's words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def no_amx() -> str | None:
    """Why vLLM cannot use AMX here; None if it can."""
    if not {"amx_tile", "amx_int8", "amx_bf16"} <= flags():
        return "this CPU has no AMX"
    done = subprocess.run([PYTHON, PROBE], env=kept_environment(), capture_output=True, text=True)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"this CPU lists AMX, but a process that uses it dies of {name}"
    if done.returncode:
        return f"this CPU lists AMX, but: {done.stderr.strip().splitlines()[-1]}"
    return None


def kept_environment() -> dict[str, str]:
    """The environment without this one's packages and its settings for tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST"))}


def _answer(found: dict[str, Any]) -> Answer | Refused:
    if "error" in found:
        return Refused(found["error"])
    for key in ("log_probs", "best", "continued", "again", "texts", "stand_ins", "libraries"):
        found[key] = tuple(tuple(v) if isinstance(v, list) else v for v in found[key])
    return Answer(**found)
