"""`quantcli.verify` as Python callers use it, and the command line's view of its options."""

import inspect
import json
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import fields
from pathlib import Path

import pytest

import quantcli
from quantcli.cli.verify import verify as command
from quantcli.core.errors import InputError
from quantcli.verification.options import VerifyOptions
from tests.families import make_family

RECIPE = Path(__file__).parents[3] / "recipes" / "w8a8_dynamic.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    model = make_family(folder / "model", "llama")
    quantcli.quantize(RECIPE, model=model, out=folder / "out")
    return folder / "out", model


def test_options_by_keyword(made, tmp_path):
    out, model = made
    junit = str(tmp_path / "junit.xml")
    report = quantcli.verify(out, full=True, against=model, tp="1,2", junit=junit)
    assert report.depths == ["structure", "full", "against"]
    assert report.against == str(model)
    assert len(report.modules) == 14
    suites = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [suite.get("name") for suite in suites] == report.depths


def test_the_document(made):
    report = quantcli.verify(made[0], against=made[1], min_sqnr=99.0).to_dict()
    assert [*report] == [
        "ok", "checkpoint", "format", "against", "tool", "made_by", "depths", "limits", "checks",
        "findings", "modules", "sizes", "tensors", "run", "compared", "not_checked",
        "serve", "baseline", "card_written",
    ]  # fmt: skip
    assert report["limits"] == {"min_sqnr": 99.0, "max_ppl_ratio": None, "max_kl": None}
    assert report["tensors"]["quantized"] == 14
    assert report["run"] is None
    assert report["made_by"]["recipe"] == (made[0] / "quantcli_recipe.yaml").read_text()
    assert [(size["label"], size["modules"]) for size in report["sizes"]] == [
        ("W8A8_DYNAMIC", 14),
        ("FLOAT", report["tensors"]["equal"]),
    ]
    module = report["modules"][0]
    assert [*module] == [
        "module", "label", "shape", "sqnr_db", "cosine", "max_rel_error", "worst_rows",
        "outlier_channels", "histogram", "limit_db", "edited", "codes_differ", "scale_ratio", "ok",
    ]  # fmt: skip
    assert (module["limit_db"], module["ok"], report["ok"]) == (99.0, False, False)
    assert [*module["worst_rows"][0]] == ["row", "sqnr_db"]
    assert {name: len(values) for name, values in module["histogram"].items()} == {
        "edges": 33,
        "counts": 32,
    }


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"run": True}, "--run compares two models"),
        ({"run": True, "against": "m"}, "--run needs text"),
        ({"max_kl": 0.1}, "--max-kl has no effect without --run"),
        ({"min_sqnr": 30.0}, "--min-sqnr has no effect without --against MODEL"),
        ({"min_sqnr": float("nan"), "against": "m"}, "nan is not a limit"),
        ({"tp": "1,0"}, "tensor parallel sizes are whole numbers"),
        ({"task_docs": 3}, "--task-docs has no effect without --tasks"),
        (
            {
                "run": True,
                "against": "m",
                "data": ["t"],
                "others": ["o"],
                "not_worse": True,
                "samples": 5,
            },
            "--not-worse needs 6 windows of each text: fewer decide nothing",
        ),
    ],
)
def test_options_without_a_meaning(options, what):
    with pytest.raises(InputError) as error:
        VerifyOptions(Path("out"), **options)
    assert error.value.what == what or error.value.what.startswith(f"{what},")


def test_several_checkpoints(made, tmp_path):
    out, model = made
    (tmp_path / "copy").symlink_to(out)
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    (broken / "tokenizer.model").write_text("added")
    files = {name: tmp_path / name for name in ("junit", "report")}
    result = quantcli.verify([out, broken], against=model, **files)
    assert [each.ok for each in result.checkpoints] == [True, False]
    assert not result.ok
    assert result.to_dict()["checkpoints"][1]["findings"][0]["severity"] == "error"
    suites = ElementTree.parse(files["junit"]).getroot()
    assert [suite.get("name") for suite in suites] == [str(out), str(broken)]
    errors = sum(f["severity"] == "error" for f in result.checkpoints[1].findings)
    assert suites.get("failures") == str(errors)
    assert f"FAILED, {errors} error" in files["report"].read_text()
    for wrong in ([out], [out, tmp_path / "copy"], [out, 3], []):
        with pytest.raises(InputError):
            quantcli.verify(wrong)


def test_a_report_of_before(made, tmp_path):
    out, model = made
    old = tmp_path / "old.json"
    report = quantcli.verify(out, against=model).to_dict()
    report["modules"][3]["sqnr_db"] += 2
    old.write_text(json.dumps(report))
    change = quantcli.verify(out, against=model, baseline=old).baseline
    assert change["modules"][0]["module"] == report["modules"][3]["module"]
    assert change["modules"][0]["change_db"] == -2.0
    assert {figure["better"] for figure in change["figures"]} <= {None, False}
    with pytest.raises(InputError, match="is not a report"):
        quantcli.verify(out, baseline=out / "config.json")


def test_an_option_that_there_is_not():
    with pytest.raises(TypeError, match="depth"):
        quantcli.verify(Path("out"), depth=3)


def test_each_size_once():
    assert VerifyOptions(Path("out"), tp="4, 1,4").tp_sizes == (4, 1)


def test_the_command_line_offers_each_option():
    parameters = inspect.signature(command).parameters
    options = [field.name for field in fields(VerifyOptions)]
    assert [*parameters][: len(options)] == options
    assert parameters["samples"].default.default == VerifyOptions.samples == 32
    assert parameters["full"].default.param_decls == ("--full",)
