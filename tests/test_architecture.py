"""The tree: imports go down, formats do not know each other, light commands stay light."""

import ast
import importlib
import json
import logging.config
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

import quantcli
from quantcli.calibration.methods.base import Method
from quantcli.core.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target
from tests.builders import make_model, tensor
from tests.e2e.conftest import CONFIG, RECIPE

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "quantcli"
sys.path.insert(0, str(ROOT / "benchmarks"))
import house  # noqa: E402

# what `--help`, `inspect` and `recipes` must not wait for
HEAVY = {"torch", "numpy", "transformers", "ray", "torch_npu", "jinja2", "markupsafe",
         "pydantic"}  # fmt: skip
DRAWING = {"jinja2", "markupsafe"}  # what only a page needs
MODULES = [m.name for m in pkgutil.walk_packages(quantcli.__path__, "quantcli.")]
# runs a command; its last line is what was loaded, and what quantcli's own modules imported
WATCHED = """
import builtins, json, sys
usual, ours = builtins.__import__, set()
def watch(name, globals=None, *rest, **options):
    if (globals or {}).get("__name__", "").partition(".")[0] == "quantcli":
        ours.add(name.partition(".")[0])
    return usual(name, globals, *rest, **options)
builtins.__import__ = watch
from quantcli.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps([sorted({name.partition(".")[0] for name in sys.modules}), sorted(ours)]))
"""
STRUCTURE = [figure for figure in house.figures() if figure.what != house.LINES]


def test_imports_keep_the_contract(monkeypatch, capsys):
    # import-linter would put the working directory into the path, and silence all loggers there are
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(logging.config, "dictConfig", lambda _: None)
    config = ROOT / "pyproject.toml"
    kept = lint_imports(config_filename=str(config), no_cache=True, no_logo=True) == 0
    assert kept, capsys.readouterr().out


@pytest.mark.parametrize("figure", STRUCTURE, ids=lambda figure: figure.what)
def test_figures_of_the_tree(figure):
    assert figure.ok, "\n".join([f"{figure.value} > {figure.bar}", *figure.where])


