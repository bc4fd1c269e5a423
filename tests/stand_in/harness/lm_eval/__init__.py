"""What quantcli uses of lm-evaluation-harness 0.4.13, for tests where it is not installed.

Tasks of multiple choice and of whole texts, from JSON lines; a template is the name of a field.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager


def simple_evaluate(
    model: LM,
    tasks: list[Any],
    task_manager: TaskManager,
    limit: int | None,
    bootstrap_iters: int,
    log_samples: bool,
) -> dict[str, Any]:
    """Scores and samples by task, as the harness returns them."""
    assert isinstance(task_manager, TaskManager)
    assert isinstance(model, LM)
    assert log_samples
    assert not bootstrap_iters
    results, samples = {}, {}
    for task in tasks:
        if not isinstance(task, dict):
            raise KeyError(task)
        file = Path(task["dataset_kwargs"]["data_files"]["test"])
        documents = [json.loads(line) for line in file.read_text().splitlines()][:limit]
        field = {key: task[key].strip("{}") for key in ("doc_to_text", "doc_to_choice") if key in task}
        kind, name = task["output_type"], task["task"]
        if kind == "generate_until":
            model.generate_until(
                [SimpleNamespace(args=(d[field["doc_to_text"]], {})) for d in documents]
            )
        scored = (_rolling if kind == "loglikelihood_rolling" else _choices)(model, documents, field)
        samples[name] = [{"doc_id": n, "filter": "none", **scores} for n, scores in enumerate(scored)]
        results[name] = {"alias": name}
        for metric in scored[0]:
            values = [scores[metric] for scores in scored]
            whole = sum(v[0] if isinstance(v, tuple) else v for v in values) / len(values)
            results[name] |= {f"{metric},none": whole, f"{metric}_stderr,none": "N/A"}
    return {"results": results, "samples": samples}


def _choices(model: LM, documents: list[dict[str, Any]], field: dict[str, str]) -> list[dict[str, Any]]:
    pairs = [
        (document[field["doc_to_text"]], end)
        for document in documents
        for end in document[field["doc_to_choice"]]
    ]
    answers = iter(model.loglikelihood([SimpleNamespace(args=pair) for pair in pairs]))
    scored = []
    for document in documents:
        values = [next(answers)[0] for _ in document[field["doc_to_choice"]]]
        scored.append({"acc": float(values.index(max(values)) == document["label"])})
    return scored


def _rolling(model: LM, documents: list[dict[str, Any]], field: dict[str, str]) -> list[dict[str, Any]]:
    texts = [document[field["doc_to_text"]] for document in documents]
    answers = model.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts])
    return [
        {"bits_per_byte": (-answer, len(text))} for answer, text in zip(answers, texts, strict=True)
    ]
