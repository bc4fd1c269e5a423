"""`quantcli release`: the bytes of separate runs, each byte of the source read once, and what happens
if one checkpoint fails, is there already, or the run is stopped."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from quantcli import release
from quantcli.convert import blocks, queue, together
from quantcli.core.errors import InputError, MachineError
from tests.e2e.calibrating import LENGTH, SAMPLES, TEXT, Models, change_tensors
from tests.e2e.conftest import Faults, Killed, Result, run_cli, snapshot

RECIPES = ["w8a8_static", "vllm_int8_static", "fp8_static", "w4a16_gptq", "vllm_mxfp4", "fp8_block"]
RUN = {"against": True, "run": True, "data": "text.txt", "length": 16}
CALIBRATION = {"data": "text.txt", "samples": SAMPLES, "length": LENGTH}


@dataclass
class Bench:
    """A model, a text, and a release in a folder of its own."""

    root: Path
    model: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    def write(self, checkpoints: list[object], **more: object) -> Path:
        """The release file. Everything that needs text takes a short one."""
        (self.root / "text.txt").write_text(TEXT)
        table = {"checkpoints": checkpoints, "calibration": CALIBRATION, **more}
        file = self.root / "release.yaml"
        file.write_text(yaml.safe_dump(table))
        return file

    def run(self, *more: object) -> Result:
        file = self.root / "release.yaml"
        return run_cli("release", file, "--model", self.model, "--out", self.out, *more)

    def separately(self, recipe: str, *more: object) -> dict[str, str]:
        """The files that `quantize` writes."""
        out = self.root / "separate" / recipe
        data = {**CALIBRATION, "data": self.root / "text.txt"}
        words = [
            word for key, value in data.items() for word in ("--set", f"calibration.{key}={value}")
        ]
        words = words if recipe in RECIPES[:4] else []
        result = run_cli("quantize", recipe, "--model", self.model, "--out", out, *words, *more)
        assert result.code == 0, result.err
        files = snapshot(out)
        shutil.rmtree(out)
        return files


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def bench(tmp_path: Path, models: Models) -> Bench:
    return Bench(tmp_path, models("qwen3"))


def test_the_bytes_are_those_of_separate_runs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with several shards, several jobs of each weight, and blocks smaller than a job."""
    monkeypatch.setattr("quantcli.planning.block.JOB_BYTES", 2048)
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    monkeypatch.setattr(together, "BLOCK", 1000)
    bench.write(list(RECIPES), set={"max_shard": "40KB"})
    result = bench.run("--json", "--workers", 3)
    assert result.code == 0, result.err
    checkpoints = result.json["checkpoints"]
    assert [(c["name"], c["status"]) for c in checkpoints] == [(name, "written") for name in RECIPES]
    for name in RECIPES:
        files = snapshot(bench.out / name)
        assert sum(file.endswith(".safetensors") for file in files) > 1
        assert files == bench.separately(name, "--set", "max_shard=40KB"), name
    again = bench.run("--json")
    assert {c["status"] for c in again.json["checkpoints"]} == {"done"}


def test_each_byte_of_the_source_is_read_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcli.planning.block.JOB_BYTES", 2048)
    read, preadv = [0], os.preadv

    def counted(fd: int, into: list[memoryview], at: int, *flags: int) -> int:
        got = preadv(fd, into, at, *flags)
        if not flags and Path(f"/proc/self/fd/{fd}").readlink().name == "model.safetensors":
            read[0] += got
        return got

    bench.write(["w8a8_dynamic", "vllm_fp8_dynamic", "w8a16"])
    monkeypatch.setattr(os, "preadv", counted)
    result = bench.run("-v", "--workers", 2)
    assert result.code == 0, result.err
    data = (bench.model / "model.safetensors").read_bytes()
    assert read[0] == len(data) - 8 - int.from_bytes(data[:8], "little")