def write_tree(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_the_figures_see_arrows_and_circles(tmp_path):
    files = {
        "a/x.py": "def f():\n    from quantcli.b import y\n",
        "b/y.py": "from quantcli.c.z import g\nif TYPE_CHECKING:\n    import quantcli.d.w\n",
        "c/z.py": "import quantcli.b.y\n",
        "d/w.py": "def g(self, a, b, c, d, e, f, g, h): ...\n",
        "e/v.py": "from quantcli import make\nfrom ..d import w\nfrom . import u\n",
        "f.py": "if not TYPE_CHECKING:\n    import quantcli.d\nelif typing.TYPE_CHECKING:\n"
        "    import quantcli.a\nelse:\n    import quantcli.e\n",
        "__init__.py": '_HOME = {"make": "a.x"}\n',
    }
    write_tree(tmp_path, files)
    graph = house.arrows(tmp_path)
    assert graph == {
        "a": {"b"},
        "b": {"c"},
        "c": {"b"},
        "d": set(),
        "e": {"a", "d"},
        "f": {"d", "e"},
        "__init__": set(),
    }
    assert house.circles(graph) == [{"b", "c"}]
    assert house.chain(graph) == ["f", "e", "a", "b+c"]
    assert house.rooms(tmp_path)["b"] == house.Room(files=1, lines=3, imports=("c",))
    assert house.folders(tmp_path) == {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, ".": 1}


def test_plug_ins_do_not_count_as_files_of_their_folder(tmp_path):
    files = {
        "a/one.py": 'class One(Base):\n    name: ClassVar[str] = "one"\n',
        "a/two.py": 'class Two(Base):\n    """It."""\n\n    name: ClassVar[str] = "two"\n',
        "a/base.py": "class Base:\n    name: ClassVar[str]\n",
        "a/other.py": 'name: str = "one"\nclass Other:\n    title: ClassVar[str] = "one"\n',
    }
    write_tree(tmp_path, files)
    assert house.folders(tmp_path) == {"a": 2}


def test_the_figures_see_many_parameters(tmp_path):
    many = "a, b, c, d, /, e, f, *, g, h"
    files = {
        "__init__.py": '_HOME = {"make": "a.x"}\n',
        "cli/app.py": f"def command({many}): ...\n",
        "a/x.py": f"def make({many}): ...\nclass C:\n    async def make(self, {many}): ...\n",
        "a/y.py": f"def make({many}): ...\ndef few(self, a, b, c, d, e, f, g, *rest, **more): ...\n",
    }
    write_tree(tmp_path, files)
    assert house.long_signatures(tmp_path) == ["a/x.py:3 make (8)", "a/y.py:1 make (8)"]


@pytest.mark.parametrize(
    ("text", "missed"),
    [
        ("{rest}", True),
        ("# Long because: one table\n{rest}", False),
        ('# Long because: one table\n"""What it is."""\n{rest}', False),
        ('"""What it is."""\n\n# Long because: one table\n{rest}', False),
        ("# Long because:\n{rest}", True),
        ("{rest}# Long because: one table\n", True),
    ],
)
def test_the_figures_see_long_modules(tmp_path, text, missed):
    write_tree(tmp_path, {"a.py": text.format(rest="x = 1\n" * 501), "b.py": "x = 1\n" * 500})
    assert bool(house.long_modules(tmp_path)) == missed


def watched(*words):
    """What was loaded when a command ran, and what quantcli's own modules imported."""
    run = [sys.executable, "-c", WATCHED, *map(str, words)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, ours = json.loads(done.stdout.splitlines()[-1])
    assert "quantcli" in loaded
    assert "quantcli" in ours
    return set(loaded), set(ours)


@pytest.mark.parametrize("command", ["--help", "inspect", "recipes"])
def test_light_commands_import_nothing_heavy(tmp_path, command):
    words = [command]
    if command == "inspect":
        words.append(make_model(tmp_path / "model", config=CONFIG))
    loaded, ours = watched(*words)
    assert sorted(HEAVY & ours) == []
    # typer itself loads pydantic for what a command takes
    by_typer = set() if command == "--help" else {"pydantic"}
    assert sorted(HEAVY & loaded - by_typer) == []


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "recipe.yaml").write_text(RECIPE)
    model = make_model(
        folder / "model",
        {"m.safetensors": {"model.layers.0.self_attn.q_proj.weight": tensor("BF16", 32, 32)}},
        config=CONFIG,
    )
    quantcli.quantize(folder / "recipe.yaml", model=model, out=folder / "out")
    return folder / "out"


def test_only_a_page_imports_what_draws_it(quantized, tmp_path):
    _, ours = watched("verify", quantized)
    assert sorted(DRAWING & ours) == []
    _, ours = watched("verify", quantized, "--report", tmp_path / "page.html")
    assert sorted(DRAWING & ours) == sorted(DRAWING)


def test_what_quantcli_offers_is_no_module():
    """Not even after each module was imported, which sets it as an attribute of its package."""
    for name in MODULES:
        if name != "quantcli.__main__":
            importlib.import_module(name)
    for name in set(quantcli.__all__) - {"__version__"}:
        assert callable(getattr(quantcli, name)), name


def test_each_scheme_target_and_method_is_one_file():
    for base in (Scheme, Target, Method):
        classes = discover(base).values()
        assert len({cls.__module__ for cls in classes}) == len(classes)


def test_calibration_knows_no_method_and_no_scheme():
    """Only the base interfaces: what runs methods on a layer is the same for all of them."""
    methods = "quantcli.calibration.methods"
    for path in [p for p in house.modules() if p.parent != SOURCE / "calibration" / "methods"]:
        imported = {name for name in imports(path.read_text()) if name.startswith(f"{methods}.")}
        assert imported <= {f"{methods}.base"}, path
    for path in (SOURCE / "calibration").glob("*.py"):
        names = {name for name in imports(path.read_text()) if name.startswith("quantcli.schemes.")}
        assert {n for n in names if ".arithmetic." not in n} <= {"quantcli.schemes.base"}, path
    layer = imports((SOURCE / "calibration" / "layer.py").read_text())
    assert not any(name.startswith("quantcli.schemes") for name in layer)
    assert f"{methods}.base" in layer


def imports(text):
    """The modules that a module imports by `from`, wherever it does."""
    return {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and n.module}


def test_packages_say_what_lives_there():
    for package in SOURCE.rglob("__init__.py"):
        lines = (ast.get_docstring(ast.parse(package.read_text())) or "").splitlines()
        assert lines, package
        if package.parent.parent == SOURCE:
            assert len(lines) >= 3, f"{package}: what lives there, and what may not"


def test_a_wheel_has_every_file_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["quantcli"]
    packed = {path for pattern in patterns for path in SOURCE.glob(pattern)}
    files = {path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files == packed | {path for path in files if path.suffix == ".py"}
    assert SOURCE / "verification" / "report" / "templates" / "base.html.jinja" in packed


def test_only_the_cli_prints():
    for path in house.modules():
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), path
