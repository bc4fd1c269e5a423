"""Places of checkpoints as they are named."""

from pathlib import Path

import pytest

from quantcli.commands.release.planning import overlap
from quantcli.convert.destination import destination_of


def test_a_home_is_a_home() -> None:
    """A YAML file has no shell that would put it in."""
    assert destination_of("~/release/w8a16").folder == Path.home() / "release/w8a16"
    assert str(destination_of("~nobody-has-this-name/x")) == "~nobody-has-this-name/x"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("hf://org/name", "hf://org/name@main", True),
        ("hf://org/name@dev", "hf://org/name", False),
        ("hf://org/name", "hf://org/name2", False),
        ("s3://bucket/a", "s3://bucket/a/b", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("out/a", "out/a.partial/b", True),
        ("out/a", "out/a.partially", False),
    ],
)
def test_places_that_overlap(one: str, other: str, same: bool) -> None:
    first, second = destination_of(one), destination_of(other)
    assert overlap(first, second) is overlap(second, first) is same
