"""Tasks of lm-evaluation-harness, answered by both models through the replay.

The harness makes requests of a task's documents and scores the answers; here are only the
log-probabilities that it asks for. All requests go through a layer together.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from quantcli.calibration.replay.served import Forward, Served, token_log_probs
from quantcli.calibration.text.dataset import Batch
from quantcli.calibration.text.documents import sentence
from quantcli.calibration.text.tokenizer import Tokenizer
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.environment import environment
from quantcli.core.errors import InputError, MachineError, QuantError, one_of
from quantcli.core.events import Progress
from quantcli.core.text import pip_install
from quantcli.recipe.document import load_document
from quantcli.verification.on_text import metrics
from quantcli.verification.on_text.reports import TaskReport

_BATCH_TOKENS = 2048  # with padding
_SUFFIXES = (".yaml", ".yml")
MOST_POSITIONS = 2048  # of a model whose config does not say how many it has
_LESS_IS_BETTER = ("perplexity", "bits_per_byte", "brier")
_QUIET = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


@dataclass(frozen=True)
class TaskSource:
    """A task: its name in the harness, or the content of a file. index: the harness's list of tasks."""

    name: str
    task: str | dict[str, Any]
    index: Any

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return f"--tasks {self.name}"


def read_tasks(names: Sequence[str]) -> list[TaskSource]:
    """The tasks of these names, and of these YAML files. MachineError if the harness is not installed;
    InputError for a file that is not a task, and for a name that the harness does not know."""
    if not names:
        return []
    if importlib.util.find_spec("lm_eval") is None:
        what = "tasks need the package `lm-eval`"
        raise MachineError(what, where=f"--tasks {names[0]}", fix=pip_install("eval"))
    found = {
        name: _content(name) if name.endswith(_SUFFIXES) else name for name in dict.fromkeys(names)
    }
    with _quiet():
        from lm_eval.tasks import TaskManager

        index = TaskManager()  # reads thousands of files: once
    for name in (name for name, task in found.items() if task == name):
        if name not in index.all_tasks:
            what = "is not a task of lm-evaluation-harness, nor a file that ends with .yaml"
            raise InputError(what, where=f"--tasks {name}", fix=one_of(name, index.all_tasks))
    return [TaskSource(name, task, index) for name, task in found.items()]


def _content(name: str) -> dict[str, Any]:
    """The content of a task file; paths of its data are those next to it."""
    where = f"--tasks {name}"
    data = dict(load_document(Path(name), "task file", "`task`").data)
    if not isinstance(data.get("task"), str):
        raise InputError(
            "the file has no `task`, the name of it", where=where, fix="write `task: NAME`"
        )
    if "include" in data:
        what = "the file includes another one"
        raise InputError(what, where=where, fix="write its keys into this file")
    kwargs = data.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        found = _beside(kwargs["data_files"], Path(name).parent)
        data["dataset_kwargs"] = {**kwargs, "data_files": found}
    return data


