"""The public API of the package."""

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

import quantcli
from quantcli.commands.keywords import Verifying, verify_defaults
from quantcli.verification.options import VerifyOptions
from tests.e2e.calibrating import TEXT, write_tokenizer
from tests.families import make_family
from tests.tiny_models import make_tiny

RULES = [{"role": ["attention", "mlp"], "scheme": "w8a8_dynamic"}, {"match": "*", "scheme": "keep"}]
DYNAMIC = {"target": "ascend", "rules": RULES}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("api") / "model", "llama")


@pytest.fixture(scope="module")
def converted(model):
    """A conversion, the events of it, and its folder."""
    events = []
    out = str(model.with_name("out"))
    return quantcli.quantize(DYNAMIC, model=str(model), out=out, on_progress=events.append), events


def test_every_public_name_is_there():
    for name in quantcli.__all__:
        assert getattr(quantcli, name).__doc__ or name == "__version__"
        assert name in quantcli.__doc__ or name == "__version__"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        quantcli.nonsense  # noqa: B018


def test_dir_shows_the_api_alone_and_no_submodule_hides_a_function():
    code = """
import importlib, pkgutil, quantcli
before = dir(quantcli)
for module in pkgutil.walk_packages(quantcli.__path__, "quantcli."):
    if module.name != "quantcli.__main__":
        importlib.import_module(module.name)
assert before == dir(quantcli) == sorted(quantcli.__all__)
for name in quantcli.__all__:
    assert callable(getattr(quantcli, name)) or name == "__version__", name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_imports_nothing_heavy():
    code = """
