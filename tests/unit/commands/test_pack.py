"""The options of `pack`: values of a target's own, and targets that there are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantcli.commands.pack import plan_pack
from quantcli.core.errors import InputError
from tests.fuzz import folders


@pytest.mark.parametrize(
    ("target", "option", "what", "fix"),
    [
        ("ascent", "device=310P", "no target `ascent`", "did you mean `ascend`?"),
        ("ascend", "device", "`device` is not of the form KEY=VALUE", "KEY is an option of the target"),
        ("ascend", "devise=310P", "unknown key `devise`", "its options: device, tp"),
        ("ascend", "device=5", "`device`: input should be", "its options: device, tp"),
        ("fp8", "device=310P", "unknown key `device`", "target `fp8` has no options"),
        ("ascend", "device=[", "the text is not valid YAML", None),
    ],
)
def test_options_of_targets(
    tmp_path: Path, target: str, option: str, what: str, fix: str | None
) -> None:
    folders.make(tmp_path / "model", "int8")
    with pytest.raises(InputError) as caught:
        plan_pack(str(tmp_path / "model"), target, tmp_path / "out", overrides=(option,))
    assert caught.value.what.startswith(what)
    assert str(caught.value.where).startswith("--")
    if fix is not None:
        assert caught.value.fix == fix
