"""Small faults in the code that reads headers, checks names and packs: do its tests notice each?

The faults are those of cosmic-ray. A process that has imported the libraries forks for each; a finder
gives the changed module to the tests. `python -m tests.fuzz.mutants [MODULE ...]`, after
`pip install cosmic-ray`; `make mutants` does both.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib.abc
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from tests.fuzz.equivalent import EQUIVALENT

SOURCE = Path(__file__).parents[2] / "src" / "quantcli"
UNIT = "tests/unit"
# module -> the tests that it must fail
MODULES = {
    "checkpoint/header.py": (f"{UNIT}/checkpoint/test_header.py", f"{UNIT}/checkpoint/test_folder.py"),
    "checkpoint/files.py": (
        f"{UNIT}/checkpoint/test_folder.py",
        f"{UNIT}/checkpoint/test_checkpoint.py",
    ),
    "checkpoint/manifest.py": (f"{UNIT}/checkpoint/test_manifest.py",),
    "core/place.py": (f"{UNIT}/core/test_place.py",),
    "core/untrusted/names.py": (f"{UNIT}/core/test_names.py", f"{UNIT}/core/test_untrusted.py"),
    "planning/recode.py": (f"{UNIT}/planning/test_recode.py",),
    "planning/repack.py": (f"{UNIT}/planning/test_repack.py", f"{UNIT}/planning/test_recode.py"),
}
# Others change what no run can tell, such as a type annotation, or repeat what these show.
OPERATORS = re.compile(
    r"core/(AddNot|Replace(True|False|And|Or|Break|Continue)With\w+|ExceptionReplacer|NumberReplacer"
    r"|RemoveDecorator|ZeroIterationForLoop|ReplaceUnaryOperator_(Delete_Not|Delete_USub)"
    r"|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is"
    r"|In_NotIn|NotIn_In|Lt_Gt|Gt_Lt|Eq_GtE|Eq_LtE)"
    r"|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Add|Div_Mul|FloorDiv_Div|Mod_Mul|Pow_Mul|BitOr_BitAnd"
    r"|BitAnd_BitOr))"
)
_MOST_SECONDS = 120.0
_LIBRARIES = ("numpy", "torch", "pytest", "_pytest.assertion.rewrite", "safetensors.torch", "yaml",
              "pydantic", "rich.filesize", "jinja2", "typer", "hypothesis.strategies")  # fmt: skip


def mutants(code: str, equivalent: Set[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Each changed code, with the operator's name.

    equivalent: changed lines that no test can notice. ValueError for one that there is not.
    """
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    left = {"".join(line.split()): line for line in equivalent}
    found: set[str] = set()
    for name in filter(OPERATORS.fullmatch, sorted(operator_names())):
        operator: Any = get_operator(name)
        occurrence = 0
        while (changed := mutate_code(code, operator(), occurrence)) is not None:
            occurrence += 1
            if changed == code:
                continue
            old, new = _changed_lines(code, changed)
            line = "".join("".join(new).split())
            if line in left:
                found.add(line)
            elif not _is_type(old, new):
                yield name.removeprefix("core/"), changed
    if left.keys() - found:
        raise ValueError(f"not a mutant now: {[left[line] for line in left.keys() - found]}")


def _changed_lines(code: str, changed: str) -> tuple[list[str], list[str]]:
    """The lines that a change takes out, and those that it puts in."""
    lines = list(difflib.ndiff(code.splitlines(), changed.splitlines()))
    old, new = ([line[2:] for line in lines if line.startswith(sign)] for sign in ("- ", "+ "))
    return old, new


def _is_type(old: list[str], new: list[str]) -> bool:
    """Whether a change is in a type, or makes a class mutable: mypy reads both, and no run does."""
    is_type = re.compile(r" *def .* \| |-> .*\|.*:$| *\w+: [^=(]*\||@dataclass\(")
    return len(old) == len(new) and all(map(is_type.match, old))


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module another code."""

    def __init__(self, path: Path, code: str) -> None:
        self.name = "quantcli." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        self.path, self.code = path, code

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The module, if it is that one."""
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def exec_module(self, module: Any) -> None:
        """Run the changed code."""
        exec(compile(self.code, str(self.path), "exec"), module.__dict__)


def survives(path: Path, code: str, tests: tuple[str, ...]) -> bool:
    """Whether all tests pass with a changed module. One that does not end does not survive."""
    child = os.fork()
    if child == 0:
        _test(path, code, tests)
    until = time.monotonic() + _MOST_SECONDS
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.01)


def _test(path: Path, code: str, tests: tuple[str, ...]) -> None:
    gc.freeze()  # pytest collects garbage when it ends, among all objects of the libraries
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # these tests need none, and imports take time
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    code_of_exit = 1
    try:
        import pytest

        assert not any(name.startswith("quantcli") for name in sys.modules), (
            "it would keep the old code"
        )
        sys.meta_path.insert(0, Finder(path, code))
        code_of_exit = int(pytest.main(["-x", "-q", *tests]))
    finally:
        os._exit(code_of_exit)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help="such as checkpoint/header.py [default: all]")
    parser.add_argument("--every", type=int, default=1, help="take each n-th mutant alone")
    options = parser.parse_args()
    for library in _LIBRARIES:
        importlib.import_module(library)
    import torch

    torch.set_num_threads(1)
    total = killed = 0
    for module in options.modules or MODULES:
        path, tests = SOURCE / module, MODULES[module]
        code = path.read_text()
        assert survives(path, code, tests), f"{module}: its tests fail without a mutant"
        count = dead = 0
        for number, (operator, changed) in enumerate(mutants(code, EQUIVALENT.get(module, {}).keys())):
            if number % options.every:
                continue
            count += 1
            if not survives(path, changed, tests):
                dead += 1
                continue
            lines = difflib.unified_diff(code.splitlines(), changed.splitlines(), lineterm="", n=0)
            diff = "\n    ".join(line for line in lines if line[:3] not in {"---", "+++"})
            print(f"  survives: {operator}\n    {diff}", flush=True)
        print(
            f"{module}: {dead} of {count} mutants are noticed, {dead / max(1, count):.1%}", flush=True
        )
        total, killed = total + count, killed + dead
    print(f"all: {killed} of {total}, {killed / max(1, total):.1%}")


if __name__ == "__main__":
    main()
