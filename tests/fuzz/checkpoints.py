"""Changed checkpoints go through every command: `python -m tests.fuzz.checkpoints -h`.

Good checkpoints of several families and formats are made once. Each number changes one or two files of
one of them, and all commands read the result. A process that has imported everything forks for each
command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from quantcli.checkpoint.manifest import encode_manifest
from tests.fuzz import folders
from tests.fuzz.mutate import mutate

GOOD = frozenset({0, 1, 2, 3})
MOST_SECONDS = 20.0
_SAMPLES = "calibration: {data: TEXT, samples: 2, length: 8}\n"
PLAIN = 'target: ascend\nrules: [{match: "*_proj", scheme: w8a8_dynamic}]\n'
STATIC = "target: TARGET\n" + _SAMPLES + (
    'rules: [{match: "*_proj", scheme: {name: w8a8_static, observer: minmax}}]\nsmooth: {alpha: 0.5}\n'
)  # fmt: skip
WORDS = (
    "qwen3", ["qwen3"], "llama", "mamba2", "gpt_oss", "deepseek_v3", "evil/kernel", 10**9, 2 * 10**9,
    10**8, "BF16", "F32", "I8", "F8_E4M3", "F64", [0, 0], [1 << 40, 1 << 20], "W8A8", "W8A8_DYNAMIC",
    "FLOAT", "{% for a in range(10**9) %}x{% endfor %}", "(a+)+$", "re:(([a-z_.0-9])+)+!", "model",
    {"factor": 0},
    {"rope_type": "yarn", "factor": 1e300}, {"id2label": {}}, "../../x", "ascend", "float64", "linear",
)  # fmt: skip
_KINDS = {".json": "json", ".yaml": "yaml", ".safetensors": "header", ".md": "text"}
_LARGEST = 2**20  # bytes of a file that is changed


def make_all(root: Path) -> dict[str, Path]:
    """The good checkpoints, by name. Some have a calibration next to them, in `calibration`."""
    from quantcli.commands.api import calibrate, quantize
    from tests.e2e.calibrating import write_tokenizer
    from tests.tiny_models import make_tiny

    text = root / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 40)
    models = {}
    for family in ("llama", "qwen2", "qwen3_moe", "gpt_oss", "deepseek_v3"):
        models[family] = make_tiny(root / family, family, num_hidden_layers=2)
        write_tokenizer(models[family])
    for target, family in (("ascend", "llama"), ("compressed-tensors", "qwen2")):
        recipe = root / f"{target}.yaml"
        recipe.write_text(STATIC.replace("TEXT", str(text)).replace("TARGET", target))
        made, calibration = root / target / "out", root / target / "calibration"
        calibrate(recipe, model=models[family], out=calibration)
        quantize(recipe, model=models[family], out=made, calibration=calibration)
        shutil.move(calibration, made / "calibration")
        models[target] = made
    for name in folders.FORMATS:
        folders.make(root / f"of-{name}", name)
        write_tokenizer(root / f"of-{name}")
        models[f"of-{name}"] = root / f"of-{name}"
    (root / "plain.yaml").write_text(PLAIN)
    (root / "static.yaml").write_text(STATIC.replace("TEXT", str(text)).replace("TARGET", "ascend"))
    return models


def change(source: Path, folder: Path, number: int) -> list[str]:
    """A copy with a changed file, or two. Returns their names."""
    shutil.copytree(source, folder)
    rng = random.Random(number)
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in _KINDS]
    files = [path for path in files if path.stat().st_size < _LARGEST]
    changed = []
    for path in rng.sample(files, min(len(files), rng.choice((1, 1, 2)))):
        data = path.read_bytes()
        try:
            new = mutate(data, _KINDS[path.suffix], rng.getrandbits(40), WORDS)
        except ValueError:  # not what its name says
            new = mutate(data, "text", rng.getrandbits(40))
        if path.suffix == ".safetensors" and rng.random() < 0.5:
            new += bytes(rng.choice((0, 1, 2**16)))
        path.write_bytes(new)
        changed.append(path.relative_to(folder).as_posix())
    if rng.random() < 0.7:
        seal(folder)
    return changed


def seal(folder: Path) -> None:
    """Have the manifest list the files as they are now, and seal reports of calibrations again."""
    from quantcli.calibration.store import layer_file, seal_of

    with suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
        path = folder / "quantcli_manifest.json"
        path.write_bytes(encode_manifest(json.loads(path.read_bytes())))
    for report in (folder / "calibration").glob("layer-*.json"):
        with suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
            table = json.loads(report.read_bytes())
            tensors = report.parent / layer_file(int(report.stem[-5:]))
            report.write_text(json.dumps({**table, "sha256": seal_of(tensors, table)}))


def commands(folder: Path, root: Path, out: Path) -> dict[str, list[object]]:
    """The command lines that read a checkpoint, by name."""
    static, plain = root / "static.yaml", root / "plain.yaml"
    reuse = folder / "calibration"
    more = ["--calibration", reuse] if reuse.is_dir() else []
    return {
        "inspect": ["inspect", folder, "--json"],
        "plan": ["quantize", plain, "--model", folder, "--out", out / "p", "--plan"],
        "quantize": [
            "quantize",
            static if more else plain,
            "--model",
            folder,
            "--out",
            out / "q",
            *more,
        ],
        "verify": ["verify", folder, "--full"],
        "calibrate": ["calibrate", static, "--model", folder, "--out", out / "c"],
    }


def call(arguments: list[object], place: Path) -> tuple[int | str, str, float, int]:
    """A command in a fork: its exit code or the signal that ended it, what it printed, its seconds, and
    the largest memory that it had."""
    begin, printed = time.monotonic(), place / "printed"
    child = os.fork()
    if child == 0:
        _become(arguments, printed)
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > begin + 2 * MOST_SECONDS:  # the machine may be busy with other things
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status)
    words = printed.read_text(errors="replace")
    seconds = min(time.monotonic() - begin, usage.ru_utime + usage.ru_stime + 1)
    ended = code if code >= 0 else signal.Signals(-code).name
    return ended, words, seconds, usage.ru_maxrss * 1024


def _become(arguments: list[object], printed: Path) -> None:
    """Run a command in this process, and end it."""
    code = 70
    try:
        descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        from quantcli.__main__ import main

        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def preload(root: Path, models: dict[str, Path]) -> None:
    """Import all that commands import, and let no threads run, so that forks are safe."""
    import torch

    torch.set_num_threads(1)
    for name, command in commands(models["ascend"], root, root / "warm").items():
        code, words, *_ = call(command, root)
        assert code in GOOD, (name, code, words)
    import transformers

    import quantcli.calibration.session
    import quantcli.cli.app
    import quantcli.verification.depths

    assert quantcli.cli.app
    assert transformers
    shutil.rmtree(root / "warm", ignore_errors=True)


def faults(code: int | str, words: str, seconds: float) -> Iterator[str]:
    """What a command should not have done."""
    if code not in GOOD:
        yield f"exit {code}"
    if "Traceback" in words or "panicked" in words:
        yield "traceback"
    if seconds > MOST_SECONDS:
        yield f"{seconds:.0f} s"


def main(report: Callable[[str], None] = lambda text: print(text, flush=True)) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="changed checkpoints")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    options = parser.parse_args()
    exits: dict[str, Counter[int | str]] = defaultdict(Counter)
    slowest, largest, failed = ("", 0.0), 0, 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        models = make_all(root)
        preload(root, models)
        names = list(models)
        for number in range(options.first, options.first + options.count):
            name = names[number % len(names)]
            print(f"\r{number} ", end="", file=sys.stderr, flush=True)
            work = root / "work"
            changed = change(models[name], work / "model", number)
            for command, arguments in commands(work / "model", root, work).items():
                code, words, seconds, nbytes = call(arguments, work)
                exits[command][code] += 1
                slowest = max(slowest, (f"{command} of {number}", seconds), key=lambda pair: pair[1])
                largest = max(largest, nbytes)
                if found := list(faults(code, words, seconds)):
                    failed += 1
                    tail = " | ".join(words.strip().splitlines()[-6:])
                    report(f"{number} {name} {changed} {command}: {', '.join(found)}: {tail[-700:]}")
            shutil.rmtree(work)
    for command, codes in exits.items():
        counts = ", ".join(f"exit {code}: {n}" for code, n in sorted(codes.items(), key=str))
        report(f"{command:10} {counts}")
    report(f"slowest: {slowest[0]}, {slowest[1]:.1f} s")
    report(f"largest memory: {largest / 2**20:.0f} MiB; {failed} faults")
    return failed > 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main())
