"""Calibration methods: one of another package, named in a recipe; what methods share in a layer."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.calibration import building, session
from quantcli.calibration.methods.base import LayerWork, Measurement, Method
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.session import Resources
from quantcli.calibration.watch import Looker
from quantcli.commands import quantize as commands
from quantcli.core import registry
from quantcli.core.events import Progress
from quantcli.core.registry import discover
from quantcli.recipe.json_schema import recipe_schema
from tests.e2e.calibrating import (
    DYNAMIC,
    LENGTH,
    RECIPE,
    TOKENS,
    Bench,
    Models,
    change_tensors,
    make_bench,
)
from tests.e2e.conftest import run_cli, snapshot

PLUGIN = Path(__file__).parents[1] / "plugin"
EQUALIZE = RECIPE + "methods:\n  - {name: equalize, strength: 0.75}\n"
LAYERS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def make(tmp_path: Path, models: Models) -> Callable[..., Bench]:
    """A model of which every seventh column of a weight is eight times as large as the others."""

    def made(recipe: str = EQUALIZE, family: str = "llama") -> Bench:
        bench = make_bench(tmp_path, models(family), recipe)
        change_tensors(bench.own_model(), uneven)
        return bench

    return made


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The method of `tests/plugin`, as if its package were installed next to quantcli."""
    entry = EntryPoint("equalize", "toy_quant.equalize:Equalize", "quantcli.methods")
    points = {"quantcli.methods": [entry]}
    monkeypatch.setattr(registry, "entry_points", lambda group: points.get(group, []))
    monkeypatch.syspath_prepend(str(PLUGIN))
    discover.cache_clear()
    yield
    cls = importlib.import_module("toy_quant.equalize").Equalize
    del cls.name  # a class without a name is not found any more
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_quant"]:
        del sys.modules[name]
    discover.cache_clear()


def uneven(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor[:, ::7] *= 8


def as_float32(path: Path) -> None:
    """Rewrite a model in float32, so that edits round nothing that counts."""
    tensors = load_file(path / "model.safetensors")
    widened = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(widened, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("torch_dtype", None)
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))


def edit(model: Path, store: Path, copy: Path, without: str = "") -> int:
    """A copy of a model with the edits of a calibration, `without` one kind of them; returns the number
    of edited tensors."""
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    edited = 0
    for report in sorted(store.glob("layer-*.json")):
        vectors = load_file(report.with_suffix(".safetensors"))
        for name, places in json.loads(report.read_text())["edits"].items():
            parts = {k: vectors[f"vector.{place}"] for k, place in places.items() if k != without}
            tensor = parts.get("value", tensors[name])
            if "rows" in parts:
                tensor = tensor * parts["rows"].view(-1, *[1] * (tensor.dim() - 1))
            if "columns" in parts:
                tensor = tensor * parts["columns"]
            edited += not torch.equal(tensor, tensors[name])
            tensors[name] = tensor.contiguous()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return edited


