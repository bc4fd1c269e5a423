"""The options of a verification: name, type, default and help of each, once. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantcli.core.cluster.executor import THREADS, Executor, parse_executor
from quantcli.core.errors import InputError

# The fewest windows that can decide whether a checkpoint is better. Between equal checkpoints the
# changes of six windows have one sign in 3 % of cases. Those of five do in 6 %: too often for a 95 %
# interval.
LEAST_WINDOWS = 6


def _option(help_: str, default: Any = None, **more: Any) -> Any:
    """A field with its default; its metadata are for the command line: `help`, `metavar`, `min`."""
    return field(default=default, metadata={"help": help_, **more})


@dataclass(frozen=True)
class VerifyOptions:
    """The checkpoint to verify, how deep, and the limits. InputError for options that exclude others.

    checkpoint: a folder, or the id of a repository of the Hub. others: more of them.
    A limit of None is that of `recipe`, else the default, or the checkpoint's own if that is tighter.
    """

    checkpoint: str | Path = field(
        metadata={"help": "Quantized checkpoint, whoever wrote it: folder, Hub id or address."}
    )
    others: Sequence[str | Path] | None = None
    identity: Path | None = _option(  # noqa: RUF009
        "Check the signature, and every file against it. FILE has the public key of whoever must have "
        "signed, or certificates that the signer's must lead to.",
        metavar="FILE",
    )
    signer: str | None = _option(
        "With certificates: the name that the signer's must have, such as an e-mail address.",
        metavar="NAME",
    )
    full: bool = _option("Read every byte: hashes, NaN, ranges.", False)
    against: str | None = _option(
        "Compare with the float model, or a quantized one: folder, Hub id or address.",
        metavar="MODEL",
    )
    calibration: Path | None = _option(  # noqa: RUF009
        "Calibration that `quantize` kept: numbers that follow from it are recomputed.", metavar="DIR"
    )
    run: bool = _option("Run both on --data, as the engine computes; needs --against.", False)
    data: list[str] | None = _option(  # noqa: RUF009
        "Text for --run; may be given several times.", metavar="FILE"
    )
    samples: int = _option("Windows of each text.", 32, min=1)
    length: int = _option("Tokens of each window.", 256, min=2)
    layer: list[str] | None = _option(  # noqa: RUF009
        "Trace a module on the text: its input, its output, and where the error comes from. May be "
        "given several times.",
        metavar="MODULE",
    )
    served: str | None = _option(
        "Also ask a server of the API of OpenAI that runs the checkpoint, such as vLLM, for its "
        "log-probabilities.",
        metavar="URL",
    )
    tasks: list[str] | None = _option(  # noqa: RUF009
        "Also score both on a task of lm-evaluation-harness, by name or as a YAML file; may be given "
        "several times.",
        metavar="TASK",
    )
    task_docs: int | None = _option("Documents of each task [default: all].", min=1)
    tp: str = _option("Tensor parallel sizes to serve with, as in 1,2,4,8.", "1", metavar="SIZES")
    recipe: str | None = _option("Your recipe: its `verify` block sets limits.", metavar="FILE")
    min_sqnr: float | None = _option("Least SQNR of each weight, dB.")
    max_ppl_ratio: float | None = _option("Largest ratio of the perplexity to MODEL's.")
    max_kl: float | None = _option("Largest mean KL divergence, nats per token.")
    baseline: Path | None = _option(  # noqa: RUF009
        "Also show the change against an earlier report: what --json printed.", metavar="OLD.json"
    )
    not_worse: bool = _option(
        "Fail if the KL divergence is worse than that of the first checkpoint, or of --baseline.", False
    )
    card: bool = _option(
        "If it passes, write the figures into the checkpoint's own README.md and manifest.", False
    )
    junit: Path | None = _option("Also write the outcome as JUnit XML.", metavar="FILE")  # noqa: RUF009
    page: Path | None = None  # HTML
    workers: int | None = None  # None: one for each core, or a few for each task of a cluster
    executor: str = THREADS
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        limits = {
            "--min-sqnr": self.min_sqnr,
            "--max-ppl-ratio": self.max_ppl_ratio,
            "--max-kl": self.max_kl,
        }
        for option, limit in limits.items():
            if limit is not None and not (math.isfinite(limit) and limit > 0):
                raise InputError(
                    f"{limit} is not a limit", where=f"{option} {limit}", fix="give a number"
                )
        _ = self.tp_sizes, self.cluster
        if self.signer is not None and self.identity is None:
            what, fix = "--signer has no effect without --identity", "add --identity FILE"
            raise InputError(what, fix=fix)
        if self.run and self.against is None:
            what = "--run compares two models, and there is one"
            raise InputError(what, fix="give the float one: --against MODEL")
        if self.run and not self.data:
            raise InputError("--run needs text", fix="give --data FILE: text, or jsonl with `text`")
        if self.not_worse and not (self.run and (self.others or self.baseline)):
            what = "--not-worse compares runs on text, and there is one"
            raise InputError(what, fix="add --run, and another checkpoint or --baseline OLD.json")
        if self.not_worse and self.samples < LEAST_WINDOWS:
            what = f"--not-worse needs {LEAST_WINDOWS} windows of each text: fewer decide nothing"
            raise InputError(what, where=f"--samples {self.samples}", fix="raise it, or leave it out")
        if self.task_docs is not None and not self.tasks:
            raise InputError("--task-docs has no effect without --tasks", fix="add --tasks TASK")
        if self.served is not None and self.others:
            what = "--served asks one server, and there are several checkpoints"
            raise InputError(what, fix="give the one that it serves")
        of_run = {
            "--data": self.data or None,
            "--layer": self.layer or None,
            "--served": self.served,
            "--tasks": self.tasks or None,
        }
        with_against = {"--recipe": self.recipe, "--calibration": self.calibration}
        for option, value in {**of_run, **with_against, **limits}.items():
            with_run = option != "--min-sqnr" and option not in with_against
            other = "--run" if with_run else "--against MODEL"
            if value is not None and not (self.run if with_run else self.against is not None):
                raise InputError(f"{option} has no effect without {other}", fix=f"add {other}")

    @property
    def checkpoints(self) -> tuple[str | Path, ...]:
        """All checkpoints; the other options apply to each of them."""
        return (self.checkpoint, *(self.others or ()))

    @property
    def cluster(self) -> Executor | None:
        """The cluster whose nodes do the checks; None: threads of this process."""
        return parse_executor(self.executor)

    @property
    def depths(self) -> tuple[str, ...]:
        """The depths that are asked for, in their order."""
        identity = self.identity is not None
        deeper = {
            "identity": identity,
            "full": self.full,
            "against": self.against is not None,
            "run": self.run,
        }
        return ("structure", *(depth for depth, is_asked in deeper.items() if is_asked))

    @property
    def tp_sizes(self) -> tuple[int, ...]:
        """The numbers in `tp`, each once."""
        parts = self.tp.split(",")
        if not all(part.strip().isdecimal() and 0 < int(part) <= 1024 for part in parts):
            what = "tensor parallel sizes are whole numbers"
            raise InputError(what, where=f"--tp {self.tp}", fix="--tp 1,2,4")
        return tuple(dict.fromkeys(int(part) for part in parts))
