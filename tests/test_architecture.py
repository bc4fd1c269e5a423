"""The tree: imports go down, formats do not know each other, light commands stay light."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import quantcli
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target
from tests.builders import make_model
from tests.e2e.conftest import CONFIG

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "quantcli"
sys.path.insert(0, str(ROOT / "benchmarks"))
import house  # noqa: E402

# what `--help` and `inspect` must not wait for (pydantic is loaded by typer itself)
HEAVY = {"torch", "numpy", "transformers", "ray", "torch_npu", "plotly", "jinja2"}
MODULES = [m.name for m in pkgutil.walk_packages(quantcli.__path__, "quantcli.")]
LOADED = (
    "import sys; from quantcli.__main__ import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
)


def test_imports_keep_the_contract(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    kept = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0
    assert kept, capsys.readouterr().out


STRUCTURE = [figure for figure in house.figures() if not figure.what.startswith("lines")]


@pytest.mark.parametrize("figure", STRUCTURE, ids=lambda figure: figure.what)
def test_figures_of_the_tree(figure):
    assert figure.value <= figure.bar


def test_the_figures_see_arrows_and_circles(tmp_path):
    files = {
        "a/x.py": "def f():\n    from quantcli.b import y\n",
        "b/y.py": "from quantcli.c.z import g\nif TYPE_CHECKING:\n    import quantcli.d.w\n",
        "c/z.py": "import quantcli.b.y\n",
        "d/w.py": "def g(self, a, b, c, d, e, f, g, h): ...\n",
        "__init__.py": "_HOME = {}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = house.arrows(tmp_path)
    assert graph == {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set(), "__init__": set()}
    assert house.circles(graph) == [{"b", "c"}]
    assert house.chain(graph) == ["a", "b+c"]
    assert house.long_signatures(tmp_path) == ["d/w.py:1 g (8)"]


@pytest.mark.parametrize("command", ["--help", "inspect"])
def test_light_commands_import_nothing_heavy(tmp_path, command):
    words = [command]
    if command == "inspect":
        make_model(tmp_path / "model", config=CONFIG)
        words.append(str(tmp_path / "model"))
    code = LOADED + "print('LOADED', *sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    *_, last = done.stdout.splitlines()
    mark, *loaded = last.split()
    assert (mark, "quantcli" in loaded) == ("LOADED", True), done.stderr
    assert not HEAVY & set(loaded)


def test_modules_and_functions_of_one_name_can_be_told_apart():
    for name in MODULES:
        if name != "quantcli.__main__":
            importlib.import_module(name)
    for name in quantcli.__all__:
        assert callable(getattr(quantcli, name)), name


def test_each_scheme_and_target_is_one_file():
    for base in (Scheme, Target):
        classes = discover(base).values()
        assert len({cls.__module__ for cls in classes}) == len(classes)


def test_packages_say_what_lives_there():
    for package in SOURCE.rglob("__init__.py"):
        lines = (ast.get_docstring(ast.parse(package.read_text())) or "").splitlines()
        assert lines, package
        if package.parent.parent == SOURCE:
            assert len(lines) >= 3, f"{package}: what lives there, and what may not"


def test_only_the_cli_prints():
    for path in house.modules():
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), path
