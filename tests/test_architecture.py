"""The floors of the house: a module imports from lower floors only."""

import ast
from pathlib import Path

import pytest

from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "quantcli"
MODULES = sorted(
    path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".")
    for path in SOURCE.rglob("*.py")
)
MODULES = [module for module in MODULES if not module.endswith(".__init__")]
# what `--help` and `inspect` must not wait for
HEAVY = {"torch", "pydantic", "numpy", "transformers", "ray", "torch_npu", "plotly"}
LIGHT = ["cli", "options", "errors", "registry", "tensorspec", "header", "folder", "checkpoint",
         "formats", "inspection", "hub", "commands", "console", "numerics", "jobs",
         "cli_pack", "encoded"]  # fmt: skip


def imports(module, *, top_only):
    """Everything that a module imports, at its top or anywhere."""
    tree = ast.parse((SOURCE / f"{module.replace('.', '/')}.py").read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ({node.module or ""} | {f"{node.module}.{name.name}" for name in node.names})
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def ours(names):
    found = {name.removeprefix("quantcli.") for name in names if name.startswith("quantcli.")}
    return {name for name in found if name in MODULES}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    heads = {name.partition(".")[0] for name in imports(module, top_only=True)}
    assert not heads & HEAVY
    reached = ours(imports(module, top_only=True))
    assert reached <= {*LIGHT, "progress"}, f"{module} reaches {reached}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_rooms(module):
    assert len((SOURCE / f"{module.replace('.', '/')}.py").read_text().splitlines()) <= 500


def test_schemes_and_targets_are_strangers():
    for module in MODULES:
        reached = ours(imports(module, top_only=False))
        if module.startswith("schemes."):
            assert not any(name.startswith("targets.") for name in reached)
        if module.startswith("targets."):
            assert not any(name.startswith("schemes.") for name in reached)


def test_each_scheme_and_target_is_one_file():
    for base in (Scheme, Target):
        classes = discover(base).values()
        assert len({cls.__module__ for cls in classes}) == len(classes)


def test_only_console_prints():
    for module in MODULES:
        tree = ast.parse((SOURCE / f"{module.replace('.', '/')}.py").read_text())
        calls = [n.func for n in ast.walk(tree) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), module
