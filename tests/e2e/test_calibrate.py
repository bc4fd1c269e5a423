"""Calibration as a user meets it: both commands, resuming, what no token reaches, devices."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.calibration import session
from quantcli.calibration.methods.base import LayerWork
from quantcli.calibration.methods.ranges import fill_in
from quantcli.calibration.policy import Policy, Quantized
from quantcli.calibration.replay import devices, replay, states
from quantcli.calibration.report import LayerReport
from quantcli.calibration.session import Resources
from quantcli.commands import quantize as commands
from quantcli.core import events
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.text import pip_install
from quantcli.planning.siblings import Siblings
from quantcli.schemes.w8a8_static import W8A8Static
from tests.e2e.calibrating import (
    FEW,
    LENGTH,
    RECIPE,
    RECIPES,
    SAMPLES,
    SMOOTH,
    TEXT,
    TOKENS,
    Bench,
    Models,
    change_tensors,
    make_bench,
    write_tokenizer,
)
from tests.e2e.conftest import Faults, Killed, run_cli, snapshot
from tests.pages import script

LAYERS = 4
A = "model.layers.{}.self_attn"
QUANTIZED_INPUTS = SMOOTH.replace("data:", "inputs: quantized, data:")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make(tmp_path: Path, models: Models) -> Callable[..., Bench]:
    def made(recipe: str = SMOOTH, family: str = "qwen3") -> Bench:
        return make_bench(tmp_path, models(family), recipe)

    return made


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample a batch of its own, so that there are several to be in the middle of."""
    monkeypatch.setattr(session, "BATCH_TOKENS", LENGTH)


def words(text: str) -> list[str]:
    """What is on stderr, without times and rates."""
    text = re.sub(r" · \S+ tok/s · elapsed \d+:\d\d · ETA \d+:\d\d", " · RATE", text)
    return re.sub(r"\d+\.\d s", "N s", text).splitlines()


# what is printed and written


def test_calibrate(make: Callable[..., Bench]) -> None:
    bench = make()
    result = bench.calibrate()
    assert result.code == 0, result.err
    files = {f"layer-{n:05d}.{kind}" for n in range(LAYERS) for kind in ("json", "safetensors")}
    assert snapshot(bench.store).keys() == files | {"calibration.json", ".lock"}
    table = result.out.splitlines()
    following = (
        f"next: quantcli quantize {bench.recipe} --model {bench.model} --calibration {bench.store}"
    )
    assert table[0].split() == ["modules", "count", "tokens", "inputs", "input", "scale"]
    rows = {line.split()[0]: line.split()[1:3] for line in table[1:8]}
    assert rows[A.format("*") + ".q_proj"] == rows["model.layers.*.mlp.down_proj"] == ["4", "64"]
    assert "samples      4 of up to 16 tokens" in table
    assert "smoothed     16 groups of channels" in table
    assert words(result.later) == [
        "building the model, without its weights",
        f"reading text: 4 samples of 16 tokens of {bench.root / 'text.txt'}",
        "running: 4 layers, 64 tokens",
        *(f"layer {n + 1}/4: model.layers.{n} N s · RATE" for n in range(LAYERS)),
        f"done: {bench.store}, N s",
        following,
    ]
    again = bench.calibrate()
    assert (again.code, again.out) == (0, result.out)
    assert words(again.later) == [f"done: {bench.store}, N s (it was there already)", following]


def test_calibrate_json(make: Callable[..., Bench]) -> None:
    bench = make(SMOOTH.replace(", observer: minmax", ""))
    result = bench.calibrate("--json")
    assert result.code == 0, result.err
    found = result.json  # one document, and nothing else
    generated = script("generate")
    keys = generated.keys_of(generated.DOCUMENTS["calibrate"])
    assert found.keys() == generated.ENVELOPE.keys() | keys.keys()
    assert (found["calibration"], found["layers"]) == (str(bench.store), LAYERS)
    assert (found["samples"], found["length"]) == (SAMPLES, LENGTH)
    assert len(found["modules"]) == 7 * LAYERS
    for name, module in found["modules"].items():
        assert module["tokens"] == TOKENS, name
        assert module["input_min"] < 0 < module["input_scale"] < module["input_max"], name
    groups = {group["producer"]: group for group in found["smoothed"]}
    assert len(groups) == len(found["smoothed"]) == 4 * LAYERS
    group = groups["model.layers.2.input_layernorm"]
    assert group["readers"] == [f"{A.format(2)}.{name}_proj.weight" for name in "kqv"]
    assert group["alpha"] == 0.5
    assert 0 < group["least"] <= group["most"]
    assert found["uncalibrated"] == found["no_tokens"] == []
    again = bench.calibrate("--json")
    assert again.json == found


def test_quiet(make: Callable[..., Bench]) -> None:
    bench = make()
    result = bench.calibrate("--quiet")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("modules ")
    other = bench.at("other")
    assert (other.run("--quiet").out, other.run("--quiet", "--force").err) == ("", "")


