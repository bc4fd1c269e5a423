"""Expressions whose matching would not end are told from those of real recipes and checkpoints."""

import re

import pytest

from quantcli.core.expressions import too_costly


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+$", "((a+))+$", "(?:a|a)*$", "(a?){30}a{30}", "(a*){20}b", "(?:(?:a|b)c?)+x", "(a+){1,}b",
        "(a+){,}b", "(?P<n>a*)*b", "(a+)(?#c)+b", "(?x)(a+) +b", ".*.*.*.*.*x", r"\S+\S+\S+\S+\S+x",
        "(ab)+(ab)+(ab)+(ab)+(ab)+x", "[^b]*[^b]*[^b]*[^b]*[^b]*b", r"\d+" * 13, "(?=(a+)+b)a",
        "([)]+)+x", r"(\)+)+x", ".{0,900}" * 5,
    ],
)  # fmt: skip
def test_costly(expression: str) -> None:
    re.compile(expression)
    assert too_costly(expression)


@pytest.mark.parametrize(
    "expression",
    [
        r"(.*\.experts)\.\d+\.(?:gate|up)_proj",
        r"(?:.*\.)?model\.layers\.[0-9]+\.mlp\.down_proj$",
        r".*experts\.\d+\.w[123]", r".*\.(?:0|1|2)\.self_attn\.[qkv]_proj$", "(a)(b)(c)?", "(?:ab){3}",
        r"[(+*]+\{2\}x{2}", "a{2,3}|b{}", r"(?:model\.){0,1}.*", r"model\.(\w+)\.(\d+)\.(.*)_proj",
        "[]|]+",
    ],
)  # fmt: skip
def test_cheap(expression: str) -> None:
    re.compile(expression)
    assert not too_costly(expression)