def logits(path: Path) -> torch.Tensor:
    """float32 [1, 24, vocabulary]."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32).eval()
    ids = torch.arange(24).view(1, -1) * 3
    with torch.no_grad():
        out: torch.Tensor = model(ids, use_cache=False).logits
    return out


# a method of another package


def test_it_is_found_and_editors_know_its_options() -> None:
    known = ["awq", "equalize", "kv_cache", "learning", "ranges", "rounding", "smooth"]
    assert list(discover(Method)) == known
    schema = json.loads(recipe_schema())
    recipe = {"target": "ascend", "rules": [{"match": "*", "scheme": "keep"}]}
    jsonschema.validate({**recipe, "methods": [{"name": "equalize", "strength": 1}]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**recipe, "methods": [{"name": "equalize", "strength": 2}]}, schema)


@pytest.mark.parametrize(
    ("family", "methods"),
    [
        ("llama", "equalize"),
        ("qwen2", "equalize"),
        ("qwen3_moe", "equalize"),
        ("llama", "equalize, smooth"),
        ("qwen3_moe", "smooth, equalize"),
    ],
)
def test_the_function_stays(make: Callable[..., Bench], family: str, methods: str) -> None:
    """Float32 logits of the whole model before and after, relative to their size: below 1e-5."""
    calibration = RECIPE.splitlines()[1]  # for schemes without ranges, which experts can have
    bench = make(f"{DYNAMIC}{calibration}\nmethods: [{methods}]\n", family)
    model = bench.model
    as_float32(model)
    assert bench.calibrate().code == 0
    assert edit(model, bench.store, bench.root / "edited") >= 4 * LAYERS
    edit(model, bench.store, bench.root / "half", without="columns")
    before, after, half = (logits(path) for path in (model, bench.root / "edited", bench.root / "half"))
    size = before.abs().max()
    assert float((before - after).abs().max() / size) < 1e-5
    assert float((before - half).abs().max() / size) > 0.01


def test_report_plan_and_verify(make: Callable[..., Bench]) -> None:
    bench = make()
    planned = bench.run("--plan").out
    assert "runs first: ranges of 28 modules, clips of 28 modules and equalization from" in planned
    done = bench.run("--json")
    assert done.code == 0, done.err
    assert done.json["plan"]["calibration"]["methods"] == ["equalize"]
    assert done.json["plan"]["calibration"]["smooth"] is False
    planned = bench.run("--plan", "--force").out
    assert "equalized; else as it is" in planned
    assert "; 16 groups equalized" in planned
    report = bench.calibrate("--json").json
    assert len(report["equalized"]) == 4 * LAYERS
    assert report["smoothed"] == []
    first = report["equalized"][0]
    assert first["producer"] == "model.layers.0.input_layernorm"
    assert first["least"] < 1 < first["most"]
    assert "equalized    16 groups of channels" in bench.calibrate().out
    check = ("verify", bench.out, "--full", "--against", bench.model)
    proved = run_cli(*check, "--calibration", bench.store, "--json")
    assert proved.code == 0, proved.out
    assert proved.json["not_checked"] == []
    assert next(c for c in proved.json["checks"] if c["name"] == "edits")["checked"] > 0
    without = run_cli(*check, "--json")
    assert without.code == 0, without.out
    assert any("which equalization may have edited" in text for text in without.json["not_checked"])
    assert yaml_methods(bench) == [{"name": "equalize", "strength": 0.75}]


def yaml_methods(bench: Bench) -> Any:
    """The methods of the recipe in the output."""
    import yaml

    return yaml.safe_load((bench.out / "quantcli_recipe.yaml").read_text())["methods"]


REFUSALS = {
    "value": (
        "methods:\n  - {name: equalize, strength: 2}\n",
        "`strength`: input should be less than or equal to 1",
        "recipe.yaml:7",
        "docs/recipe.md",
    ),
    "option": (
        "methods:\n  - name: equalize\n    strenght: 0.5\n",
        "unknown key `strenght`",
        "recipe.yaml:8",
        "strength",
    ),
    "name": (
        "methods:\n  - equalise\n",
        "unknown method `equalise`",
        "recipe.yaml:7",
        "equalize",
    ),
    "of schemes": (
        "methods:\n  - smooth\n  - ranges\n",
        "unknown method `ranges`",
        "recipe.yaml:8",
        "`equalize`, `kv_cache`, `smooth`",
    ),
    "twice": (
        "methods:\n  - equalize\n  - {name: equalize, strength: 1}\n",
        "the method `equalize` is there twice",
        "recipe.yaml:8",
        "remove it here, or at",
    ),
    "block and list": (
        "smooth: {alpha: 0.5}\nmethods:\n  - smooth\n",
        "the method `smooth` is there twice",
        "recipe.yaml:8",
        "recipe.yaml:6",
    ),
    "no list": ("methods: []\n", "`methods`: must not be empty", "recipe.yaml:6", "docs/recipe.md"),
    "rule": (
        "methods:\n  - name: smooth\n    rules:\n      - {match: '*.dwn_proj', alpha: 1.0}\n",
        "`methods.0.rules.0` matches no quantized module",
        "recipe.yaml:9",
        "modules that read what is smoothed",
    ),
    "pattern": (
        "methods:\n  - name: smooth\n    rules:\n      - {match: 're:(', alpha: 1.0}\n",
        "`re:(` is not a regular expression",
        "recipe.yaml:9",
        "has no `re:`",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_wrong_options_are_refused(make: Callable[..., Bench], kind: str) -> None:
    block, what, where, fix = REFUSALS[kind]
    result = make(RECIPE + block).run("--plan")
    assert result.code == 2
    error, place, hint = result.later.splitlines()[:3]
    assert what in error
    assert where in place
    assert fix in hint
    assert "Traceback" not in result.err


def test_without_data(make: Callable[..., Bench]) -> None:
    result = make(DYNAMIC + "methods: [equalize]\n").run("--plan")
    assert result.code == 2
    assert "equalization needs calibration data, and the recipe names none" in result.err


class Stops(Progress):
    """Ctrl-C as soon as the second layer is done."""

    def layer(self, name: str, index: int, note: str = "") -> None:
        if index == 1:
            raise KeyboardInterrupt


def test_it_resumes_and_workers_change_nothing(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "BATCH_TOKENS", LENGTH)
    wanted = make()
    assert wanted.run("--workers", "1").code == 0
    bench = wanted.at("again")
    job = commands.plan(bench.recipe, model=str(bench.model), out=bench.out)
    with pytest.raises(KeyboardInterrupt):
        commands.quantize(job, Stops(), Resources(workers=2))
    assert "continues after 2 layers" in bench.run("--plan").out
    result = bench.run("--workers", "3")
    assert result.code == 0, result.err
    assert "layer 2/4" not in result.err
    assert snapshot(bench.store) == snapshot(wanted.store)
    assert snapshot(bench.out) == snapshot(wanted.out)


def test_options_and_order_decide_what_a_calibration_is_of(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench.calibrate().code == 0
    bench.edit_recipe(EQUALIZE.replace("0.75", "0.5"))
    assert "other edits: equalize.strength was 0.75, is 0.5" in bench.calibrate().err
    bench.edit_recipe(EQUALIZE + "  - {name: smooth, within: 1}\n")
    assert "other edits: methods differ" in bench.calibrate().err
    assert bench.calibrate("--fresh").code == 0
    report = bench.calibrate("--json").json
    assert len(report["equalized"]) == len(report["smoothed"]) == 4 * LAYERS
    bench.edit_recipe(RECIPE + "methods: [smooth, {name: equalize, strength: 0.75}]\n")
    assert "other edits: methods differ" in bench.calibrate().err


def test_the_block_smooth_is_the_method(make: Callable[..., Bench]) -> None:
    block = make(RECIPE + "smooth: {alpha: 0.6}\n")
    assert block.run().code == 0
    listed = block.at("listed")
    listed.edit_recipe(RECIPE + "methods: [{name: smooth, alpha: 0.6}]\n")
    assert listed.run().code == 0
    assert snapshot(listed.store) == snapshot(block.store)
    weights = "model-00001-of-00001.safetensors"
    assert (listed.out / weights).read_bytes() == (block.out / weights).read_bytes()


# what methods share in a layer


class Counting(Method):
    """Counts the tokens of one matrix. It has no name, so no recipe can have it."""

    def measure(self, work: LayerWork) -> Measurement:
        return Counts(work)


class Counts(Measurement, Looker):
    def __init__(self, work: LayerWork) -> None:
        self.work = work
        self.tokens: dict[int, int] = {}

    def observers(self) -> dict[Any, list[Looker]]:
        first, _ = next(self.work.layout.matrices())
        return {first: [self]}

    def update(self, x: torch.Tensor, batch: int) -> None:
        self.tokens[batch] = self.tokens.get(batch, 0) + len(x)

    def settle(self) -> None:
        self.work.report.results["counted"] = sum(self.tokens.values())


def test_observers_share_a_pass_and_edits_cost_one_load(
    make: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    run, loaded = Replay.run, Skeleton.loaded

    def spied_run(self: Replay, *rest: Any, **options: Any) -> None:
        calls.append("pass")
        run(self, *rest, **options)

    def spied_loaded(self: Skeleton, *rest: Any) -> Any:
        calls.append("load")
        return loaded(self, *rest)

    monkeypatch.setattr(Replay, "run", spied_run)
    monkeypatch.setattr(Skeleton, "loaded", spied_loaded)
    real = building.methods_of
    monkeypatch.setattr(building, "methods_of", lambda plan: (*real(plan), Counting()))
    bench = make(RECIPE)
    assert bench.calibrate().code == 0
    # a few tokens; then ranges, squares for clips, and counts together; the few tokens go on
    assert calls == (["load", "pass", "pass", "pass"] * LAYERS)[:-1]
    reports = [json.loads(path.read_text()) for path in sorted(bench.store.glob("layer-*.json"))]
    assert [report["counted"] for report in reports] == [TOKENS] * LAYERS
    calls.clear()
    equalized = bench.at("equalized")
    equalized.edit_recipe(EQUALIZE)
    assert equalized.calibrate().code == 0
    # this method looks at weights alone: the layer gives its outputs once before it is edited
    onward, last = ["load", "pass", "pass", "pass", "load", "pass"], ["load", "pass", "load", "pass"]
    assert calls == onward * (LAYERS - 1) + last
