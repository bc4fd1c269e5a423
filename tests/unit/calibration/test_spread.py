"""A calibration that processes share has the bytes of threads, however it is shared and interrupted.

The processes are simulated: each has what it keeps of its own, and is sent pickled requests.
"""

from __future__ import annotations

import json
import pickle
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from quantcli.calibration import session as sessions
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.resources import Resources
from quantcli.calibration.spread import run as spread
from quantcli.calibration.spread import worker
from quantcli.calibration.spread.crew import shares_of
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import calibrate as commands
from quantcli.core.cluster.executor import Executor
from quantcli.core.events import Progress
from quantcli.sources.decode import decoded
from tests.e2e.calibrating import LENGTH, TEXT, Models

ON = Resources(workers=2, executor=Executor("local"))
STATIC = "{match: '*_proj', scheme: {name: w8a8_static, observer: %s}}"
HEAD = "target: %s\ncalibration: {data: text.txt, samples: 5, length: 16%s}\nrules: [%s]\n"
AVERAGE = HEAD % ("ascend", "", (STATIC % "moving_average"))
EXPERTS = HEAD % (
    "compressed-tensors",
    ", all_tokens: true",
    "{match: '*_proj', scheme: {name: fp8_static, observer: percentile}}",
)
SMOOTH = HEAD % ("ascend", ", pack: false", (STATIC % "minmax")) + "smooth: {alpha: 0.5}\n"
SMOOTH = SMOOTH.replace("text.txt", "records.jsonl")
CODES = (
    HEAD
    % (
        "compressed-tensors",
        "%s",
        "{match: '*_proj', scheme: {name: w4a16, group_size: 32, weight_rounding: gptq}}",
    )
    + "kv_cache: {format: fp8, observer: percentile}\n"
)
LEARNED = HEAD % (
    "ascend",
    ", dtype: float32",
    "{match: '*layers.1.*_proj', scheme: {name: w4a4_flatquant, epochs: 1, batch: 2}}",
)
CASES = {
    "averages": (AVERAGE, "qwen3"),
    "counts of experts": (EXPERTS, "qwen3_moe"),
    "smoothed, padded": (SMOOTH, "llama"),
    "codes": (CODES % "", "llama"),
    "codes on quantized inputs": (CODES % ", inputs: quantized", "llama"),
    "learned": (LEARNED, "qwen3"),
    "carried": (AVERAGE.replace("'*_proj'", "'*self_attn.*_proj'"), "gemma4_text"),
}


@pytest.mark.parametrize(
    ("size", "threads", "lengths"),
    [(3, 1, [2, 3, 3]), (3, 2, [2, 3, 3]), (3, 4, [4, 4]), (30, 1, [1] * 8), (2, 30, [8])],
)
def test_a_share_of_batches_keeps_its_threads_busy(size, threads, lengths):
    crew = Mock(size=size, threads=threads)
    shares = shares_of(8, crew)
    assert [len(share) for share in shares] == lengths
    assert [n for share in shares for n in share] == list(range(8))


class Lost(Exception):
    """The driver is gone."""


class Steps(Progress):
    """Notes the steps of a run."""

    def __init__(self):
        self.steps = []

    def step(self, done, total, **more):
        self.steps.append((done, total))