import sys, quantcli
assert not {"torch", "pydantic", "numpy", "rich", "typing"} & set(sys.modules) - loaded
quantcli.quantize, quantcli.verify, quantcli.Converted, quantcli.QuantError
assert not {"torch", "pydantic", "numpy", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", f"import sys; loaded = set(sys.modules){code}"], check=True)


def test_a_conversion(converted, model):
    result, events = converted
    assert type(result) is quantcli.Converted
    assert result.out == model.with_name("out")
    files = {f.name: f.stat().st_size for f in result.out.iterdir()}
    del files["quantcli_manifest.json"]
    assert {name: entry["bytes"] for name, entry in result.files.items()} == files
    assert result.bytes == sum(files.values())
    assert (result.shards_reused, result.plan.quantized_modules) == (0, 14)
    assert all(type(event) is quantcli.Event for event in events)
    assert any(event.kind == "file" and "model" in str(event) for event in events)
    assert json.loads(json.dumps(result.to_dict()))["plan"]["rules"][0]["modules"] == 14
    with pytest.raises(FrozenInstanceError):
        result.bytes = 0


def test_a_plan_is_what_is_written(converted, model, tmp_path):
    planned = quantcli.plan(DYNAMIC, model=model, out=tmp_path / "out", workers=1)
    written = converted[0].plan
    assert (planned.digest, planned.bytes_after) == (written.digest, written.bytes_after)
    assert planned.to_dict()["out"] == str(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [(rule["label"], rule["modules"]) for rule in planned.rules] == [("W8A8_DYNAMIC", 14)]
    smaller = quantcli.plan(DYNAMIC, model=model, out=tmp_path / "out", set={"rules.0.role": ["mlp"]})
    assert (smaller.quantized_modules, planned.quantized_modules) == (6, 14)
    same = quantcli.plan(DYNAMIC, model=model, out=tmp_path / "out", set=["rules.0.role=[mlp]"])
    assert same.digest == smaller.digest


def test_inspections(converted, model):
    contents = quantcli.inspect(converted[0].out)
    assert contents.quantization["format"] == "ascend (W8A8_DYNAMIC 14)"
    assert "matches" not in contents.to_dict()
    found = quantcli.inspect(str(model), tensors="*.q_proj").to_dict()["matches"]
    assert [row["name"] for row in found] == [
        f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)
    ]
    assert len(quantcli.inspect(model, outliers=True).modules) == 16


def test_a_format_and_back(converted, tmp_path):
    """`pack` by its arguments, and the key `from` of its plan."""
    packed = quantcli.pack(converted[0].out, "compressed-tensors", out=tmp_path / "out")
    assert packed.plan.to_dict()["from"] == packed.plan.origin == "ascend"
    assert quantcli.verify(packed.out).ok
    parts = [
        quantcli.quantize(
            DYNAMIC, model=converted[0].plan.model, out=tmp_path / "whole", part=f"{n}/2"
        ).out
        for n in (1, 2)
    ]
    merged = quantcli.pack(parts, merge=True, out=tmp_path / "whole")
    assert merged.files == converted[0].files
    assert [part["part"] for part in merged.plan.parts] == [1, 2]


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """A model with a tokenizer and a recipe that needs data, as arguments."""
    folder = tmp_path_factory.mktemp("static")
    (folder / "text.txt").write_text(TEXT)
    model = make_tiny(folder / "model", "llama")
    write_tokenizer(model)
    calibration = {"data": str(folder / "text.txt"), "samples": 4, "length": 16}
    rules = [
        {"role": ["attention"], "scheme": "w8a8_static"},
        {"role": ["mlp"], "scheme": "w8a8_dynamic"},
    ]
    return {"target": "ascend", "calibration": calibration, "rules": rules}, model


def test_a_job_goes_in_steps(static, tmp_path):
    job = quantcli.prepare(*static, out=tmp_path / "out")
    before = job.plan
    assert (job.needs_calibration, before.calibration["complete"]) == (True, False)
    with pytest.raises(quantcli.InputError, match="the calibration has not run") as error:
        job.convert()
    assert error.value.fix == "call job.calibrate() first"
    assert not (tmp_path / "out.calibration").exists()
    statistics = job.calibrate()
    assert job.calibrate() == statistics
    assert {row["tokens"] for row in statistics.modules} == {64}
    rows = [row for row in statistics.modules if row["module"].endswith("q_proj")]
    assert [row["module"] for row in rows] == [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]
    assert statistics.to_dict()["modules"][rows[0]["module"]]["tokens"] == 64
    assert all(not isinstance(v, dict | list) for row in statistics.modules for v in row.values())
    assert (job.needs_calibration, job.plan.calibration["complete"]) == (False, True)
    assert job.plan.digest != before.digest
    written = job.convert()
    assert written.plan.digest == job.plan.digest
    with pytest.raises(quantcli.InputError, match="converted already"):
        job.convert()
    # one call does the same
    once = quantcli.quantize(static[0], model=static[1], out=tmp_path / "once")
    assert once.files == written.files
    kept = quantcli.calibrate(static[0], model=static[1], out=tmp_path / "once.calibration")
    assert kept.to_dict()["modules"] == statistics.to_dict()["modules"]


def test_a_job_without_data(model, tmp_path):
    job = quantcli.prepare(DYNAMIC, model, out=tmp_path / "out")
    assert not job.needs_calibration
    with pytest.raises(quantcli.InputError, match="nothing in this recipe needs a calibration"):
        job.calibrate()
    assert job.convert().plan.quantized_modules == 14


def test_an_interrupted_job_continues(model, tmp_path):
    """The interrupt passes through, and leaves what the next call needs."""
    calls = []

    def interrupt(event):
        calls.append(event)
        if event.kind == "file" and len([e for e in calls if e.kind == "file"]) == 2:
            raise KeyboardInterrupt

    job = quantcli.prepare({**DYNAMIC, "max_shard": "30KB"}, model, out=tmp_path / "out", workers=1)
    with pytest.raises(KeyboardInterrupt):
        job.convert(on_progress=interrupt)
    assert not (tmp_path / "out").exists()
    written = job.convert()
    assert 0 < written.shards_reused < len(written.plan.shards)


def test_one_call_of_a_job_at_a_time(model, tmp_path):
    refused = []
    job = quantcli.prepare(DYNAMIC, model, out=tmp_path / "out")

    def again(event):
        with pytest.raises(quantcli.InputError) as error:
            job.convert()
        refused.append(error.value.what)

    job.convert(on_progress=again)
    assert set(refused) == {"another call of this job is running"}


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda m: quantcli.plan(3, model=m), "`recipe` is 3"),
        (lambda m: quantcli.plan(DYNAMIC, model=3), "`model` is 3"),
        (lambda m: quantcli.plan(DYNAMIC, model=m, workers=0), "`workers` is 0"),
        (lambda m: quantcli.plan(DYNAMIC, model=m, workers=True), "`workers` is True"),
        (lambda m: quantcli.plan(DYNAMIC, model=m, force="yes"), "`force` is 'yes'"),
        (lambda m: quantcli.plan(DYNAMIC, model=m, on_progress=3), "`on_progress` is 3"),
        (lambda m: quantcli.plan(DYNAMIC, model=m, set=[3]), "`set` is 3"),
        (lambda m: quantcli.plan(DYNAMIC, model=m, set={"a": object()}), "`set` has a value"),
        (lambda m: quantcli.quantize(DYNAMIC, model=m, max_memory="8 apples"), "`max_memory`"),
        (lambda m: quantcli.quantize(DYNAMIC, model=m, device="tpu"), "unknown device `tpu`"),
        (lambda m: quantcli.plan({**DYNAMIC, "rulez": []}, model=m), "unknown key `rulez`"),
        (lambda m: quantcli.plan({**DYNAMIC, 3: 4}, model=m), "key 3 is not plain text"),
        (
            lambda m: quantcli.plan({**DYNAMIC, "expect": m}, model=m),
            "PosixPath.* is not text, a number",
        ),
        (lambda m: quantcli.plan({**DYNAMIC, "model": "a\x1b"}, model=m), "has unprintable characters"),
        (
            lambda m: quantcli.inspect(m, tensors="*", outliers=True),
            "`outliers` does not take `tensors`",
        ),
        (lambda m: quantcli.inspect(m, report="page.html"), "`report` needs `outliers`"),
        (lambda m: quantcli.pack([m], "fp8", out="out"), "`pack` takes one checkpoint"),
        (lambda m: quantcli.pack([m], "fp8", out="out", merge=True), "`merge` takes no `target`"),
    ],
)
def test_what_is_wrong_is_an_input_error(model, call, what):
    with pytest.raises(quantcli.InputError, match=what):
        call(model)


