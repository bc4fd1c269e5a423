"""The floors of the house: a module imports from lower floors only."""

import ast
from pathlib import Path

import pytest

from quantcli.registry import discover
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "quantcli"
FLOORS = {
    0: {"codes", "verify.limits", "errors", "registry", "numerics", "events", "recipefile",
        "schemes.rounding", "schemes.gptq", "verify.words", "verify.grid"},
    1: {"verify.plots", "verify.junit", "findings", "tensorspec", "folder", "yamlfile",
        "executors", "schemes.learner", "schemes.kronecker", "schemes.observers", "schemes.tiles",
        "schemes.affine", "calibration.taps",
        "calibration.devices"},
    2: {"schemes.fp8", "verify.charts", "verify.markup", "header", "schemes.base", "verify.report",
        "calibration.documents", "calibration.flow"},
    3: {"encoded", "verify.heatmap", "checkpoint", "writer", "targets.layouts",
        "schemes.integer", "calibration.hessians", "calibration.wishes", "calibration.dataset"},
    4: {"verify.outlierpage", "formats", "hub", "journal", "tensors", "targets.base",
        "schemes.int4", "schemes.int8_static",
        "targets.ascend_tags", "targets.compressed_tensors_kinds", "targets.compressed_tensors_packing",
        "calibration.library", "calibration.watch"},
    5: {"sources.base", "sources.columns",
        "schemes.*", "verify.page", "manifest", "inspection", "publish", "measured", "targets.sidecars",
        "targets.siblings", "targets.names", "targets.ascend_layouts",
        "targets.compressed_tensors_layouts", "targets.compressed_tensors_groups", "verify.blocks",
        "calibration.skeleton", "calibration.calls", "calibration.states"},
    6: {"sources.*", "schemes.w4a4_flatquant",
        "recipe", "verify.opening", "verify.sizes", "verify.compare", "targets.experts",
        "targets.ascend_names", "targets.compressed_tensors_config", "targets.blocks", "targets.tp",
        "targets.params", "targets.fp8_kinds", "calibration.outside", "calibration.layout",
        "calibration.engine", "calibration.store"},
    7: {"sources.decode",
        "targets.ascend_tp", "targets.compressed_tensors_checks", "targets.fp8_config",
        "targets.ascend_description", "targets.compressed_tensors_matching", "verify.structure",
        "verify.edits", "plan", "matching", "schema", "calibration.shown",
        "calibration.replay", "calibration.folding"},
    8: {"splitting", "recoding", "openshard", "surveys", "targets.*", "targets.ascend_stored",
        "targets.compressed_tensors_stored",
        "targets.fp8_stored", "verify.full", "verify.reference", "items", "calibration.run",
        "calibration.served", "calibration.identity"},
    9: {"repack_items", "partfile", "blocks", "targets.ascend", "targets.compressed_tensors",
        "targets.fp8", "verify.against", "verify.run",
        "planner", "advice", "calibration.rounding", "calibration.loaded"},
    10: {"repacking", "streaming", "verify.verify", "outliers", "calibration.smoothing",
        "calibration.learning",
        "calibration.memory"},
    11: {"execute", "calibration.learned"},
    12: {"calibration.layer"},
    13: {"calibration.calibrate"},
    14: {"calibration.session"},
    15: {"jobs", "merging", "packing"},
    16: {"verifying", "commands"},
    17: {"console"},
    18: {"options", "progress", "verify.shown", "outlier_table", "pack_shown"},
    19: {"cli_pack"},
    20: {"cli"},
    21: {"__main__"},
}  # fmt: skip
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


def floor(module):
    exact = [level for level, names in FLOORS.items() if module in names]
    if exact:
        return exact[0]
    family = module.rpartition(".")[0] + ".*"
    return next(level for level, names in FLOORS.items() if family in names)


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


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    for imported in ours(imports(module, top_only=False)):
        assert floor(imported) < floor(module), f"{module} imports {imported}"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    heads = {name.partition(".")[0] for name in imports(module, top_only=True)}
    assert not heads & HEAVY
    reached = ours(imports(module, top_only=True))
    assert reached <= {*LIGHT, "progress"}, f"{module} reaches {reached}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_rooms(module):
    assert len((SOURCE / f"{module.replace('.', '/')}.py").read_text().splitlines()) <= 300


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