def test_default_places(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    monkeypatch.chdir(bench.root)
    assert run_cli("calibrate", "recipe.yaml", "--model", bench.model).code == 0
    assert (bench.root / "qwen3-recipe.calibration" / "calibration.json").exists()
    planned = run_cli("quantize", "recipe.yaml", "--model", bench.model, "--plan", "--json")
    assert planned.json["plan"]["calibration"]["complete"] is True
    for command, name in (("calibrate", "named.calibration"), ("quantize", "named")):
        done = run_cli(command, "recipe.yaml", "--model", bench.model, "--set", "output=named")
        assert done.code == 0, done.err
        assert (bench.root / name).is_dir()
    assert "running: " not in done.err, "the two do not agree on the place"


# one step or two


def test_one_step_or_two(make: Callable[..., Bench]) -> None:
    bench = make(SMOOTH.replace(", observer: minmax", ""))
    alone = bench.run()
    assert alone.code == 0, alone.err
    assert "layer 1/4: model.layers.0" in alone.err
    whole = snapshot(bench.out)
    two = bench.at("two")
    assert two.calibrate().code == 0
    assert snapshot(two.store) == snapshot(bench.store)
    elsewhere = bench.root / "elsewhere"
    two.store.rename(elsewhere)
    result = two.run("--calibration", elsewhere)
    assert result.code == 0, result.err
    assert "layer" not in result.err
    assert not two.store.exists()
    assert snapshot(two.out) == whole
    again = bench.at("again")
    result = again.run("--calibration", bench.store, "--json")
    assert (result.code, "layer" in result.err) == (0, False)
    assert result.json["plan"]["calibration"]["complete"] is True
    assert snapshot(again.out) == whole
    for module in ("q_proj", "o_proj"):
        assert bench.described(f"{A.format(3)}.{module}") == "W8A8"


def test_forced_again(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.run().code == 0
    whole = snapshot(bench.root)
    result = bench.run("--force", "--fresh")
    assert result.code == 0, result.err
    assert "running: " not in result.err, "what took long is kept"
    assert snapshot(bench.root) == whole


def test_plan_runs_nothing(make: Callable[..., Bench]) -> None:
    bench = make()
    before = snapshot(bench.root)
    planned = bench.run("--plan")
    command = f"quantcli quantize {bench.recipe} --model {bench.model} --out {bench.out}"
    assert (planned.code, planned.later) == (0, f"next: {command}\n")
    (line,) = (line for line in planned.out.splitlines() if line.startswith("calibration "))
    memory = re.search(r"about ([\d.]+) MB of memory", line)
    assert memory is not None
    assert 40 < float(memory[1]) < 130  # the plan's own, a layer of 0.1 MB, two threads' batches
    assert line == (
        "calibration  runs first: ranges of 28 modules, clips of 28 modules and smoothing from 4 "
        "samples of 16 tokens of "
        f"{bench.root}/text.txt, kept in {bench.store}; about {memory[1]} MB of memory, "
        "and up to 16.4 kB of hidden states on disk"  # 2 layers x 4 x 16 tokens x 64 x 2 bytes
    )
    table = bench.run("--plan", "--json")
    assert (table.code, table.later) == (0, "")
    told = table.json["plan"]["calibration"]
    assert told == {
        "folder": str(bench.store),
        "complete": False,
        "layers_done": 0,
        "data": str(bench.root / "text.txt"),
        "samples": SAMPLES,
        "length": LENGTH,
        "modules": sorted(told["modules"]),
        "smooth": True,
        "methods": ["smooth"],
    }
    assert len(told["modules"]) == 28
    assert snapshot(bench.root) == before, "a plan writes nothing"
    done = bench.run("--json")
    assert done.json["plan"]["calibration"] == told
    (line,) = (
        x for x in bench.run("--plan", "--force").out.splitlines() if x.startswith("calibration")
    )
    assert line == (
        f"calibration  {bench.store}, ranges of 28 modules and clips of 28 modules; 16 groups smoothed"
    )
    after = bench.run("--plan", "--force", "--json").json["plan"]
    assert (after["calibration"]["complete"], after["calibration"]["layers_done"]) == (True, LAYERS)
    assert after["digest"] == done.json["plan"]["digest"] != table.json["plan"]["digest"]
    assert after["shards"] == table.json["plan"]["shards"], "sizes are known before"


def test_smoothing_alone(make: Callable[..., Bench]) -> None:
    """Dynamic schemes measure nothing, and smoothing wants samples all the same."""
    bench = make(SMOOTH.replace("{name: w8a8_static, observer: minmax}", "w8a8_dynamic"))
    assert "runs first: clips of 28 modules and smoothing from 4 samples" in bench.run("--plan").out
    assert bench.run().code == 0
    assert bench.described(f"{A.format(0)}.q_proj") == "W8A8_DYNAMIC"
    report = bench.calibrate("--json").json
    assert len(report["smoothed"]) == 16
    assert report["modules"][f"{A.format(0)}.q_proj"] == {"tokens": TOKENS}


def test_quantized_inputs_are_what_later_layers_see(make: Callable[..., Bench]) -> None:
    bench = make(RECIPE)
    seen = bench.calibrate("--json").json["modules"]
    other = bench.at("other")
    other.edit_recipe(RECIPE.replace("data:", "inputs: quantized, data:"))
    quantized = other.calibrate("--json").json["modules"]
    for layer in range(LAYERS):
        of_layer = [name for name in seen if f".{layer}." in name]
        assert any(quantized[name] != seen[name] for name in of_layer) == (layer > 0)


QUANTIZED = """\
target: compressed-tensors
calibration: {data: text.txt, samples: 4, length: 16, inputs: quantized}
rules:
  - match: "*.mlp.*_proj"
    scheme: {name: fp8_static, observer: minmax}
  - match: ["*.q_proj", "*.k_proj", "*.v_proj"]
    scheme: {name: w4a16, group_size: 32, clip: CLIP}
"""


@pytest.mark.parametrize("clip", ["columns", "inputs"])
def test_quantized_inputs_of_schemes_that_look_at_a_whole_weight(
    make: Callable[..., Bench], clip: str
) -> None:
    bench = make(QUANTIZED.replace("CLIP", clip))
    result = bench.run("--workers", 2)
    assert result.code == 0, result.err
    other = bench.at("one")
    assert other.run("--workers", 1).code == 0
    assert snapshot(other.store) == snapshot(bench.store)
    assert snapshot(other.out) == snapshot(bench.out)
    quantized = bench.calibrate("--json").json["modules"]
    checked = run_cli(
        "verify", bench.out, "--against", bench.model, "--full", "--calibration", bench.store
    )
    assert checked.code == 0, checked.out + checked.err
    assert "not recomputed" not in checked.out
    floats = bench.at("float")
    floats.edit_recipe(QUANTIZED.replace("CLIP", clip).replace("inputs: quantized", "inputs: float"))
    seen = floats.calibrate("--json").json["modules"]
    gate, attention = "model.layers.{}.mlp.gate_proj", A + ".q_proj"
    assert seen[gate.format(0)] == quantized[gate.format(0)]  # a layer's own inputs are float
    assert seen[gate.format(1)] != quantized[gate.format(1)]
    stored = load_file(bench.store / "layer-00000.safetensors")
    name = f"stats.{attention.format(0)}.input_square"
    assert (name in stored) == (clip == "inputs")


# stopped and gone on


class Stops(Progress):
    """Ctrl-C as soon as a layer is done."""

    def __init__(self, layer: int) -> None:
        self.at = layer

    def layer(self, name: str, index: int, note: str = "") -> None:
        if index == self.at:
            raise KeyboardInterrupt


def job(bench: Bench) -> commands.Job:
    return commands.plan(bench.recipe, model=str(bench.model), out=bench.out)


def stopped(bench: Bench, watcher: Any = None) -> None:
    """A run that is interrupted in its calibration."""
    with pytest.raises((KeyboardInterrupt, Killed)):
        commands.quantize(job(bench), watcher, Resources(workers=2))
    assert not bench.out.exists()
    assert not bench.partial.exists()


def goes_on(bench: Bench, wanted: Bench, *more: object) -> str:
    """Run again: the same bytes as without the interruption. What was said."""
    result = bench.run(*more)
    assert result.code == 0, result.err
    assert snapshot(bench.store) == snapshot(wanted.store)
    assert snapshot(bench.out) == snapshot(wanted.out)
    return result.err


@pytest.mark.parametrize("recipe", [SMOOTH, QUANTIZED_INPUTS], ids=["float", "quantized"])
@pytest.mark.usefixtures("batches")
def test_stopped_after_any_layer(make: Callable[..., Bench], recipe: str) -> None:
    wanted = make(recipe)
    assert wanted.run().code == 0
    for layer in range(LAYERS):
        bench = wanted.at(f"out{layer}")
        stopped(bench, Stops(layer))
        told = bench.run("--plan").out
        done = layer + 1
        if done < LAYERS:
            assert f"continues after {done} layer" in told
        said = goes_on(bench, wanted)
        assert f"layer {done}/" not in said
        assert (f"layer {done + 1}/4" in said) == (done < LAYERS)


@pytest.mark.usefixtures("batches")
def test_stopped_after_any_layer_and_again(make: Callable[..., Bench]) -> None:
    """Interrupted after each layer in turn, one run a layer."""
    wanted = make(QUANTIZED_INPUTS)
    assert wanted.run().code == 0
    bench = wanted.at("again")
    for layer in range(LAYERS):
        stopped(bench, Stops(layer))
        assert job(bench).session.layers_done == layer + 1
    goes_on(bench, wanted)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("recipe", [SMOOTH, QUANTIZED_INPUTS], ids=["float", "quantized"])
@pytest.mark.parametrize("place", ["sink", "source"])
def test_stopped_within_a_layer(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, recipe: str, place: str
) -> None:
    wanted = make(recipe)
    owner, name = (states.StatesWriter, "put") if place == "sink" else (states.States, "get")
    real = getattr(owner, name)
    left = 10**6

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(owner, name, counted)
    assert wanted.run().code == 0
    calls = 10**6 - left
    # the stack's inputs, and the outputs of all layers but the last
    # of each sample and of the probe
    assert calls == (SAMPLES + 1) * LAYERS if place == "sink" else calls > 2 * SAMPLES * LAYERS
    layers_done = set()
    for nth in sorted({*range(1, calls, calls // 3), calls - 1}):
        bench = wanted.at(f"out{nth}")
        left = nth
        stopped(bench)
        layers_done.add(job(bench).session.layers_done)
        left = 10**6
        goes_on(bench, wanted)
    assert layers_done == set(range(LAYERS - (place == "sink")))  # the last layer's outputs go nowhere


@pytest.mark.usefixtures("batches")
def test_killed_at_any_call_to_the_disk(make: Callable[..., Bench]) -> None:
    wanted = make()
    faults = Faults(wanted.root, 10**9, Killed, sticky=True)
    with faults.armed():
        assert wanted.calibrate("--workers", 1).code == 0
    assert wanted.run().code == 0
    layers_done = set()
    for nth in range(0, faults.calls, faults.calls // 10):
        bench = wanted.at(f"out{nth}")
        killing = Faults(bench.root, nth, Killed, sticky=True)
        with killing.armed(), pytest.raises(Killed):
            bench.calibrate("--workers", 1)
        result = bench.calibrate()
        assert result.code == 0, (killing.fired, result.err)
        layers_done.add("layer 1/4" not in result.err)
        assert snapshot(bench.store) == snapshot(wanted.store), killing.fired
    assert layers_done == {True, False}


@pytest.mark.parametrize("left", [(".lock",), (".lock", ".calibration.json.writing")])
def test_killed_before_a_word_was_written(make: Callable[..., Bench], left: tuple[str, ...]) -> None:
    bench = make()
    bench.store.mkdir()
    for name in left:
        (bench.store / name).touch()
    assert bench.run("--plan").code == 0
    assert bench.calibrate().code == 0


def test_killed_before_the_last_states_were_deleted(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.calibrate().code == 0
    whole = snapshot(bench.store)
    (bench.store / "states-00003.safetensors").write_bytes(b"gigabytes")
    (bench.store / ".states-00004.safetensors.writing").write_bytes(b"gigabytes")
    result = bench.calibrate()
    assert result.code == 0, result.err
    assert "layer 4/4" not in result.err
    assert snapshot(bench.store) == whole


@pytest.mark.usefixtures("batches")
def test_states_that_are_gone_or_damaged(make: Callable[..., Bench]) -> None:
    """What is not there any more is computed again."""
    wanted = make()
    assert wanted.run().code == 0
    for number, damage in enumerate((Path.unlink, lambda path: path.write_bytes(b"?" * 99))):
        bench = wanted.at(f"out{number}")
        stopped(bench, Stops(1))
        damage(bench.store / "states-00002.safetensors")
        goes_on(bench, wanted)


@pytest.mark.usefixtures("batches")
def test_a_report_that_is_gone_is_made_again(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.calibrate().code == 0
    whole = snapshot(bench.store)
    (bench.store / "layer-00002.json").unlink()
    result = bench.calibrate()
    assert result.code == 0, result.err
    assert snapshot(bench.store) == whole


def test_ctrl_c(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make()
    with monkeypatch.context() as patch:
        patch.setattr(events.Events, "layer", lambda *_: signal.raise_signal(signal.SIGINT))
        for run in (bench.calibrate, bench.run):
            result = run()
            assert result.code == 130
            assert "the same command again continues where it stopped" in result.err
            assert "Traceback" not in result.err
    assert bench.run("--plan", "--json").json["plan"]["calibration"]["layers_done"] == 2
    assert bench.run().code == 0


def test_sigterm_where_sigint_is_ignored(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is in what a script starts in the background."""
    bench = make()
    monkeypatch.setattr(events.Events, "layer", lambda *_: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        result = bench.calibrate()
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.code == 130
    kept = f"1 of 4 layers in {bench.store}; the unfinished layer is computed again"
    assert f"error: interrupted; kept: {kept}" in result.err.splitlines()
    assert job(bench).session.layers_done == 1


def test_fresh_starts_over(make: Callable[..., Bench]) -> None:
    bench = make()
    stopped(bench, Stops(1))
    result = bench.calibrate("--fresh")
    assert result.code == 0, result.err
    assert "layer 1/4" in result.err
    whole = snapshot(bench.store)
    assert bench.calibrate("--set", "calibration.seed=1").code == 2
    assert snapshot(bench.store) == whole
    assert bench.calibrate("--set", "calibration.seed=1", "--fresh").code == 0
    assert snapshot(bench.store).keys() == whole.keys()
    assert snapshot(bench.store) != whole
    assert bench.calibrate("--fresh").code == 0
    assert snapshot(bench.store) == whole


# kills itself in the middle of the first write to the disk after the second layer's report
KILLED = """
import os, signal, sys
from pathlib import Path
report = Path(sys.argv.pop(1))
real = os.pwrite
def pwrite(file, data, place):
    if report.exists():
        real(file, data[: len(data) // 2], place)
        os.kill(os.getpid(), signal.SIGKILL)
    return real(file, data, place)
os.pwrite = pwrite
from quantcli.__main__ import main
main(sys.argv[1:])
"""


def test_sigkill(make: Callable[..., Bench]) -> None:
    wanted = make()
    assert wanted.run().code == 0
    bench = wanted.at("killed")
    command = [sys.executable, "-c", KILLED, bench.store / "layer-00001.json", *bench.args()]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not bench.out.exists()
    reports = sorted(path.name for path in bench.store.glob("layer-*.json"))
    assert reports == ["layer-00000.json", "layer-00001.json"]
    assert list(bench.store.glob("*states-*"))
    said = goes_on(bench, wanted)
    assert [f"layer {number}/4" in said for number in range(1, 5)] == [False, False, True, True]


# what must not show in the bytes


@pytest.mark.usefixtures("batches")
def test_workers_do_not_show(make: Callable[..., Bench]) -> None:
    wanted = make(QUANTIZED_INPUTS.replace("name: w8a8_static, observer: minmax", "name: w8a8_static"))
    assert wanted.run("--workers", 1).code == 0
    for workers in (2, 3):
        goes_on(wanted.at(f"out{workers}"), wanted, "--workers", workers)


@pytest.mark.usefixtures("batches")
def test_memory_does_not_show(make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = make(QUANTIZED_INPUTS)
    real, read = states.read_tensor, []
    monkeypatch.setattr(states, "read_tensor", lambda stored: read.append(stored) or real(stored))
    assert wanted.run().code == 0
    assert not read, "there is room for all hidden states"
    refused = wanted.at("small").run("--max-memory", "1KB", "--workers", 2)
    assert refused.code == 2
    (least,) = re.findall(r"take ([\d,]+)$", refused.later, re.MULTILINE)
    batch = LENGTH * 64 * 2  # bytes
    reads = []
    for room in (0, 2 * batch, 4 * batch):  # of inputs and of outputs
        read.clear()
        limit = int(least.replace(",", "")) + room
        goes_on(wanted.at(f"out{room}"), wanted, "--max-memory", f"{limit}", "--workers", 2)
        reads.append(len(read))
    assert reads[0] > reads[1] > reads[2] > 0


# mixtures of experts


def starve(tensors: dict[str, torch.Tensor]) -> None:
    """A router of layer 1 under which experts 6 and 7 never are among the best two."""
    router = tensors["model.layers.1.mlp.gate.weight"]
    router[1], router[3] = -router[0], -router[2]
    router[6:] = 0


def test_experts(make: Callable[..., Bench]) -> None:
    bench = make(family="qwen3_moe")
    change_tensors(bench.own_model(), starve)
    bench.recipe = RECIPES / "w8a8_moe.yaml"
    result = bench.run(*FEW, "--set", "smooth.alpha=0.5", "--set", "smooth.within=1")
    assert result.code == 0, result.err
    expert = "model.layers.{}.mlp.experts.{}.{}_proj"
    (note,) = (line for line in result.err.splitlines() if "no token" in line)
    assert note.startswith("note: no token reached `model.layers.")
    assert note.endswith(" more: their weights are clipped as without calibration")
    for layer in range(LAYERS):
        assert bench.described(f"{A.format(layer)}.q_proj") == "W8A8"
        assert bench.described(f"model.layers.{layer}.mlp.gate") == "FLOAT"
        for number in range(8):
            assert bench.described(expert.format(layer, number, "up")) == "W8A8_DYNAMIC"
    found = bench.calibrate(
        *FEW, "--set", "smooth.alpha=0.5", "--set", "smooth.within=1", "--json"
    ).json
    for layer in range(LAYERS):
        for part in ("gate", "up", "down"):
            seen = [found["modules"][expert.format(layer, n, part)]["tokens"] for n in range(8)]
            assert sum(seen) == 2 * TOKENS
            if layer == 1:
                assert seen[6:] == [0, 0]
        assert found["modules"][f"model.layers.{layer}.mlp.gate"]["tokens"] == TOKENS
    starved = {expert.format(1, n, part) for n in (6, 7) for part in ("gate", "up", "down")}
    assert starved <= set(found["no_tokens"])
    assert all(not found["modules"][name]["tokens"] for name in found["no_tokens"])
    assert found["uncalibrated"] == []  # their scheme needs no data
    told = bench.calibrate(*FEW, "--set", "smooth.alpha=0.5", "--set", "smooth.within=1").out
    assert "not reached  " in told
    smoothed = {group["producer"] for group in found["smoothed"]}
    assert "model.layers.0.input_layernorm" in smoothed


EXPERT_RANGES = f"""\
target: compressed-tensors
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, uncalibrated: group}}
rules:
  - {{match: "*.experts.*", scheme: {{name: fp8_static, observer: minmax}}}}
"""
ACROSS = r"siblings: ['(.*\.experts)\.\d+\.(?:gate|up)_proj']"


def input_scales(bench: Bench) -> dict[str, float]:
    files = bench.out.glob("*.safetensors")
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {name: float(t) for name, t in stored.items() if name.endswith(".input_scale")}


def test_siblings_of_a_recipe_share_a_range(make: Callable[..., Bench]) -> None:
    """Experts see different tokens: the largest of all is everyone's, also of those without tokens."""
    first = make(EXPERT_RANGES, family="qwen3_moe")
    change_tensors(first.own_model(), starve)
    scales = {}
    for kind, more in (("alone", ""), ("together", ACROSS)):
        bench = first.at(kind)
        bench.edit_recipe(EXPERT_RANGES + more)
        result = bench.run()
        assert result.code == 0, result.err
        verified = run_cli("verify", bench.out, "--full", "--against", bench.model)
        assert verified.code == 0, verified.out
        scales[kind] = input_scales(bench)
    for layer in range(LAYERS):
        names = [n for n in scales["alone"] if f"layers.{layer}.mlp.experts" in n]
        wide = [n for n in names if "down_proj" not in n]
        assert len({scales["alone"][n] for n in wide}) > 2
        assert {scales["together"][n] for n in wide} == {max(scales["alone"][n] for n in wide)}
        down = [n for n in names if "down_proj" in n]
        assert [scales["together"][n] for n in down] == [scales["alone"][n] for n in down]


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (r"model\.layers\.\d+\.(mlp)\.experts\.0\.(?:gate|up)_proj", "which are in different layers"),
        (r"(.*)\.experts\.0\.(?:gate|down)_proj", None),
    ],
)
def test_siblings_that_cannot_be_measured_together(
    make: Callable[..., Bench], pattern: str, what: str | None
) -> None:
    bench = make(f"{EXPERT_RANGES}siblings: ['{pattern}']", family="qwen3_moe")
    result = bench.run()
    if what is None:  # other inputs, in one layer: one range for both
        assert result.code == 0, result.err
        first = "model.layers.0.mlp.experts.0.{}_proj.input_scale"
        scales = input_scales(bench)
        assert scales[first.format("gate")] == scales[first.format("down")]
    else:
        assert result.code == 2
        assert what in result.err
        assert not bench.out.exists()


def test_a_transform_is_not_shared_by_other_inputs(make: Callable[..., Bench]) -> None:
    text = f"""\
target: ascend
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, dtype: float32}}
rules:
  - {{match: ["*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"],
     scheme: {{name: w4a4_flatquant, epochs: 1}}}}
siblings: ['(.*)\\.(?:self_attn|mlp)\\.(?:q|gate)_proj']
"""
    result = make(text).run()
    assert result.code == 2, result.out
    assert "`siblings` groups" in result.err
    assert "they have different inputs" in result.err


# what no token reaches


@pytest.mark.parametrize("scheme", ["w8a16", "w4a4_dynamic", "fp8_dynamic"])
def test_a_head_that_clips_by_inputs_falls_back(make: Callable[..., Bench], scheme: str) -> None:
    """It is outside of the decoder stack, which no error tells: its inputs only weigh errors."""
    block = "calibration: {data: text.txt, samples: 4, length: 16}\n"
    lines = (
        "target: ascend\nrules:\n  - {match: '*.o_proj', scheme: w8a16}\n  - {match: lm_head, scheme: "
    )
    bench = make(lines.replace("rules", f"{block}rules") + f"{{name: {scheme}, clip: inputs}}}}\n")
    result = bench.run()
    assert result.code == 0, result.err
    note = "no token reached `lm_head`: their weights are clipped as without calibration"
    assert f"\nnote: {note}\n" in result.err
    plain = bench.at("plain")
    plain.edit_recipe(lines + f"{scheme}}}\n")
    assert plain.run().code == 0
    mine, theirs = (
        {k: t for file in b.out.glob("*.safetensors") for k, t in load_file(file).items()}
        for b in (bench, plain)
    )
    head = [name for name in mine if name.startswith("lm_head.")]
    assert len(head) > 1
    assert all(torch.equal(mine[name].float(), theirs[name].float()) for name in head)


HEAD = RECIPE + "  - match: lm_head\n    scheme: {name: w8a8_static, observer: minmax}\n"
DRAFT = "model.layers.4.draft_proj"


def add_draft(tensors: dict[str, torch.Tensor]) -> None:
    """A linear of a layer that transformers has no module for."""
    tensors[f"{DRAFT}.weight"] = torch.ones(64, 128, dtype=torch.bfloat16)


@pytest.mark.parametrize("module", ["lm_head", DRAFT])
@pytest.mark.parametrize("policy", ["error", "dynamic", "group"])
def test_what_no_token_reaches(make: Callable[..., Bench], module: str, policy: str) -> None:
    bench = make(
        (HEAD if module == "lm_head" else RECIPE).replace("data:", f"uncalibrated: {policy}, data:")
    )
    if module == DRAFT:
        change_tensors(bench.own_model(), add_draft)
    before = snapshot(bench.root)
    assert bench.run("--plan").code == 0
    result = bench.run()
    if policy != "dynamic":  # nothing is like it, so that `group` has nothing to give
        assert result.code == 2
        what, where, fix = result.later.splitlines()[-3:]
        assert what == f"error: no token reached `{module}`, and its scheme needs data"
        assert where == f"  --> {bench.recipe}:{6 if module == 'lm_head' else 4}"
        assert "scheme with dynamic inputs" in fix
        assert "calibration.uncalibrated" in fix
        assert snapshot(bench.root) == before, "it is known before the first layer"
        return
    assert result.code == 0, result.err
    assert bench.described(module) == "W8A8_DYNAMIC"
    assert bench.described(f"{A.format(0)}.q_proj") == "W8A8"
    note = f"no token reached `{module}`: they take a scheme that needs no data"
    planned = bench.run("--plan", "--force")
    assert f"note         {note}" in planned.out
    told = bench.run("--force", "--json").json["plan"]
    assert note in told["notes"]
    schemes = {(rule["scheme"], rule["modules"]) for rule in told["rules"]}
    assert ("w8a8_dynamic", 1) in schemes
    assert told["quantized_modules"] == 29


def settle(policy: str, seen: dict[str, list[float] | None]) -> dict[str, Any]:
    """The statistics of modules that saw some inputs, or none."""
    scheme = W8A8Static(observer="minmax")
    bf16 = torch.bfloat16
    quantized = {name: Quantized(scheme, torch.float32, bf16, f"recipe.yaml:{name}") for name in seen}
    policy = Policy(quantized, Siblings({}), policy, inputs="float")
    observers = {}
    for name, values in seen.items():
        observers[name] = policy.observer(name)
        if values:
            observers[name].update(torch.tensor([values]).to(bf16), 0)
    run = SimpleNamespace(policy=policy)
    work = LayerWork(SimpleNamespace(run=run), None, {}, {}, LayerReport(""))
    fill_in(work, observers)
    assert work.report.uncalibrated == [name for name, values in seen.items() if not values]
    return {name: (float(s["input_min"]), float(s["input_max"])) for name, s in work.stats.items()}


def test_group_takes_what_its_like_have_seen() -> None:
    seen = {
        "experts.0.up": [-1.0, 2.0],
        "experts.1.up": None,
        "experts.2.up": [-4.0, 1.0],
        "experts.0.down": [-64.0, 64.0],
    }
    settled = settle("group", seen)
    assert settled == {
        "experts.0.up": (-1, 2),
        "experts.1.up": (-4, 2),
        "experts.2.up": (-4, 1),
        "experts.0.down": (-64, 64),
    }
    assert settle("dynamic", seen).keys() == seen.keys() - {"experts.1.up"}
    with pytest.raises(InputError, match=r"no token reached `experts.1.up`") as caught:
        settle("error", seen)
    assert caught.value.where == "recipe.yaml:experts.1.up"
    with pytest.raises(InputError, match=r"no token reached `experts.0.up`") as caught:
        settle("group", {"experts.0.up": None, "experts.0.down": [1.0]})
    assert caught.value.where == "recipe.yaml:experts.0.up"


# smoothing


def test_smooth_rules(make: Callable[..., Bench]) -> None:
    bench = make(
        RECIPE + "smooth:\n  alpha: 0.75\n  within: 1\n  rules:\n"
        "    - {match: '*.down_proj', skip: true}\n"
        "    - {match: 're:.*layers\\.[01]\\..*o_proj', alpha: 0.25}\n"
        "    - {match: '*.no_such', alpha: 1.0, optional: true}\n"
    )
    found = {group["producer"]: group for group in bench.calibrate("--json").json["smoothed"]}
    for layer in range(LAYERS):
        assert f"model.layers.{layer}.mlp.up_proj" not in found, "its reader is to be left alone"
        assert found[f"model.layers.{layer}.input_layernorm"]["alpha"] == 0.75
        assert found[f"{A.format(layer)}.v_proj"]["alpha"] == (0.25 if layer < 2 else 0.75)


def test_smooth_rule_for_nothing(make: Callable[..., Bench]) -> None:
    bench = make(RECIPE + "smooth:\n  rules:\n    - {match: '*.dwn_proj', alpha: 1.0}\n")
    for result in (bench.calibrate(), bench.run(), bench.run("--plan")):
        assert result.code == 2
        what, where, fix = result.later.splitlines()
        assert what == "error: `smooth.rules.0` matches no quantized module"
        assert where == f"  --> {bench.recipe}:8   match: *.dwn_proj"
        assert "optional: true" in fix


def test_smooth_rule_that_is_never_asked(make: Callable[..., Bench]) -> None:
    rules = "    - {match: '*_proj', skip: true}\n    - {match: '*.down_proj', alpha: 1.0}\n"
    result = make(RECIPE + "smooth:\n  rules:\n" + rules).run("--plan")
    assert result.code == 2
    what, _, fix = result.later.splitlines()
    assert what == "error: `smooth.rules.1` matches only modules that earlier ones take"
    assert fix == "  fix: move it before them, or remove it"


# other data, other models


def write_records(folder: Path, lengths: list[int]) -> None:
    records = (json.dumps({"text": TEXT[:length]}) for length in lengths)
    (folder / "records.jsonl").write_text("\n".join(records) + "\n")


PADDED = SMOOTH.replace("text.txt", "records.jsonl, pack: false")
LENGTHS = [5, 11, 16, 40]
REAL = 5 + 11 + 16 + 16


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_records_of_several_lengths(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    bench = make(PADDED, family=family)
    if family == "qwen3_moe":
        bench.edit_recipe(
            PADDED.replace("rules:\n", "rules:\n  - {match: '*.experts.*', scheme: w8a8_dynamic}\n")
        )
    write_records(bench.root, LENGTHS)
    result = bench.run()
    assert result.code == 0, result.err
    assert f"{REAL} tokens" in result.err
    found = bench.calibrate("--json").json
    check_counts(found, family)

    # the same, padded to one batch: what is padding is not seen
    load = session.load_dataset

    def one_batch(source: Any, *arguments: Any, **options: Any) -> Any:
        dataset = load(dataclasses.replace(source, batch_tokens=2**12), *arguments, **options)
        (batch,) = dataset.batches
        assert int(batch.mask.sum()) == REAL < batch.mask.numel()
        return dataset

    monkeypatch.setattr(session, "load_dataset", one_batch)
    other = bench.at("padded")
    padded = other.calibrate("--json")
    assert padded.code == 0, padded.err
    check_counts(padded.json, family)
    for name, module in padded.json["modules"].items():
        for key in ("input_min", "input_max"):
            if key in module:
                alone = found["modules"][name][key]
                assert module[key] == pytest.approx(alone, rel=0.02, abs=0.02), name


def check_counts(found: dict[str, Any], family: str) -> None:
    modules = found["modules"]
    assert all(m["tokens"] == REAL for name, m in modules.items() if "experts" not in name)
    if family == "qwen3_moe":
        for layer in range(LAYERS):
            mine = [m["tokens"] for name, m in modules.items() if f"layers.{layer}.mlp.experts" in name]
            assert sum(mine) == 3 * 2 * REAL


def test_multimodal(make: Callable[..., Bench]) -> None:
    bench = make(family="multimodal")
    bench.recipe = RECIPES / "w8a8_static_smooth.yaml"
    result = bench.run(*FEW)
    assert result.code == 0, result.err
    before, after = load_file(bench.model / "model.safetensors"), {}
    for shard in bench.out.glob("*.safetensors"):
        after |= load_file(shard)
    towers = [name for name in before if "language_model" not in name and "lm_head" not in name]
    assert len(towers) > 90
    assert all(torch.equal(before[name], after[name]) for name in towers)
    language = (
        "model.language_model"
        if any("model.language_model" in n for n in before)
        else "language_model.model"
    )
    assert bench.described(f"{language}.layers.0.self_attn.q_proj") == "W8A8"
    assert after[f"{language}.layers.0.self_attn.q_proj.weight"].dtype == torch.int8
    assert f"{language}.layers.0.self_attn.q_proj.deq_scale" in after
    assert not any(name.endswith("scale") for name in after if "language_model" not in name)


CONFIGURATION = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own_model"

    def __init__(self, vocab_size=128, hidden_size=32, num_hidden_layers=2, **more):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**more)
"""
MODELING = """
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig

Path("MARKER").write_text("this ran")

class OwnLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(2 * width, width)

    def forward(self, hidden, scale):
        return (hidden + scale * self.out_proj(torch.relu(self.in_proj(self.norm(hidden)))),)

class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = (OwnLayer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **more):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden, 0.5)[0]
        return CausalLMOutput(logits=self.head(hidden))
"""


def make_own(folder: Path, marker: Path) -> None:
    folder.mkdir()
    (folder / "configuration_own.py").write_text(CONFIGURATION)
    (folder / "modeling_own.py").write_text(MODELING.replace("MARKER", str(marker)))
    classes = {"AutoConfig": "configuration_own.OwnConfig"}
    classes["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
    config = {"model_type": "own_model", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    config |= {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (128, 32), "head.weight": (128, 32)}
    for path in ("blocks.0", "blocks.1"):
        shapes |= {f"{path}.norm.weight": (32,), f"{path}.norm.bias": (32,)}
        shapes |= {f"{path}.in_proj.weight": (64, 32), f"{path}.in_proj.bias": (64,)}
        shapes |= {f"{path}.out_proj.weight": (32, 64), f"{path}.out_proj.bias": (32,)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)


def test_code_that_came_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    marker = tmp_path / "marker"
    bench = make_bench(tmp_path, tmp_path / "model", SMOOTH)
    make_own(bench.model, marker)
    before = snapshot(tmp_path)
    for result in (bench.calibrate(), bench.run()):
        assert result.code == 2
        assert "code of its own" in result.err
        assert f"{bench.model / 'config.json'}" in result.err
        assert "--trust-remote-code" in result.err
    assert not marker.exists()
    assert snapshot(tmp_path) == before
    assert bench.run("--plan").code == 0
    assert not marker.exists(), "a plan runs no model"
    trusted = bench.calibrate("--trust-remote-code", "--json")
    assert trusted.code == 0, trusted.err
    assert marker.read_text() == "this ran"
    assert trusted.json["modules"]["blocks.1.out_proj"]["tokens"] == TOKENS
    assert [group["producer"] for group in trusted.json["smoothed"]] == [
        "blocks.0.norm",
        "blocks.1.norm",
    ]
    marker.unlink()
    done = bench.run()
    assert done.code == 0, "what is measured needs no code"
    assert not marker.exists()
    assert bench.described("blocks.0.in_proj") == "W8A8"
    assert {"configuration_own.py", "modeling_own.py"} <= snapshot(bench.out).keys()


# devices


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is imported for a device, in place of really importing it."""
    names: list[str] = []

    def import_module(name: str) -> None:
        assert name == "torch_npu"
        names.append(name)

    monkeypatch.setattr(devices, "importlib", SimpleNamespace(import_module=import_module))
    return names


def test_torch_npu_is_imported_for_npu_alone(imported: list[str]) -> None:
    assert devices.open_device("cpu") == torch.device("cpu")
    assert imported == []
    for name in ("npu", "npu:1"):  # torch has no such device until torch_npu has brought it
        with pytest.raises(devices.MachineError, match=f"no device `{name}` here"):
            devices.open_device(name)
    assert imported == ["torch_npu"] * 2


def test_other_devices_compute_one_batch_at_a_time() -> None:
    skeleton = SimpleNamespace(layers=[], move_buffers=lambda device: None)
    for device, workers in (("cpu", 4), ("meta", 1)):
        made = replay.Replay(skeleton, [], device=torch.device(device), workers=4)
        assert made._workers == workers


@pytest.mark.parametrize(
    ("device", "what", "fix"),
    [
        ("cuda:99", "no device `cuda:99` here: ", "--device cpu works anywhere"),
        ("npu", "--device npu needs torch_npu", f"on the Ascend machine: {pip_install('npu')}"),
    ],
)
def test_a_device_that_is_not_here(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, device: str, what: str, fix: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # as if it were not installed
    bench = make()
    before = snapshot(bench.root)
    for result in (bench.calibrate("--device", device), bench.run("--quiet", "--device", device)):
        assert result.code == 3
        said, told = result.later.splitlines()
        assert said.startswith(f"error: {what}")
        assert told == f"  fix: {fix}"
        assert not said.endswith(".")
    assert snapshot(bench.root) == before


# waits for Ctrl-C after its first layer, and for a second one while the first is being seen to
INTERRUPTED = """
import signal, sys
from quantcli.cli import output as console
from quantcli.core import events
said, twice = events.Events.layer, sys.argv.pop(1) == "2"
def layer(*args):
    said(*args)
    while True:
        signal.pause()
def error(*args):
    print("it is seen to", file=sys.stderr, flush=True)
    while True:
        signal.pause()
events.Events.layer = layer
if twice:
    console.Output.error = error
from quantcli.__main__ import entry
entry()
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_the_process_with_the_documented_code(
    make: Callable[..., Bench], times: int
) -> None:
    """A second one ends it at once, whatever the first is waiting for."""
    bench = make()
    command = [sys.executable, "-c", INTERRUPTED, str(times), *map(str, bench.args())]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stderr is not None
            assert any(line.startswith("layer 1/") for line in process.stderr)
            process.send_signal(signal.SIGINT)
            if times == 2:
                assert "it is seen to\n" in process.stderr
                process.send_signal(signal.SIGINT)
            said = process.communicate()[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert ("the same command again continues where it stopped" in said) == (times == 1)
    assert "Traceback" not in said
    assert "terminate" not in said
    planned = bench.run("--plan", "--json").json["plan"]["calibration"]
    assert planned["layers_done"] == 1
    assert bench.run().code == 0
