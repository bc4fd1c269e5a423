"""Functions in another process, within limits: every end that such a function can have."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from quantcli.core.errors import AccessError, InputError, MachineError
from quantcli.core.untrusted import bounded
from quantcli.core.untrusted.bounded import Subject, run_bounded
from quantcli.core.untrusted.server import Limits
from tests import bounded_work as work

ROOT = Path(__file__).parents[3]
LIMITS = Limits(seconds=60, wall=600.0, memory=2**28, answer=2**16)
SUBJECT = Subject("the thing", "reading the thing", "a file")


def run(function, *arguments, limits=LIMITS):
    return run_bounded(function, arguments, work.warm, limits, SUBJECT)


def limits(**changed):
    return Limits(**{**vars(LIMITS), **changed})


def test_the_answer_comes_back_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, blob = run(work.double, [1, 2**40], b"\0\xff")
    assert value == {"doubled": [2, 2**41], "folder": str(tmp_path)}
    assert blob == b"\0\xff\0\xff"


def test_errors_come_back_as_they_are():
    with pytest.raises(AccessError) as caught:
        run(work.refuse)
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("no", "here", "ask")
    with pytest.raises(RuntimeError, match="KeyError: 'a bug of ours'"):
        run(work.fail)


@pytest.mark.parametrize(
    ("function", "arguments", "limits", "what"),
    [
        (work.spin, ("x",), limits(seconds=1), "takes more than 1 s of CPU time"),
        (work.sleep, (), limits(wall=0.1), "takes more than 0 s"),
        (work.take, (2**30,), LIMITS, "takes more than 268.4 MB of memory"),
        (work.say_memory_and_abort, (), LIMITS, "takes more than 268.4 MB of memory"),
        (work.tell, (2**20,), LIMITS, "gives more than 65.5 kB"),
        (work.end_by, (signal.SIGSEGV,), LIMITS, "crashes the library that does it"),
        (work.panic, (), LIMITS, r"crashes the library that does it: over\x1b[2J"),
    ],
    ids=["time", "wall", "memory", "allocation", "answer", "crash", "panic"],
)
def test_a_limit_is_an_input_error_and_the_next_request_is_answered(function, arguments, limits, what):
    with pytest.raises(InputError) as caught:
        run(function, *arguments, limits=limits)
    assert caught.value.what.startswith(f"reading the thing {what}")
    assert caught.value.where == ("x" if function is work.spin else "a file")
    assert "the thing" in caught.value.fix
    assert run(work.double, [4], b"")[0]["doubled"] == [8]


def test_a_kill_that_no_limit_sends_is_the_machines_lack_of_memory():
    with pytest.raises(
        MachineError, match=r"memory ran out: reading the thing may take up to 268\.4 MB"
    ):
        run(work.end_by, signal.SIGKILL)


def test_a_process_that_has_ended_is_started_again():
    run(work.double, [], b"")
    process, _ = bounded._server(work.warm)._running
    process.kill()
    process.wait()
    with pytest.raises(MachineError, match="cannot run: it ended with -9"):
        run(work.double, [1], b"")
    assert run(work.double, [1], b"")[0]["doubled"] == [2]
    process, _ = bounded._server(work.warm)._running
    process.terminate()  # stands for the end of an idle process: nobody asked
    process.wait()
    process.returncode = 0
    assert run(work.double, [3], b"")[0]["doubled"] == [6]


def test_an_interrupt_ends_the_work(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(work.interrupt, os.getpid())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert bounded._server(work.warm)._running is None


SCRIPT = """
    import os, resource, sys
    from quantcli.core.errors import MachineError
    from quantcli.core.untrusted.bounded import Subject, run_bounded
    from quantcli.core.untrusted.server import Limits
    sys.path.append({root!r})  # which the other process has, too
    from tests import bounded_work as work
    def run(function, *arguments):
        limits = Limits(seconds=60, wall=600.0, memory=2**40, answer=99)
        return run_bounded(function, arguments, work.warm, limits, Subject("it", "reading it", "x"))
    print(run(work.double, [1], b"")[0]["doubled"], flush=True)
    if os.fork() == 0:
        print(run(work.double, [2], b"")[0]["doubled"], flush=True)
        sys.exit()
    os.wait()
    resource.setrlimit(resource.RLIMIT_AS, (2**29, resource.RLIM_INFINITY))
    from quantcli.core.untrusted import bounded
    bounded.end_all()
    try:
        run(work.take, 2**30)
    except MachineError as error:
        print(error.what, flush=True)
    run(work.write_and_sleep, sys.argv[1])
"""


def test_a_script_without_a_guard_and_its_death(tmp_path):
    """Its main module does not run again, a fork of it is answered, a lower limit of the machine is an
    error of the machine, and nothing is left when it is killed."""
    script, noted = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(textwrap.dedent(SCRIPT).format(root=str(ROOT)))
    with subprocess.Popen(
        [sys.executable, str(script), str(noted)], stdout=subprocess.PIPE, text=True
    ) as process:
        while not (noted.is_file() and noted.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        lines = process.stdout.read().splitlines()
    assert lines[:2] == ["[2]", "[4]"]
    assert lines[2].startswith("memory ran out: reading it may take up to")
    for pid in noted.read_text().split():
        while _lives(int(pid)):
            time.sleep(0.02)


def _lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
