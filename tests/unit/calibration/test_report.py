"""The report of a layer as JSON-able data."""

from quantcli.calibration.methods.learning import LearningReport
from quantcli.calibration.report import LayerReport, ModuleReport


def test_a_module_without_numbers_has_its_tokens_alone():
    assert ModuleReport(7, {}).document() == {"tokens": 7}


def test_numbers_and_the_reason_stand_next_to_the_tokens():
    report = ModuleReport(7, {"input_scale": 0.5}, {"rounded_to_nearest": "no token reached it"})
    assert report.document() == {
        "tokens": 7,
        "input_scale": 0.5,
        "rounded_to_nearest": "no token reached it",
    }


def test_results_of_methods_stand_next_to_the_modules():
    report = LayerReport("model.layers.0", {"a": ModuleReport(1, {})})
    assert report.document() == {
        "layer": "model.layers.0",
        "modules": {"a": {"tokens": 1}},
        "experts": {},
        "edits": {},
        "uncalibrated": [],
    }
    report.results["learned"] = LearningReport(["a"], 0.5, 0.25, 1.5, "what was learned", 0.3)
    assert report.document()["learned"] == {
        "modules": ["a"],
        "loss_before": 0.5,
        "loss_after": 0.25,
        "condition": 1.5,
        "kept": "what was learned",
        "loss_served": 0.3,
    }
