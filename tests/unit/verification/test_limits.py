"""Limits of the user, and limits that came with a checkpoint."""

import math

import pytest

from quantcli.core.errors import InputError
from quantcli.verification.limits import Limits, given_limits, own_limits
from quantcli.verification.options import VerifyOptions

RECIPE = "target: ascend\nrules: [{match: '*', scheme: w8a16}]\n"


@pytest.mark.parametrize(
    ("given", "own", "least", "most"),
    [
        ({}, {}, 20, 1.05),
        ({}, {"min_sqnr": 30, "max_ppl_ratio": 1.01}, 30, 1.01),
        ({}, {"min_sqnr": 10, "max_ppl_ratio": 2}, 20, 1.05),
        ({}, {"min_sqnr": -math.inf, "max_ppl_ratio": math.inf}, 20, 1.05),
        ({"min_sqnr": 5, "max_ppl_ratio": 3}, {"min_sqnr": 30, "max_ppl_ratio": 1.01}, 5, 3),
    ],
)
def test_a_checkpoint_tightens_and_the_user_decides(given, own, least, most):
    limits = Limits(given, own)
    assert limits.least("min_sqnr", 20) == least
    assert limits.most("max_ppl_ratio", 1.05) == most


def test_the_hint_names_a_limit_that_did_not_count():
    limits = Limits({}, {"min_sqnr": 10.0})
    hint = limits.hint("min_sqnr", lambda limit: limit <= 15)
    assert hint == (
        "; the checkpoint's own `min_sqnr` is 10, looser than the default, and does not count: "
        "your own recipe may loosen the limit, with --recipe FILE"
    )
    assert limits.hint("min_sqnr", lambda limit: limit <= 5) == ""
    assert limits.hint("max_kl", lambda limit: True) == ""
    assert Limits({"min_sqnr": 30.0}, limits.own).hint("min_sqnr", lambda limit: True) == ""


def test_limits_of_the_report_are_finite_and_count():
    own = {"min_sqnr": 2.0, "max_ppl_ratio": math.inf, "max_kl": 0.01}
    assert Limits({}, own).to_report(6.0).model_dump() == {
        "min_sqnr": None, "max_ppl_ratio": None, "max_kl": 0.01,
    }  # fmt: skip
    assert Limits({}, {"min_sqnr": 10.0}).to_report(6.0).min_sqnr == 10
    assert Limits({"min_sqnr": 2.0}, own).to_report(6.0).min_sqnr == 2


@pytest.mark.parametrize("name", ["quantcli_recipe.yaml", "quantcli_source_recipe.yaml"])
def test_limits_in_a_checkpoint(tmp_path, name):
    (tmp_path / name).write_text("verify: {min_sqnr: 25, max_kl: 0.5}\n")
    assert own_limits(tmp_path) == ({"min_sqnr": 25.0, "max_kl": 0.5}, [])


@pytest.mark.parametrize(
    ("text", "limits", "notes"),
    [
        ("verify: {min_sqnr: -.inf}", {"min_sqnr": -math.inf},
         ["`verify.min_sqnr` is -inf, not a limit: it does not count"]),
        ("verify: {max_kl: .inf}", {"max_kl": math.inf},
         ["`verify.max_kl` is inf, not a limit: it does not count"]),
        ("verify: {min_sqnr: .inf}", {}, ["`verify.min_sqnr` is inf, not a limit: it does not count"]),
        ("verify: {min_sqnr: .nan}", {}, ["`verify.min_sqnr` is nan, not a limit: it does not count"]),
        ("verify: {min_sqnr: true}", {}, ["`verify.min_sqnr` is True, not a limit: it does not count"]),
        ("verify: {max_kl: 'x'}", {}, ["`verify.max_kl` is 'x', not a limit: it does not count"]),
        ("verify: {new: 3}", {}, ["`verify.new` is 3, not a limit: it does not count"]),
        (f"verify: {{min_sqnr: {10**400}}}", {},
         [f"`verify.min_sqnr` is {10**39}, not a limit: it does not count"]),
        ("verify: 3", {}, ["`verify` is not a mapping: limits in it do not count"]),
        ("verify: null", {}, []),
        ("rules: []", {}, []),
        ("a: &b [*b]", {}, ["YAML alias `*b` is not allowed: limits in it do not count"]),
        ("", {}, ["the recipe is empty: limits in it do not count"]),
    ],
)  # fmt: skip
def test_a_recipe_in_a_checkpoint_is_hostile(tmp_path, text, limits, notes):
    (tmp_path / "quantcli_recipe.yaml").write_text(text)
    own, findings = own_limits(tmp_path)
    assert own == limits
    assert [finding.what for finding in findings] == notes
    assert {(f.check, f.severity) for f in findings} <= {("files", "note")}


def test_a_checkpoint_without_a_recipe(tmp_path):
    assert own_limits(tmp_path) == ({}, [])


def test_the_command_line_wins_over_the_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE + "verify: {min_sqnr: 5, max_kl: 3}\n")
    options = VerifyOptions("out", against="m", recipe=str(file), min_sqnr=40.0)
    assert given_limits(options) == {"min_sqnr": 40.0, "max_kl": 3}
    assert given_limits(VerifyOptions("out")) == {}


@pytest.mark.parametrize("block", ["", "verify: {}\n", "verify: null\n"])
def test_a_recipe_that_sets_no_limit(tmp_path, block):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE + block)
    with pytest.raises(InputError, match="the recipe sets no limit") as caught:
        given_limits(VerifyOptions("out", against="m", recipe=str(file)))
    assert caught.value.where == f"--recipe {file}"


def test_a_recipe_of_limits_that_are_none(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE + "verify: {min_sqnr: -.inf}\n")
    with pytest.raises(InputError, match=r"`verify.min_sqnr`: expected a finite number") as caught:
        given_limits(VerifyOptions("out", against="m", recipe=str(file)))
    assert caught.value.where == f"{file}:3"
