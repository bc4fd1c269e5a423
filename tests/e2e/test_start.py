"""The start of the process: its imports, its first line, and interrupts at any moment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantcli.cli.output import Output
from quantcli.core.errors import Interrupted
from tests.e2e.conftest import RECIPE, make_llama, run_cli, snapshot
from tests.web_server import served

RESUMES = "the same command again continues where it stopped"
FIRST = ("quantize", "calibrate", "pack", "verify")

# ends the process, or interrupts it, when a module is about to be imported
AT_IMPORT = """
import os, signal, sys
module, action = sys.argv[1:3]
del sys.argv[1:3]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            if action == "leave":
                os.write(2, b"IMPORTED\\n")
                os._exit(9)
            os.kill(os.getpid(), getattr(signal, action))
sys.meta_path.insert(0, Finder())
from quantcli.__main__ import entry
entry()
"""
# interrupts the process at the nth call of a Python function after the handler is there
AT_CALL = """
import os, signal, sys
left = int(sys.argv.pop(1))
def watch(frame, event, argument):
    global left
    if event == "call" and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        left -= 1
        if left == 0:
            sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGTERM)
from quantcli.__main__ import entry
sys.setprofile(watch)
entry()
"""
# runs command lines one after the other: the exit code, stderr, and whether torch is there
IN_ORDER = """
import contextlib, io, json, sys
from quantcli.__main__ import main
results = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    results.append([words, code, err.getvalue(), "torch" in sys.modules])
print(json.dumps(results))
"""


def python(script: str, *words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a recipe, a recipe with an unknown key, one that is not YAML, and a converted model."""
    folder = tmp_path_factory.mktemp("start")
    make_llama(folder / "model")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "key.yaml").write_text(RECIPE.replace("rules", "rulez"))
    (folder / "bad.yaml").write_text("target: ascend\nrules: [")
    (folder / "empty").mkdir()
    done = run_cli(
        "quantize", folder / "recipe.yaml", "--model", folder / "model", "--out", folder / "q"
    )
    assert done.code == 0, done.err
    return folder


def usual(place: Path) -> list[object]:
    """A command that would convert the model."""
    return ["quantize", place / "recipe.yaml", "--model", place / "model", "--out", place / "out"]


# imports


def test_what_needs_no_plan_imports_no_torch(place: Path) -> None:
    recipe, model, gone = place / "recipe.yaml", place / "model", place / "gone"
    right = ["quantize", recipe, "--model", model]
    pack = ["--target", "fp8", "--out", place / "out"]
    accepted: list[list[object]] = [
        *([name, "--help"] for name in (*FIRST, "inspect", "recipes")),
        ["--help"], ["--version"], ["recipes"], ["recipes", "show", "w8a8_dynamic", "--json"],
        ["inspect", model], ["inspect", model, "--json"], ["inspect", model, "--tensors", "*norm*"],
    ]  # fmt: skip
    refused: list[list[object]] = [
        ["quantise"], ["quantize"], ["quantize", "--nope"], [*right, "--workers", "x"],
        ["quantize", "nope", "--model", model], ["quantize", place / "bad.yaml", "--model", model],
        ["quantize", place / "key.yaml", "--model", model], ["quantize", recipe],
        [*right, "--set", "rulez=1"], [*right, "--set", "rules.0.match=re:("],
        ["quantize", recipe, "--model", gone], ["quantize", recipe, "--model", place / "empty"],
        [*right, "--out", place / "q"], [*right, "--out", model / "x"], [*right, "--part", "3/2"],
        [*right, "--device", "tpu"], [*right, "--max-memory", "x"],
        ["calibrate", "w8a8_static", "--model", gone],
        ["calibrate", "w8a8_static", "--model", model, "--out", model / "x"],
        ["verify", gone], ["verify", place / "empty"], ["verify", place / "q", "--against", gone],
        ["verify", place / "q", "--tp", "x"], ["verify", place / "q", "--run"],
        ["verify", place / "q", "--junit", gone / "x"],
        ["verify", place / "q", "--against", model, "--recipe", "nope"],
        ["pack"], ["pack", gone, *pack], ["pack", place / "q", *pack, "--set", "x"],
        ["pack", place / "q", "--target", "fp8", "--out", place / "empty"],
        ["pack", "--merge", gone, "--out", place / "out"],
        ["pack", "--merge", place / "q", "--out", place / "out"],
        ["inspect", gone], ["inspect", "--support", gone], ["inspect", gone, "--outliers"],
    ]  # fmt: skip
    lines = [[str(word) for word in line] for line in (*accepted, *refused)]
    wide = {**os.environ, "COLUMNS": "1000"}  # paths of temporary folders can be long
    done = python(IN_ORDER, json.dumps(lines), env=wide)
    assert done.returncode == 0, done.stderr
    for number, (words, code, err, has_torch) in enumerate(json.loads(done.stdout)):
        assert not has_torch, words
        if number < len(accepted):
            assert code == 0, words
            assert [line for line in err.splitlines() if not line.startswith("next: ")] == [], words
        else:  # a message, and no first line
            assert code == 2, (words, err)
            assert err.startswith("error: "), (words, err)