def _beside(value: Any, folder: Path) -> Any:
    """Names of files that are in a folder, as paths."""
    if isinstance(value, dict):
        return {key: _beside(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_beside(item, folder) for item in value]
    if isinstance(value, str) and (folder / value).is_file():
        return str((folder / value).resolve())
    return value


@dataclass(frozen=True)
class Scorer:
    """Gives log-probabilities of token ids by one model, layer by layer from disk.

    positions: tokens that it takes at most.
    """

    model: Checkpoint | Served
    tokenizer: Tokenizer
    positions: int
    dtype: str
    workers: int
    trust: bool
    progress: Progress

    def scores(self, requests: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """For each sequence of token ids, and a number of its last tokens: the sum of their
        log-probabilities, and whether each was the likeliest."""
        kept = [tuple(ids)[-self.positions :] for ids, _ in requests]
        unique = sorted(set(kept), key=lambda ids: (len(ids), ids))
        found: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        groups = [*_groups(unique)]
        batches = [_batch(group) for group in groups]
        with TemporaryDirectory(prefix="quantcli-") as folder:
            for group, batch, logits in zip(
                groups, batches, self._logits(batches, Path(folder)), strict=True
            ):
                scores = token_log_probs(logits, batch)
                likeliest = logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]
                for row, ids in enumerate(group):
                    end = len(ids) - 1
                    found[ids] = scores[row, :end].clone(), likeliest[row, :end].clone()
        answers = []
        for ids, (_, count) in zip(kept, requests, strict=True):
            scores, likeliest = found[ids]
            last = min(count, len(scores))
            chosen = slice(len(scores) - last, None)
            answers.append((float(scores[chosen].double().sum()), bool(likeliest[chosen].all())))
        return answers

    def _logits(self, batches: Sequence[Batch], folder: Path) -> Iterator[Tensor]:
        forward = Forward(
            self.model,
            batches,
            folder,
            dtype=self.dtype,
            workers=self.workers,
            trust_remote_code=self.trust,
        )
        forward.report_to(self.progress)
        layers = forward.skeleton.layers
        self.progress.begin_layers(len(layers), 0, sum(b.input_ids.numel() for b in batches))
        for index, (name, _) in enumerate(layers):
            self.progress.begin_layer(name, index)
            forward.enter(index)
            forward.layer(index)
            self.progress.layer(name, index)
        yield from forward.logits()


def _groups(unique: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Sequences, shortest first, in batches that hold few enough tokens with their padding."""
    group: list[tuple[int, ...]] = []
    for ids in unique:
        if group and (len(group) + 1) * len(ids) > _BATCH_TOKENS:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


def _batch(group: Sequence[tuple[int, ...]]) -> Batch:
    length = max(map(len, group))
    ids, mask = torch.zeros(len(group), length, dtype=torch.int64), torch.zeros(len(group), length)
    for row, sequence in enumerate(group):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return Batch(ids, None if bool(mask.all()) else mask.bool())


def run_tasks(
    sources: Sequence[TaskSource], scorers: Sequence[Scorer], documents: int | None
) -> list[TaskReport]:
    """The scores of tasks by the other model and by the checkpoint, whose scorers these are.

    documents: of each task, the first ones; None: all.
    """
    reports = []
    for source in sources:
        results = [_evaluate(source, scorer, documents) for scorer in scorers]
        reports += [*_reports(*results)]
    return reports


def _evaluate(source: TaskSource, scorer: Scorer, documents: int | None) -> dict[str, Any]:
    """What the harness returns for a task. InputError for one that it or the replay does not take."""
    try:
        with _quiet():
            import lm_eval

            found = lm_eval.simple_evaluate(
                model=_adapter(scorer, source.where),
                tasks=[source.task],
                task_manager=source.index,
                limit=documents,
                bootstrap_iters=0,
                log_samples=True,
            )
    except QuantError:
        raise
    except (ConnectionError, TimeoutError) as error:
        what, fix = f"the task's data cannot be fetched: {sentence(error)}", "check the network"
        raise MachineError(what, where=source.where, fix=fix) from None
    except Exception as error:  # code of the harness, or of the task
        what = f"lm-evaluation-harness refuses the task: {sentence(error)}"
        fix = "compare the file with lm-eval's task guide"
        raise InputError(what, where=source.where, fix=fix) from None
    if not isinstance(found, dict) or not found.get("results"):
        raise InputError("the task gives no results", where=source.where, fix="give another task")
    return found


def _adapter(scorer: Scorer, where: str) -> Any:
    """A model as the harness takes it. The package is imported here: it is optional."""
    from lm_eval.api.model import LM

    class Replayed(LM):  # type: ignore[misc]  # the package has no types
        """Answers by the replay."""

        def loglikelihood(self, requests: Any, *_: Any, **__: Any) -> list[tuple[float, bool]]:
            """Of continuations, behind their contexts."""
            return scorer.scores(
                continuations([request.args for request in requests], scorer.tokenizer)
            )

        def loglikelihood_rolling(self, requests: Any, *_: Any, **__: Any) -> list[float]:
            """Of whole texts, of which long ones are cut into windows."""
            texts = [request.args[0] for request in requests]
            windows = rolling(texts, scorer.tokenizer, scorer.positions)
            answers = iter(scorer.scores([window for text in windows for window in text]))
            return [math.fsum(next(answers)[0] for _ in text) for text in windows]

        def generate_until(self, requests: Any, *_: Any, **__: Any) -> list[str]:
            """Refused: the replay reads a text in one pass, and would need one for each new token."""
            raise InputError(
                "the task lets the model write text, and the replay only scores text",
                where=where,
                fix="take a task of multiple choice, or run this one with lm-eval against a server",
            )

    return Replayed()


def continuations(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer
) -> list[tuple[list[int], int]]:
    """Token ids of contexts with their continuations, and how many are of the continuation.

    Spaces between both belong to the continuation; both are split as one text. An empty context is the
    token that begins a text.
    """
    moved = []
    for context, continuation in pairs:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation) if kept else ("", continuation))
    texts = [text for context, end in moved for text in (context, context + end)]
    ids, first = tokenizer.ids(texts)
    found = []
    for context_ids, whole in zip(ids[::2], ids[1::2], strict=True):
        begin = len(context_ids)
        tokens = [*whole] if begin else [*_beginning(first), *whole]
        scored = len(whole) - begin if begin else len(whole)
        found.append((tokens, max(1, scored)))
    return found


def rolling(
    texts: Sequence[str], tokenizer: Tokenizer, positions: int
) -> list[list[tuple[list[int], int]]]:
    """Windows of token ids of each text, and how many of their last tokens count: each token counts
    once, and the last window has as much context as fits."""
    ids, first = tokenizer.ids(texts)
    found = []
    for own in ids:
        tokens = array("i", [*_beginning(first), *own])
        windows = []
        for start in range(1, len(tokens), positions - 1):
            stop = min(start + positions - 1, len(tokens))
            windows.append(([*tokens[max(0, stop - positions) : stop]], stop - start))
        found.append(windows)
    return found


def _beginning(first: int | None) -> list[int]:
    if first is None:
        what = "the tokenizer has no token that begins or ends a text, which the task needs"
        raise InputError(what, where="--tasks", fix="take a task whose contexts are not empty")
    return [first]


def _reports(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[TaskReport]:
    """Each metric of each task that both have."""
    for task, scores in now["results"].items():
        samples = [{**found.get("samples", {})}.get(task) or [] for found in (before, now)]
        for key, score in scores.items():
            metric, _, kind = str(key).partition(",")
            old = before["results"].get(task, {}).get(key)
            if not _is_score(score) or not _is_score(old) or metric.endswith("_stderr") or not kind:
                continue
            each = [_by_document(own, metric, kind) for own in samples]
            ends = None
            if each[0] and len(each[0]) == len(each[1]) > 1:
                columns = metrics.columns_of_scores(*each)
                ends = metrics.interval(_difference, columns, [0] * len(each[0]))
            more_is_better = not metric.endswith(_LESS_IS_BETTER)
            yield TaskReport(
                task=str(task),
                metric=metric if kind == "none" else f"{metric} ({kind})",
                documents=len(samples[1]) and len({each["doc_id"] for each in samples[1]}),
                reference=round(float(old), 6),
                checkpoint=round(float(score), 6),
                change=round(float(score) - float(old), 6),
                interval=None if ends is None else [round(end, 6) for end in ends],
                better=metrics.better(ends, len(each[0]), more_is_better=more_is_better),
            )


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _by_document(samples: Sequence[Mapping[str, Any]], metric: str, kind: str) -> list[float]:
    """The scores of single documents; empty if the metric has none."""
    found = {}
    for sample in samples:
        if sample.get("filter", "none") == kind:
            value = sample.get(metric)
            if not isinstance(value, int | float) or not math.isfinite(value):
                return []
            found[sample["doc_id"]] = float(value)
    return [found[document] for document in sorted(found)]


def _difference(columns: metrics.Columns) -> metrics.Array:
    change: metrics.Array = (columns["now"] - columns["before"]).mean(-1)
    return change


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's messages and bars from the terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with environment(_QUIET):
            yield
    finally:
        logger.setLevel(level)
