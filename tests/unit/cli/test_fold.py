"""Lines that fit: what is folded, what is cut, and what can be copied."""

from __future__ import annotations

import io
import os
import pty
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantcli.cli.terminal.fold import Table, Width, cells_of, cut, fold, width_of

WORDS = st.lists(st.text("abc./`'-…量\u0301", min_size=1, max_size=90), min_size=1, max_size=12)
WIDTHS = st.integers(20, 120)


@given(WORDS, WIDTHS, st.sampled_from(["", "  ", "weights      ", "  --> ", "x" * 60 + ": "]))
def test_no_line_is_too_wide_and_no_word_is_lost(words: list[str], cells: int, lead: str) -> None:
    text = lead + " ".join(words)
    lines = fold(text, Width(cells)).split("\n")
    assert max(map(cells_of, lines)) <= cells
    assert "".join("".join(lines).split()).replace("\\", "") == "".join(text.split())


@given(st.lists(st.text("ab/-_ '\"$", min_size=1, max_size=70), min_size=1, max_size=8), WIDTHS)
def test_a_command_pastes(words: list[str], cells: int) -> None:
    """What a shell reads is the same command."""
    command = shlex.join(["quantcli", *words])
    folded = fold("  " + command, Width(cells), command=True)
    assert shlex.split(folded.replace("\\\n", "")) == ["quantcli", *words]
    labelled = fold("next: " + command, Width(cells), command=True).removeprefix("next: ")
    assert shlex.split(labelled.replace("\\\n", "")) == ["quantcli", *words]
    assert max(map(cells_of, folded.split("\n"))) <= cells


@given(st.lists(st.lists(st.text("ab 量.", max_size=50), min_size=4, max_size=4), max_size=4), WIDTHS)
def test_no_table_is_too_wide(rows: list[list[str]], cells: int) -> None:
    table = Table(["", "module", "type of it", "size"], rows, {"size"}, {"type of it"})
    lines = [line for row in table.lines(Width(cells)) for line in row]
    assert max(map(cells_of, lines), default=0) <= cells


def test_what_follows_is_indented() -> None:
    assert fold("weights      1 GB -> 2 GB in 3 shards", Width(26)).split("\n") == [
        "weights      1 GB -> 2 GB",
        "  in 3 shards",
    ]
    assert fold("note         aa bb cc dd ee ff gg hh", Width(39)).split("\n") == [
        "note         aa bb cc dd ee ff gg hh"
    ]
    assert fold("note         aa bb cc dd ee ff gg hh ii", Width(38)).split("\n") == [
        "note         aa bb cc dd ee ff gg hh",
        "  ii",
    ]
    assert fold("note         aa bb cc dd ee ff gg hh ii jj kk", Width(39))[39:] == (
        "\n             jj kk"
    )


def test_a_path_is_not_changed_if_the_terminal_folds() -> None:
    path = "/models/" + "a" * 80
    assert fold(f"  --> {path}", Width(60, folds=True)) == f"  --> {path}"
    broken = fold(f"  --> {path}", Width(60)).split("\n")
    assert [cells_of(line) for line in broken] == [60, 34]


def test_a_quoted_command_can_be_pasted() -> None:
    text = "  fix: run `quantcli calibrate recipe.yaml --out folder` once"
    assert fold(text, Width(40)).split("\n") == [
        "  fix: run `quantcli calibrate \\",
        "       recipe.yaml --out folder` once",
    ]


def test_both_ends_of_a_name_stay() -> None:
    assert cut("model.layers.12.mlp.down_proj", 20) == "model.lay….down_proj"
    assert cut("量量量量量量", 7) == "量…量量"
    assert cut("short", 20) == "short"


ROWS = [["model.layers.12.self_attn.q_proj", "8-bit weights and inputs", "1.2 GB"]]


@pytest.mark.parametrize(
    ("cells", "lines"),
    [
        (None, ["name                              what                        size",
                "model.layers.12.self_attn.q_proj  8-bit weights and inputs  1.2 GB"]),
        (50, ["name                          what            size",
              "model.layers.…lf_attn.q_proj  8-bit         1.2 GB",
              "                              weights and", "                              inputs"]),
        (40, ["model.layers.12.self_attn.q_proj", "  what 8-bit weights and inputs; size",
              "  1.2 GB"]),
    ],
)  # fmt: skip
def test_a_table(cells: int | None, lines: list[str]) -> None:
    table = Table(["name", "what", "size"], ROWS, {"size"})
    shown = table.lines(cells and Width(cells))
    assert [line for row in shown for line in row] == lines


@pytest.mark.parametrize(
    ("columns", "cells"),
    [("60", 60), ("1", 20), ("20", 20), ("9" * 5000, None), ("0", None), ("-5", None), ("x", None),
     ("", None), ("²", None), (" 70 ", 70)],
)  # fmt: skip
def test_columns(monkeypatch: pytest.MonkeyPatch, columns: str, cells: int | None) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert width_of(io.StringIO()) == (cells and Width(cells))


def test_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl
    import struct
    import termios

    outer, inner = pty.openpty()
    with os.fdopen(inner, "w") as stream:
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 72, 0, 0))
        assert width_of(stream) == Width(72, folds=True)
        monkeypatch.setenv("COLUMNS", "60")
        assert width_of(stream) == Width(60)
    os.close(outer)
