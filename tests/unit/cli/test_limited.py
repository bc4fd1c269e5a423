"""A command under `ulimit -v`: whatever ends it is reported."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quantcli.__main__ import _Signals

GB = 10**9
MODEL = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
# the child does as the first word says; `entry` and `main` need nothing else of a command
STUB = """
import os, signal, sys, time
from quantcli import __main__
class Stub:
    @staticmethod
    def run(argv, signals):
        if argv[0] == "abort":
            os.abort()
        if argv[0] == "leave":
            os._exit(1)
        if argv[0] == "memory":
            raise MemoryError
        if argv[0] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if argv[0] == "wait":
            signals.command_runs = True
            print(os.getpid(), flush=True)
            time.sleep(30)
        return int(argv[0])
sys.modules["quantcli.cli.process"] = Stub
__main__.entry()
"""


def limited(nbytes: int = GB) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return limit


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STUB, *words]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limited(), check=False)


@pytest.mark.parametrize(
    ("word", "how"), [("abort", "SIGABRT"), ("leave", "exit code 1"), ("memory", "exit code 3")]
)
def test_a_process_that_a_library_ends(word: str, how: str) -> None:
    done = run(word, "--json")
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith(
        f"error: a library has ended the process ({how}), most likely for want"
    )
    assert "the limit of address space (ulimit -v) is 1.0 GB; torch alone maps " in done.stderr
    document = json.loads(done.stdout)
    assert document["exit_code"] == 3
    assert document["error"]["fix"].startswith("raise the limit (ulimit -v): ")


@pytest.mark.parametrize("code", [0, 1, 70])
def test_a_process_that_ends_by_itself(code: int) -> None:
    done = run(f"{code}")
    assert (done.returncode, done.stderr) == (code, "")


def test_a_process_that_is_killed() -> None:
    assert run("killed").returncode == -signal.SIGKILL


def test_an_import_that_gets_no_memory(tmp_path: Path) -> None:
    """torch's libraries alone are larger than this limit."""
    words = ["quantize", "w8a8_dynamic", "--model", MODEL, "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "quantcli", *words],
        capture_output=True,
        text=True,
        preexec_fn=limited(150 * 10**6),
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "fix: raise the limit (ulimit -v)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_signals_reach_the_child() -> None:
    command = [sys.executable, "-c", STUB, "wait"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, preexec_fn=limited()
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) != process.pid
        process.send_signal(signal.SIGHUP)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("error: interrupted\n")


def child_code(work: Callable[[_Signals], None]) -> int:
    """The exit code of a fork that has the handlers of `quantcli quantize`."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work(_Signals(["quantize"]))
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
@pytest.mark.parametrize(("code", "expected"), [(None, 130), (0, 0), (3, 3)])
def test_a_signal_after_the_end_changes_no_code(
    number: signal.Signals, code: int | None, expected: int
) -> None:
    def work(signals: _Signals) -> None:
        signals.code = code
        os.kill(os.getpid(), number)

    assert child_code(work) == expected
