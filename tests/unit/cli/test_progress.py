"""Progress as people see it: the line of a terminal, lines of a log, the file of --log-file."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from quantcli.cli.output import Output
from quantcli.cli.progress import Bar, fitted, watch
from quantcli.cli.terminal.log import Log
from quantcli.core import events
from quantcli.core.errors import InputError
from quantcli.core.events import Event, Events

STEP = Event("step", "layer 3/36 · learning", 12, 40, "step", 0.0312, 1234, 12, 151)


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(events.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_the_line_drops_what_matters_least() -> None:
    whole = "layer 3/36 · learning · step 12/40 · loss 0.0312 · 1.2k tok/s · elapsed 0:12 · ETA 2:31"
    assert str(STEP) == whole
    assert fitted(STEP, 120).plain == "━" * 20 + " " + whole
    assert fitted(STEP, len(whole) + 1).plain == whole
    assert fitted(STEP, 60).plain == "layer 3/36 · learning · step 12/40 · loss 0.0312 · ETA 2:31"
    assert fitted(STEP, 46).plain == "layer 3/36 · learning · step 12/40 · ETA 2:31"


@pytest.mark.parametrize("width", [1, 2, 5, 20, 59, 60, 80, 200])
def test_the_line_fits(width: int) -> None:
    wide = Event("bytes", "層" * 100, 10**9, 35 * 10**9, rate=4e8, eta=75)
    for event in (STEP, wide, Event("phase", "reading \x1b[2J text " * 9)):
        line = fitted(event, width)
        assert line.cell_len < max(width, 2)
        assert "\x1b" not in line.plain


def test_bytes_have_a_rate_and_the_time_that_is_left(clock: Clock) -> None:
    lines: list[Event] = []
    run = Events(lines.append)
    run.shard("a.safetensors", 10**9, reused=True)
    run.begin(35 * 10**9, 6)
    for _ in range(7):  # a line at most every half minute, and then at once
        clock.now += 10
        run.advance(10**9)
    assert [str(line) for line in lines] == [
        "shard kept: a.safetensors 1.0 GB (from an earlier run)",
        "3.0 of 35.0 GB · 100.0 MB/s · ETA 5:20",
        "6.0 of 35.0 GB · 100.0 MB/s · ETA 4:50",
    ]
    run.shard("b.safetensors", 5 * 10**9, reused=False)
    assert str(lines[-1]).startswith("shard 2/7: b.safetensors 5.0 GB · 7.0 of 35.0 GB · 100.0 MB/s")
    assert (lines[-1].kind, lines[-1].done, lines[-1].eta) == ("file", 7 * 10**9, 280)


def test_layers_have_their_loss_and_the_time_that_is_left(clock: Clock) -> None:
    lines: list[Event] = []
    run = Events(lines.append, 0.0)
    run.phase("reading text")
    run.begin_layers(4, 1, 1000)
    run.begin_layer("layers.1", 1, passes=4)
    run.phase("learning", passes=2)
    clock.now += 5
    run.step(1, 2, noun="step", tokens=1000, loss=0.25)
    # a fourth of the first of three layers has taken 5 s
    assert str(lines[-1]) == (
        "layer 2/4 · learning · step 1/2 · loss 0.25 · 200 tok/s · elapsed 0:05 · ETA 0:55"
    )
    clock.now += 15
    run.layer("layers.1", 1, "loss 0.5 -> 0.25")
    assert [str(line) for line in lines if line.kind in {"phase", "layer"}] == [
        "reading text",
        "running: 4 layers, 1,000 tokens; resuming at layer 2, 1 layer done by an earlier run",
        "layer 2/4: layers.1 20.0 s, loss 0.5 -> 0.25 · 50 tok/s · elapsed 0:20 · ETA 0:40",
    ]
    run.begin_layer("layers.2", 2)
    clock.now += 5
    run.step(1, 8, tokens=125)
    assert str(lines[-1]) == "layer 3/4 · batch 1/8 · 25 tok/s · elapsed 0:25 · ETA 0:35"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Output]:
    """An output whose messages go to a terminal of 60 columns, and to a log."""
    out = Output(as_json=False)
    out.messages = Console(file=io.StringIO(), force_terminal=True, width=60, markup=False)
    out.set_up(quiet=False, verbose=False, log_file=tmp_path / "log")
    yield out
    out.close()


def test_a_terminal_shows_one_line_that_does_not_wrap(out: Output, tmp_path: Path) -> None:
    bar = Bar(out)
    run = Events(bar.receive, 0.0)
    run.also(out.log_progress, 0.0)
    run.phase("reading text " * 20)
    run.begin_layers(4, 0, 1000)
    run.detail("a reason")
    run.say("a message")
    run.step(1, 2, noun="step", tokens=10, loss=0.5)
    bar._live.refresh()
    run.layer("layers.0", 0)
    bar.stop()
    screen = out.messages.file.getvalue()  # type: ignore[attr-defined]
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen).replace("\r", "\n").split("\n")
    assert max(map(len, lines)) <= 60 or "layer 1/4: layers.0" in max(lines, key=len)
    assert "a message" in lines
    assert not any("a reason" in line for line in lines)
    assert any(line.startswith("layer 1/4 · step 1/2 · loss 0.5") for line in lines)
    logged = [line.partition("Z  ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert "a reason" in logged
    assert logged.index("a reason") < logged.index("a message")
    assert any(line.startswith("layer 1/4 · step 1/2 · loss 0.5") for line in logged)
    assert sum(line.startswith("layer 1/4: layers.0") for line in logged) == 1


def test_a_terminal_that_knows_no_control_codes_gets_lines(
    monkeypatch: pytest.MonkeyPatch, out: Output
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with watch(out) as run:
        run.phase("reading text")
        run.say("a message")
    screen = out.messages.file.getvalue()  # type: ignore[attr-defined]
    assert screen == "reading text\na message\n"


def test_the_log_has_times_and_ends_once_if_its_disk_fails(tmp_path: Path) -> None:
    failures: list[str] = []
    log = Log(tmp_path / "log", failures.append)
    log.write("one\ntwo")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}Z  ", "", line) for line in lines] == [
        "one",
        "two",
    ]

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    log.close()
    log._file = io.TextIOWrapper(Full(tmp_path / "log", "a"))
    for _ in range(2):
        log.write("three")
    log.close()
    assert failures == [
        f"the log ends here, as it cannot be written: {tmp_path / 'log'}: No space left on device"
    ]


def test_a_log_may_not_lie_in_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model" / "logs").mkdir(parents=True)
    (tmp_path / "model" / "model.safetensors").touch()
    for file in ("model/log", "model/logs/log"):
        with pytest.raises(InputError, match=r"has model\.safetensors"):
            Log(tmp_path / file, print)
        assert not (tmp_path / file).exists()
    with pytest.raises(InputError, match="is a directory"):
        Log(tmp_path, print)
