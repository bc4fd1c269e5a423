"""Tasks of lm-evaluation-harness, or of its stand-in, answered by both models through the replay."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import quantcli
from quantcli.calibration.replay.served import Forward, log_probs
from quantcli.calibration.text.dataset import Batch, tokenizer_of
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import SILENT
from quantcli.verification.on_text import tasks
from quantcli.verification.on_text.tasks import Scorer, continuations, read_tasks, rolling

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny-qwen3"
TEXT = ROOT / "examples" / "evaluation.txt"
CHOICES = {
    "task": "ends", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
    "dataset_kwargs": {"data_files": {"test": "ends.jsonl"}},
    "doc_to_text": "{{start}}", "doc_to_choice": "{{ends}}", "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, or else the stand-in."""
    if importlib.util.find_spec("lm_eval") is None:
        monkeypatch.syspath_prepend(ROOT / "tests" / "stand_in" / "harness")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Which of four ends a line of a play has."""
    lines = [line for line in TEXT.read_text().splitlines() if len(line.split()) > 6][:24]
    with (tmp_path / "ends.jsonl").open("w") as file:
        for n, line in enumerate(lines):
            words = line.split()
            ends = [" " + " ".join(other.split()[4:]) for other in lines[n + 1 :] + lines[:n]][:3]
            ends.insert(n % 4, " " + " ".join(words[4:]))
            document = {"start": " ".join(words[:4]), "ends": ends, "label": n % 4, "text": line}
            file.write(json.dumps(document) + "\n")
    return write(tmp_path, {})


def write(folder: Path, changes: dict[str, Any]) -> Path:
    file = folder / "task.yaml"
    file.write_text(yaml.safe_dump({**CHOICES, **changes}))
    return file


def scorer(positions: int = 64) -> Scorer:
    model = open_checkpoint(MODEL)
    return Scorer(model, tokenizer_of(MODEL), positions, "F32", 1, False, SILENT)


@pytest.mark.usefixtures("harness")
def test_both_models_are_scored(task: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "all.yaml"
    recipe.write_text("target: ascend\nrules: [{match: '*_proj', scheme: w4a4_dynamic}]\n")
    out = tmp_path / "out"
    commands.quantize(commands.plan(recipe, model=str(MODEL), out=out))
    options = {"run": True, "data": TEXT, "samples": 2, "length": 32, "max_kl": 9.0, "max_ppl_ratio": 9}
    done = quantcli.verify(out, against=MODEL, tasks=task, task_docs=20, **options)
    assert done.run is not None
    (score,) = (each for each in done.run["tasks"] if each["metric"] == "acc")
    assert (score["task"], score["documents"]) == ("ends", 20)
    assert score["change"] == pytest.approx(score["checkpoint"] - score["reference"], abs=1e-6)
    assert score["interval"][0] <= score["change"] <= score["interval"][1]
    # the float model's score again, from log-probabilities of whole texts
    pairs = []
    documents = [json.loads(line) for line in (tmp_path / "ends.jsonl").read_text().splitlines()][:20]
    for document in documents:
        pairs += [(document["start"], end) for end in document["ends"]]
    requests = continuations(pairs, tokenizer_of(MODEL))
    batches = [Batch(torch.tensor([ids]), None) for ids, _ in requests[:4]]
    whole = log_probs(open_checkpoint(MODEL), batches)
    sums = [float(each[0, -n:].sum()) for each, (_, n) in zip(whole, requests[:4], strict=True)]
    found = [answer for answer, _ in scorer().scores(requests[:4])]
    assert found == pytest.approx(sums, abs=1e-4)


@pytest.mark.usefixtures("harness")
def test_what_the_replay_does_not_take(task: Path, tmp_path: Path) -> None:
    refused = write(tmp_path, {"output_type": "generate_until", "doc_to_text": "{{start}}"})
    (source,) = read_tasks([str(refused)])
    with pytest.raises(InputError, match="lets the model write text"):
        tasks.run_tasks([source], [scorer()], 2)
    absent = write(tmp_path, {"dataset_kwargs": {"data_files": {"test": "absent.jsonl"}}})
    with pytest.raises(InputError, match="refuses the task") as error:
        tasks.run_tasks(read_tasks([str(absent)]), [scorer()], 2)
    assert error.value.where == f"--tasks {absent}"
    with pytest.raises(InputError, match="is not a task of lm-evaluation-harness") as error:
        read_tasks(["helaswag"])  # before anything runs
    assert error.value.where == "--tasks helaswag"
    assert "`hellaswag`" in (error.value.fix or "")


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("changes", "what"),
    [({"task": None}, "has no `task`"), ({"include": "other.yaml"}, "includes another one")],
)
def test_files_that_are_refused(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what):
        read_tasks([str(write(tmp_path, changes))])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="tasks need the package `lm-eval`") as error:
        read_tasks(["hellaswag"])
    assert "quantcli[eval]" in (error.value.fix or "")
    assert read_tasks([]) == []


def test_contexts_and_windows() -> None:
    tokenizer = tokenizer_of(MODEL)
    (spaced, count), (plain, other) = continuations(
        [("To be or not ", "to be"), ("To be or not", " to be")], tokenizer
    )
    assert (spaced, count) == (plain, other)
    assert 0 < count < len(spaced)
    ((alone, whole),) = continuations([("", "To be")], tokenizer)
    assert whole == len(alone) - 1
    text = TEXT.read_text()[:2000]
    (windows,) = rolling([text], tokenizer, 64)
    (ids,), first = tokenizer.ids([text])
    assert sum(scored for _, scored in windows) == len(ids)
    assert [token for tokens, scored in windows for token in tokens[-scored:]] == ids.tolist()
    assert windows[0][0][0] == first
    assert all(len(tokens) == 64 for tokens, _ in windows)


def test_the_same_sequence_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    begin = Forward.__init__

    def spy(self: Forward, model: Any, batches: Any, *args: Any, **kwargs: Any) -> None:
        seen.extend(batches)
        begin(self, model, batches, *args, **kwargs)

    monkeypatch.setattr(Forward, "__init__", spy)
    ids = [[5, 6, 7], [8, 9, 10, 11], [5, 6, 7]]
    first, _, again = scorer(3).scores([(ids[0], 1), (ids[1], 2), (ids[2], 2)])
    assert sum(len(batch.input_ids) for batch in seen) == 2  # one of them cut to 3 tokens
    assert again[0] < first[0] < 0