def test_plans_take_turns(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan is more than a job ahead of another one, whatever the sizes of their shards are."""
    monkeypatch.setattr("quantcli.planning.block.JOB_BYTES", 2048)
    far: dict[int, int] = {}  # bytes of the source that each plan has taken
    ahead, jobs = [0], [0]
    take = queue.JobQueue.take

    def noted(self: queue.JobQueue, *, wait: bool = True) -> queue.Task | None:
        task = take(self, wait=wait)
        if task is not None and task.job is not None:
            item = task.job.item
            nbytes = item.source.nbytes * (task.job.stop - task.job.start) // item.height
            far[id(self)] = far.get(id(self), 0) + nbytes
            jobs.append(nbytes)
            ahead.append(max(far.values()) - min(far.values()) if len(far) > 1 else 0)
        return task

    monkeypatch.setattr(queue.JobQueue, "take", noted)
    bench.write(["w8a8_dynamic", {"recipe": "vllm_int8_dynamic", "set": {"max_shard": "20KB"}}])
    result = bench.run("--workers", 1)
    assert result.code == 0, result.err
    assert len(jobs) > 20
    assert max(ahead) <= max(jobs)


def test_a_plan_writes_nothing(bench: Bench) -> None:
    bench.write(["w8a8_static", {"recipe": "vllm_fp8_dynamic", "name": "fp8"}], verify={"full": True})
    shown = bench.run("--plan")
    assert shown.code == 0, shown.err
    assert f"{bench.out}/fp8" in shown.out
    assert "runs first, for 1 checkpoint: 4 samples of 16 tokens" in shown.out
    plan = bench.run("--plan", "--json", "--only", "fp8").json["plan"]
    (only,) = plan["checkpoints"]
    assert (only["name"], only["state"], only["error"]) == ("fp8", "new", None)
    assert plan["disk_needed"] == only["plan"]["disk_needed"] > 0
    assert plan["calibration"] is None
    assert sorted(path.name for path in bench.root.iterdir()) == ["release.yaml", "text.txt"]


def test_a_missed_limit_is_told_and_the_others_are_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"recipe": "w8a8_dynamic", "set": {"expect.bits_per_param": "< 3"}}
    bench.write([wrong, "vllm_int8_dynamic"], verify={"full": True})
    assert bench.run("--plan").code == 1
    result = bench.run("--json", "--report", bench.root / "page.html")
    assert result.code == 1
    missed, written = result.json["checkpoints"]
    assert (missed["status"], written["status"]) == ("missed", "written")
    assert missed["error"]["what"].startswith("checkpoint `w8a8_dynamic`: expected bits_per_param < 3")
    assert written["verification"]["ok"]
    assert result.json["error"]["what"].endswith("done: vllm_int8_dynamic")
    assert (bench.root / "page.html").is_file()
    assert not (bench.out / "w8a8_dynamic").exists()

    def stopped(*_: object) -> None:
        raise MachineError("no memory")

    monkeypatch.setattr("quantcli.commands.verify.run", stopped)
    what = bench.run("--json").json["error"]["what"]
    assert "stopped: no memory; written, but not verified: vllm_int8_dynamic; not written: " in what
    assert what.endswith(missed["error"]["what"])


def test_one_that_fails_does_not_stop_the_others(bench: Bench) -> None:
    """Nothing is lost: after the repair, the same command makes what is missing."""
    model = bench.root / "model"
    shutil.copytree(bench.model, model)
    bench.model = model
    sound = (model / "model.safetensors").read_bytes()
    bad = "model.layers.1.mlp.down_proj.weight"
    change_tensors(model, lambda tensors: tensors[bad].view(-1)[5:6].fill_(float("nan")))
    keep = {
        "recipe": "w8a16",
        "set": {"expect": {}, "rules": [{"match": "*layers.0.*", "scheme": "w8a16"}]},
    }
    bench.write(["w8a8_dynamic", keep, "vllm_fp8_dynamic"])
    result = bench.run("--json")
    assert result.code == 2
    statuses = {c["name"]: c["status"] for c in result.json["checkpoints"]}
    assert statuses == {"w8a8_dynamic": "failed", "w8a16": "written", "vllm_fp8_dynamic": "failed"}
    error = result.json["error"]
    assert error["what"].startswith(
        "checkpoint `w8a8_dynamic`: weight is nan; and 1 more failed; done: w8"
    )
    assert bad in error["where"]
    assert sorted(path.name for path in bench.out.iterdir()) == [
        "vllm_fp8_dynamic.partial",
        "w8a16",
        "w8a8_dynamic.partial",
    ]
    before = snapshot(bench.out / "w8a16")
    (model / "model.safetensors").write_bytes(sound)
    again = bench.run("--json", "--fresh", "--only", "w8a8_dynamic", "--only", "vllm_fp8_dynamic")
    assert [c["status"] for c in again.json["checkpoints"]] == ["written", "written"]
    assert snapshot(bench.out / "w8a16") == before


def test_a_place_that_is_taken_is_refused_before_anything_is_written(bench: Bench) -> None:
    bench.write(["w8a8_dynamic", "vllm_fp8_dynamic"])
    taken = bench.out / "vllm_fp8_dynamic"
    taken.mkdir(parents=True)
    (taken / "theirs").write_text("")
    result = bench.run()
    assert result.code == 2
    assert f"{taken} holds something else, or a damaged checkpoint" in result.later
    assert [path.name for path in bench.out.iterdir()] == ["vllm_fp8_dynamic"]
    forced = bench.run("--force", "--json")
    assert [c["status"] for c in forced.json["checkpoints"]] == ["written", "written"]
    assert (bench.out / "vllm_fp8_dynamic.replaced" / "theirs").is_file()
    # with --force alone what is done is left as it is; --fresh makes it again
    assert {c["status"] for c in bench.run("--force", "--json").json["checkpoints"]} == {"done"}
    again = bench.run("--force", "--fresh", "--json").json["checkpoints"]
    assert {c["status"] for c in again} == {"written"}


def test_a_damaged_checkpoint_is_not_taken_for_done(bench: Bench) -> None:
    bench.write(["w8a8_dynamic"])
    assert bench.run().code == 0
    (bench.out / "w8a8_dynamic" / "config.json").unlink()
    result = bench.run()
    assert result.code == 2
    assert "holds something else, or a damaged checkpoint" in result.err


@pytest.mark.parametrize("nth", [45, 70, 100])
def test_a_run_that_was_killed_goes_on(bench: Bench, nth: int) -> None:
    """Each checkpoint after its whole shards, and with the same bytes."""
    bench.write(["w8a8_dynamic", "vllm_fp8_dynamic"], set={"max_shard": "40KB"})
    whole = bench.run("--out", bench.root / "whole", "--json", "--workers", 1)
    assert whole.code == 0, whole.err
    faults = Faults(bench.root, nth, Killed, sticky=True)
    with faults.armed(), pytest.raises(Killed):
        bench.run("--workers", 1)
    assert faults.fired
    result = bench.run("--json", "--workers", 1)
    assert result.code == 0, result.err
    assert sum(c["shards_reused"] for c in result.json["checkpoints"]) > 0
    for name in ("w8a8_dynamic", "vllm_fp8_dynamic"):
        assert snapshot(bench.out / name) == snapshot(bench.root / "whole" / name)


@pytest.mark.parametrize(
    ("checkpoints", "more", "what"),
    [
        (["w8a8_static", "no_such"], {}, "checkpoint `no_such`: there is no recipe `no_such`"),
        (
            [{"recipe": "w8a8_dynamic", "out": "out/x"}, {"recipe": "w8a16", "out": "out/x/y"}],
            {},
            "place",
        ),
        (
            [{"recipe": "w8a8_dynamic", "out": "out/x"}, {"recipe": "w8a16", "out": "out/x.partial"}],
            {},
            "it goes to the place of checkpoint `w8a8_dynamic`, or into it",
        ),
        (
            [{"recipe": "w8a8_static", "out": "x"}, {"recipe": "w8a16", "out": "out.calibration/x"}],
            {"output": "out"},
            "checkpoint `w8a16`: the calibration folder and the output directory must not contain each",
        ),
        (["w8a8_dynamic"], {"verify": {"run": True}}, "`run` compares two models"),
        (["w8a8_dynamic"], {"verify": {"min_sqnr": 20}}, "`min_sqnr` has no effect without `against`"),
        (["w8a8_dynamic"], {"verify": {"against": "./absent"}}, "no such model directory"),
        (["w8a8_dynamic"], {"verify": {**RUN, "data": "absent.txt"}}, "absent.txt` does not exist"),
        (["w8a8_dynamic"], {"verify": {**RUN, "length": 5000}}, "longer than the model's"),
        (
            ["w8a8_dynamic"],
            {"verify": {**RUN, "samples": 999}},
            "lower verify.samples or verify.length",
        ),
        ([{"recipe": "w8a8_dynamic", "set": {"target": "asend"}}], {}, "checkpoint `w8a8_dynamic`:"),
    ],
)
def test_refusals_come_before_anything_is_written(
    bench: Bench,
    checkpoints: list[object],
    more: dict[str, object],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(bench.root)
    bench.write(checkpoints, **more)
    result = run_cli(
        "release",
        "release.yaml",
        "--model",
        bench.model,
        *([] if "output" in more else ["--out", "out"]),
    )
    assert result.code == 2
    assert what in result.err.replace("\n  ", " ")
    assert "-->" in result.err
    assert sorted(path.name for path in bench.root.iterdir()) == ["release.yaml", "text.txt"]


@pytest.mark.parametrize(
    ("page", "what"),
    [("absent/page.html", "`absent` does not exist"), ("out/w8a16/page.html", "would become part of")],
)
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    bench: Bench, page: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.root)
    bench.write(["w8a16"])
    result = bench.run("--out", "out", "--report", page)
    assert result.code == 2
    assert what in result.err
    assert not bench.out.exists()


def test_numbers_that_follow_from_text_are_verified(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the calibration of each checkpoint: two have the same recipe, and another text."""
    monkeypatch.chdir(bench.root)
    (bench.root / "other.txt").write_text(TEXT[::-1])
    other = {"recipe": "w8a8_static", "name": "b", "set": {"calibration.data": "other.txt"}}
    bench.write(["w8a8_static", other, "w8a16"], verify={"against": True})
    result = bench.run("--json")
    assert result.code == 0, result.err
    reports = [checkpoint["verification"] for checkpoint in result.json["checkpoints"]]
    assert [report["not_checked"] for report in reports] == [[], [], []]
    (further,) = (bench.root / "out.calibration").glob("further-*")
    compare = "verify", "--against", bench.model, "--calibration"
    assert run_cli(*compare, "out.calibration", bench.out / "w8a8_static", bench.out / "b").code == 0
    assert run_cli(*compare, further, bench.out / "b").code == 0
    assert run_cli(*compare, further, bench.out / "w8a8_static").code == 1, "of another text"


def test_the_text_on_a_terminal(bench: Bench) -> None:
    bench.write(["w8a8_dynamic", "vllm_fp8_dynamic"])
    result = bench.run()
    assert result.code == 0, result.err
    assert "done: 2 of 2 checkpoints" in result.out
    assert f"next: quantcli verify {bench.out}/w8a8_dynamic {bench.out}/vllm_fp8_dynamic" in result.err
    assert result.err.count("next: vllm serve") == 2
    assert json.loads((bench.out / "w8a8_dynamic" / "quantcli_manifest.json").read_text())["plan"]


def test_an_empty_place_is_not_the_default(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As --out "$PLACE" gives it without that variable."""
    monkeypatch.chdir(bench.root)
    file = bench.write(["w8a16"])
    for command in (("release", file), ("quantize", "w8a16")):
        result = run_cli(*command, "--model", bench.model, "--out", "", "--plan")
        assert result.code == 2, command
        assert "empty" in result.err or "contains the current directory" in result.err


def test_a_text_is_not_a_list_of_names(bench: Bench) -> None:
    with pytest.raises(InputError, match="`only` is 'w8a16'") as error:
        release(bench.write(["w8a16"]), only="w8a16")
    assert error.value.fix == "give a list"