@pytest.mark.parametrize("more", [[], ["--json"], ["--plan"]])
def test_a_plan_without_data_imports_no_calibration(place: Path, more: list[str]) -> None:
    """Nor what computes on arrays: transformers, numba, jsonschema."""
    script = IN_ORDER.replace("print(", "print(json.dumps(sorted(sys.modules))); print(")
    done = python(script, json.dumps([[*map(str, usual(place)), "--plan", *more]]))
    modules, results = map(json.loads, done.stdout.splitlines())
    assert results[0][1] == 0, results
    ours = [name for name in modules if name.startswith("quantcli.calibration.")]
    assert ours == ["quantcli.calibration.resources"]
    assert not {"transformers", "llvmlite", "numba", "torch._dynamo", "jsonschema"} & {*modules}


# the first line


@pytest.mark.parametrize("json_too", [False, True])
@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["quantize", "{}/recipe.yaml", "--model", "{}/model", "--out", "{}/out"],
         "planning {}/recipe.yaml for {}/model"),
        (["calibrate", "w8a8_static", "--model", "{}/model", "--out", "{}/out"],
         "planning w8a8_static for {}/model"),
        (["pack", "{}/q", "--target", "fp8", "--out", "{}/out"], "planning {}/q in the format fp8"),
        (["verify", "{}/q", "--full"], "verifying {}/q: structure, full"),
        (["inspect", "--support"], "trying each scheme with each target"),
        (["inspect", "--outliers", "{}/model"], "ranking the weights of {}/model"),
    ],
)  # fmt: skip
def test_a_first_line_before_torch(place: Path, words: list[str], first: str, json_too: bool) -> None:
    words = [word.replace("{}", str(place)) for word in words] + ["--json"] * json_too
    wide = {**os.environ, "COLUMNS": "1000"}  # paths of temporary folders can be long
    done = python(AT_IMPORT, "torch", "leave", *words, env=wide)
    assert done.stderr.splitlines() == [first.replace("{}", str(place)), "IMPORTED"]
    assert done.stdout == ""
    if words[0] in FIRST:
        quiet = python(AT_IMPORT, "torch", "leave", *words, "--quiet")
        assert quiet.stderr == "IMPORTED\n"


# interrupts

MODULES = [
    "gc", "quantcli.cli.process", "typer", "rich.console", "pydantic", "quantcli.cli.app", "yaml",
    "quantcli.recipe.written", "quantcli.commands.quantize", "torch", "numpy", "torch.nn",
    "quantcli.planning.planner", "quantcli.schemes.base", "quantcli.cli.progress",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MODULES)), ids=lambda number: MODULES[number])