def test_more_errors(model, tmp_path):
    cyclic = {**DYNAMIC}
    cyclic["verify"] = cyclic
    with pytest.raises(quantcli.InputError, match="nested too deeply"):
        quantcli.plan(cyclic, model=model)
    with pytest.raises(quantcli.InputError) as error:
        quantcli.plan({**DYNAMIC, "rules": [{**RULES[0], "scheme": "w8a9"}]}, model=model)
    assert error.value.where == "the recipe, `rules.0.scheme`"
    with pytest.raises(quantcli.AnswerNo, match="expected quantizable_pct"):
        quantcli.plan(
            {**DYNAMIC, "expect": {"quantizable_pct": ">= 101"}}, model=model, out=tmp_path / "o"
        )
    for keyword in ("depth", "overrides", "page"):
        with pytest.raises(TypeError, match=keyword):
            quantcli.verify("out", **{keyword: 3})
    with pytest.raises(quantcli.MachineError):
        quantcli.quantize(DYNAMIC, model=model, out="/proc/out")


def test_help_shows_every_option():
    for function in (
        quantcli.quantize,
        quantcli.plan,
        quantcli.calibrate,
        quantcli.verify,
        quantcli.pack,
    ):
        shown = inspect.signature(function).parameters
        assert "options" not in shown
        for name in shown:
            described = "`quantize`" in function.__doc__ or f"{name}:" in function.__doc__
            assert described or f"{name}," in function.__doc__, f"{function.__name__}: {name}"
    assert inspect.signature(quantcli.quantize).parameters["checksum"].default is True


def test_verify_takes_each_option_of_the_command_line():
    renamed = {"page": "report"}
    names = {field.name for field in fields(VerifyOptions)} - {"checkpoint", "others"}
    options = {renamed.get(name, name) for name in names}
    assert set(verify_defaults()) == options
    assert set(Verifying.__annotations__) == options


def test_nothing_of_the_process_changes(static, tmp_path, capfd, monkeypatch):
    """In a thread, as a notebook or a service calls it: signals, threads, environment, streams."""

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return handlers, torch.get_num_threads(), dict(os.environ)

    done = []

    def work():
        job = quantcli.prepare(*static, out=tmp_path / "out")
        job.calibrate()
        done.append(quantcli.verify(job.convert().out, full=True).ok)

    torch.set_num_threads(2)
    before = state()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
    assert state() == before
    assert capfd.readouterr() == ("", "")


def test_support_knows_every_cell():
    cells = {(cell["scheme"], cell["target"]): cell for cell in quantcli.support().support}
    labels = {key: cell["label"] for key, cell in cells.items() if cell["supported"]}
    assert {scheme: label for (scheme, target), label in labels.items() if target == "ascend"} == {
        "fp8_dynamic": "W8A8FP8_DYNAMIC",
        "mxfp4": "W4A4_MXFP4",
        "mxfp4_flatquant": "W4A4_MXFP4_FLATQUANT",
        "mxfp4_fp8": "W4A8_MXFP",
        "mxfp4a16": "W4A16_MXFP4",
        "mxfp8": "W8A8_MXFP8",
        "w4a16": "W4A16",
        "w4a4_dynamic": "W4A4_DYNAMIC",
        "w4a4_flatquant": "W4A4_FLATQUANT_DYNAMIC",
        "w4a4_hadamard": "W4A4_FLATQUANT_DYNAMIC",
        "w4a8": "W4A8_DYNAMIC",
        "w8a16": "W8A16",
        "w8a8_dynamic": "W8A8_DYNAMIC",
        "w8a8_mix": "W8A8_MIX",
        "w8a8_static": "W8A8",
    }
    assert "target `ascend` cannot store" in cells["nvfp4", "ascend"]["why"]
    # an option that the recipe must set is named; one that the scheme leaves to the target is not
    assert cells["w4a8", "ascend"]["options"] == {"group_size": "channel"}
    assert cells["w4a16", "ascend"]["options"] == {}
    chosen = cells["mxfp4_fp8", "compressed-tensors"]
    assert (chosen["label"], chosen["options"]) == ("mxfp4 fp8 inputs in groups", {})
    assert cells["fp8_dynamic", "ascend"]["tensors"]["weight"] == {
        "dtype": "F8_E4M3",
        "shape": (256, 256),
    }
    assert cells["w8a8_static", "ascend"]["tensors"] == {
        "weight": {"dtype": "I8", "shape": (256, 256)},
        "input_scale": {"dtype": "F32", "shape": (1,)},
        "input_offset": {"dtype": "F32", "shape": (1,)},
        "quant_bias": {"dtype": "I32", "shape": (256,)},
        "deq_scale": {"dtype": "F32", "shape": (256,)},
    }
