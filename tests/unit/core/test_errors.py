"""Errors: codes, and the words for them."""

import pytest

from quantcli.core.errors import AnswerNo, Exit, InputError, MachineError, QuantError, closest, one_of


@pytest.mark.parametrize(
    ("error", "code"), [(AnswerNo, 1), (InputError, 2), (MachineError, 3), (QuantError, 2)]
)
def test_exit_codes_are_documented(error, code):
    assert error("what").exit_code == code
    assert issubclass(error, QuantError)


def test_exit_names():
    assert {exit_.name: exit_.value for exit_ in Exit} == {
        "DONE": 0,
        "ANSWER_NO": 1,
        "FIX_INPUT": 2,
        "FIX_MACHINE": 3,
        "OUR_BUG": 70,
        "INTERRUPTED": 130,
    }


def test_message_has_what_where_and_fix():
    assert str(InputError("it broke")) == "it broke"
    assert str(InputError("it broke", where="here")) == "it broke\n  --> here"
    assert str(InputError("it broke", fix="mend it")) == "it broke\n  fix: mend it"
    full = InputError("it broke", where="a.yaml:3", fix="mend it")
    assert str(full) == "it broke\n  --> a.yaml:3\n  fix: mend it"
    assert (full.what, full.where, full.fix) == ("it broke", "a.yaml:3", "mend it")


def test_closest_comes_first():
    known = ["w8a8_dynamic", "w8a16", "fp8_dynamic", "keep"]
    assert closest("w8a8_dynamik", known) == "`w8a8_dynamic`, `fp8_dynamic`"
    assert closest("w8a61", known).startswith("`w8a16`")
    assert closest("zzz", known) == ""
    assert closest("w8a16", known, limit=1) == "`w8a16`"


def test_one_of_falls_back_to_all_in_order():
    assert one_of("kep", ["w8a16", "keep"]) == "did you mean `keep`?"
    assert one_of("zzz", ["w8a16", "keep"]) == "known: `keep`, `w8a16`"
    many = one_of("zzz", [f"module.{n:04}" for n in range(2000)])
    assert many.endswith("`module.0039`, and 1,960 more")
    assert one_of("kep", {"keep": 1}) == "did you mean `keep`?"