def test_an_interrupt_during_an_import(place: Path, number: int) -> None:
    module, stop = MODULES[number], ("SIGINT", "SIGTERM")[number % 2]
    done = python(AT_IMPORT, module, stop, *usual(place))
    assert done.returncode == 130, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("planning ")]
    assert lines == ["error: interrupted", f"  fix: {RESUMES}"]


def test_an_interrupt_at_any_call(place: Path) -> None:
    """At calls that lie close together first, then ever further apart, up to the end of the plan."""
    nth, interrupted, done = 1, 0, None
    while nth < 100_000_000:
        done = python(AT_CALL, nth, *usual(place), "--plan")
        if done.returncode == 0:  # it ended before
            break
        assert done.returncode == 130, (nth, done.stderr)
        lines = [line for line in done.stderr.splitlines() if not line.startswith("planning ")]
        assert lines == ["error: interrupted", f"  fix: {RESUMES}"], nth
        interrupted += 1
        nth = nth + 1 + nth // 2
    assert done is not None
    assert (done.returncode, interrupted > 25) == (0, True)


def test_an_interrupt_during_an_import_as_json(place: Path) -> None:
    done = python(AT_IMPORT, "pydantic", "SIGINT", "inspect", place / "model", "--json")
    assert done.returncode == 130
    assert done.stderr == "error: interrupted\n  fix: the same command again\n"
    again = python(PRINTED, "the same command again")
    assert done.stdout == again.stdout


# a command whose main thread stays in one operation, in which Python calls no handler
STUCK = """
import hashlib, os, signal, sys, threading
times = int(sys.argv.pop(1))
from quantcli.commands import inspect as commands
def stuck(model, tensors, progress):
    progress.keeps('1 of 2 "shards" in a\\nb')
    stops = [signal.SIGINT] * times
    threading.Timer(0.1, lambda: [os.kill(os.getpid(), stop) for stop in stops]).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
commands.inspect = stuck
from quantcli.__main__ import entry
entry()
"""


def test_an_interrupt_within_one_long_operation(place: Path) -> None:
    """It ends the process, although the main thread does not come back to Python for many minutes."""
    log = place / "log"
    words = ["inspect", place / "model", "--json", "--log-file", log]
    done = python(STUCK, 1, *words, timeout=300)
    kept = 'interrupted; kept: 1 of 2 "shards" in a\nb'
    lines = ["error: " + kept.replace("\n", "\\n"), "  fix: the same command again"]
    assert (done.returncode, done.stderr.splitlines()) == (130, lines)
    assert json.loads(done.stdout)["error"]["what"] == kept
    assert [line.partition("Z  ")[2] for line in log.read_text().splitlines()][1:] == lines
    assert python(STUCK, 2, *words, timeout=300).returncode == 130


# the same, after a model at an address was opened
OPENED = """
    from quantcli.checkpoint.hub import mount
    global kept
    kept = mount(model)
    os.write(2, b"OPENED\\n")
"""
STUCK_ELSEWHERE = STUCK.replace("    progress.keeps", f"{OPENED}    progress.keeps")