class Processes:
    """A crew of `size`. fails: the request, counted over all, with which the driver ends.

    wrote: files of hidden states that each request has written. left: those after the last one.
    """

    def __init__(self, work: worker.Work, size: int, fails: int | None = None) -> None:
        self.size, self.threads = size, 1
        self.asked: list[Any] = []
        self.wrote: list[set[Path]] = []
        self.left: set[Path] = set()
        self._folder = work.folder
        self._work = [pickle.dumps(work)] * size
        self._kept: list[dict[str, Any]] = [{} for _ in range(size)]
        self._fails = fails

    def run(self, function, requests, *, noun, progress, done=lambda index, result: None):
        results = [None] * len(requests)
        for index, request in reversed([*enumerate(requests)]):
            if len(self.asked) == self._fails:
                raise Lost
            self.asked.append(request)
            before = self._states()
            process = index % self.size
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(worker, "_present", self._kept[process])
                work = pickle.loads(self._work[process])
                results[index] = pickle.loads(
                    pickle.dumps(function(work, pickle.loads(pickle.dumps(request)), progress))
                )
            self.wrote.append(self._states() - before)
            done(index, results[index])
            self.left = self._states()
        return results

    def _states(self) -> set[Path]:
        return set(self._folder.glob("*states-*"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def bench(tmp_path, models, monkeypatch):
    """Calibrates in a folder, with threads or with some processes; gives the crew, if there was one."""
    monkeypatch.setattr(sessions, "BATCH_TOKENS", LENGTH)

    def calibrate(case, folder, size=0, fails=None):
        crews = []

        def on_cluster(shares, work, resources, progress):
            crews.append(Processes(work, size, fails))
            spread.calibrate(shares, work, crews[0], progress)

        monkeypatch.setattr(spread, "on_cluster", on_cluster)
        recipe, model = write_case(tmp_path, case), models(CASES[case][1])
        session = commands.plan_calibration(str(recipe), model=str(model), out=tmp_path / folder)
        progress = Steps()
        with suppress(Lost):
            commands.calibrate(session, ON if size else Resources(workers=2), progress)
        if crews:
            crews[0].progress = progress
        return crews[0] if crews else None

    return calibrate


def write_case(root: Path, case: str) -> Path:
    """The recipe of a case, with its data."""
    (root / "text.txt").write_text(TEXT)
    records = [json.dumps({"text": TEXT[: 4 * n]}) for n in range(2, 7)]
    (root / "records.jsonl").write_text("\n".join(records))
    (root / "recipe.yaml").write_text(CASES[case][0])
    return root / "recipe.yaml"


def content(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_processes_gives_the_bytes_of_threads(case, bench, tmp_path):
    bench(case, "threads")
    crew = bench(case, "shared", size=3)
    assert content(tmp_path / "shared") == content(tmp_path / "threads")
    kinds = [type(request).__name__ for request in crew.asked]
    by_layers = case in {"codes", "learned"}
    assert set(kinds) == ({"Forward", "Measure"} if by_layers else {"Pass"})
    batches = sorted(n for r in crew.asked if not hasattr(r, "recipes") for n in r.batches)
    assert batches.count(0) == batches.count(4) >= 1  # each of five samples as often as the others


def test_steps_at_the_driver_are_batches_of_layers(bench):
    steps = [
        (done, total) for done, total in bench("codes", "shared", size=3).progress.steps if total == 15
    ]
    assert steps == [(n, 15) for n in range(1, 16)]  # five samples through all layers but the last


def test_threads_continue_what_processes_have_begun(bench, tmp_path):
    bench("codes", "threads")
    assert bench("codes", "shared", size=3, fails=5) is not None
    assert bench("codes", "shared") is None
    assert content(tmp_path / "shared") == content(tmp_path / "threads")


@pytest.mark.parametrize("case", ["averages", "codes"])
def test_an_interrupted_driver_goes_on_with_other_processes(case, bench, tmp_path):
    """Only what was not complete is done again."""
    bench(case, "threads")
    first = bench(case, "shared", size=3, fails=6)
    carried = tmp_path / "shared" / f"states-00000{59 * 'a'}.safetensors"  # to any layer
    carried.touch()
    (tmp_path / "shared" / f"layer-00000.safetensors.{16 * 'a'}").touch()  # of a lost process
    second = bench(case, "shared", size=2)
    assert content(tmp_path / "shared") == content(tmp_path / "threads")
    if case == "averages":
        written = {
            (request.layer, path.name.split(".")[0])
            for request, paths in zip(second.asked, second.wrote, strict=True)
            for path in paths
        }
        assert written == {(2, "states-00003")}, "nobody reads inputs of the first layer again"
        assert {request.layer for request in second.asked} == {2, 3}
    else:
        layers = [[r.layer for r in crew.asked if hasattr(r, "recipes")] for crew in (first, second)]
        assert layers == [[3, 2, 1], [0]]
        assert carried in second.left, "only the inputs of the layer that is done are deleted"


def test_a_model_is_built_where_its_folder_is_not(models, tmp_path):
    """As a node does with one that is elsewhere."""
    here = decoded(open_checkpoint(models("llama")))
    there = Skeleton(replace(here, path=tmp_path / "none"), "BF16", trust_remote_code=False)
    layers = Skeleton(here, "BF16", trust_remote_code=False).layers
    assert [name for name, _ in there.layers] == [name for name, _ in layers]
    assert str(there.model.config) == str(there.model.config.from_dict(here.config.plain()))