def test_an_interrupt_removes_temporary_files(place: Path, tmp_path: Path) -> None:
    with served(place) as web:
        done = python(
            STUCK_ELSEWHERE,
            1,
            *("inspect", f"{web.address}/model"),
            timeout=300,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
    assert (done.returncode, done.stderr.splitlines()[0]) == (130, "OPENED")
    assert [*tmp_path.iterdir()] == []


PRINTED = f"""
import sys
from {Output.__module__} import Output
from {Interrupted.__module__} import Interrupted
Output(as_json=True).error(Interrupted("interrupted", fix=sys.argv[1]))
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(place: Path, stop: signal.Signals) -> None:
    """A script that starts a command with `&` makes it ignore SIGINT; `trap` does, of any signal."""
    ignore = f"import signal; signal.signal({int(stop)}, signal.SIG_IGN)\n"
    done = python(ignore + AT_IMPORT, "yaml", stop.name, *usual(place), "--plan", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_library_installs_no_handler() -> None:
    script = (
        "import signal\nnames = ('SIGINT', 'SIGTERM')\n"
        "before = [signal.getsignal(getattr(signal, name)) for name in names]\n"
        "import quantcli, quantcli.__main__, quantcli.cli.process\nquantcli.inspect\n"
        "assert before == [signal.getsignal(getattr(signal, name)) for name in names]\n"
    )
    assert python(script).returncode == 0


# streams that are closed, full, or pipes without a reader

CLOSED = "error: standard output is closed\n"
FULL = "error: no space left on device\n"


@pytest.mark.parametrize("words", ["--help", "--version", "--version --json", "inspect --help",
                                   "inspect {}/model", "inspect {}/model --json", "recipes",
                                   "recipes show w8a8_dynamic --json"])  # fmt: skip
def test_streams(place: Path, words: str) -> None:
    line = f"{sys.executable} -m quantcli {words.replace('{}', str(place))}"
    for redirect, code, err in (
        (">&-", 3, CLOSED), (">/dev/full", 3, FULL), ("2>&-", 0, ""), ("2>/dev/full", 0, ""),
        ("<&-", 0, ""), ("<&- >&- 2>&-", 3, ""), (">/dev/full 2>&1", 3, ""),
        ("| :; exit ${PIPESTATUS[0]}", 0, ""), ("2>&1 | :; exit ${PIPESTATUS[0]}", 0, ""),
    ):  # fmt: skip
        done = subprocess.run(
            ["bash", "-c", f"{line} {redirect}"], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, (redirect, done.stderr)
        assert done.stderr.startswith(err), redirect
        assert done.stderr.count("error: ") == bool(err), redirect


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    """Names that are not text, and characters that the terminal's encoding lacks, are escaped."""
    name = "模\U0001f600\udcff"  # the last one is a byte that is no character
    command = [sys.executable, "-m", "quantcli", "inspect", "--json", os.fsencode(tmp_path / name)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout.decode(encoding))["error"]["where"] == str(tmp_path / name)
    character = "模" if encoding == "utf-8" else "\\u6a21"
    assert f"  --> {tmp_path}/{character}" in done.stderr.decode(encoding)


def test_closed_streams_reach_no_file(place: Path, tmp_path: Path) -> None:
    """The descriptors 0 to 2 would be free for shards, and a message would be written into one."""
    words = [str(word) for word in usual(place)[:-1]]
    line = f"{sys.executable} -m quantcli {' '.join(words)} {tmp_path / 'out'}"
    for number, redirect in enumerate(("2>&-", "<&- 2>&-", "2>/dev/full", "-q <&- >&- 2>&-")):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        done = subprocess.run(["bash", "-c", f"{line} {redirect}"], check=False, stdout=subprocess.PIPE)
        assert done.returncode == 0, redirect
        assert snapshot(tmp_path / "out") == snapshot(place / "q"), number


def test_no_reader_of_messages_stops_no_work(place: Path, tmp_path: Path) -> None:
    words = [str(word) for word in usual(place)[:-1]]
    line = f"{sys.executable} -m quantcli {' '.join(words)} {tmp_path / 'out'} 2>&1 | :"
    subprocess.run(["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], check=True)
    assert snapshot(tmp_path / "out") == snapshot(place / "q")


def test_the_end_runs_what_libraries_registered(place: Path) -> None:
    """The process leaves without Python's shutdown, but temporary files, say, are deleted."""
    script = "import atexit, os\natexit.register(os.write, 2, b'the end\\n')\n" + AT_IMPORT
    done = python(script, "no such module", "SIGINT", "inspect", place / "model")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "the end")
    refused = python(script, "no such module", "SIGINT", "inspect", place / "gone")
    assert refused.returncode == 2
    assert re.fullmatch(r"error: .*the end\n", refused.stderr, re.DOTALL)
