"""Bad input on the command line: the documented exit code, one message, and nothing left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.builders import INDEX, make_model, tensor, write_safetensors
from tests.e2e.conftest import CONFIG, RECIPE, Box, Result, bf16, llama, make_llama, run_cli, snapshot

Arguments = list[object]
Setup = Callable[[Box], Arguments]


@dataclass(frozen=True)
class Case:
    """Something wrong, and what must be said about it."""

    setup: Setup
    what: str
    where: str | None = None
    fix: str | None = None
    code: int = 2


CASES: dict[str, Case] = {}


def case(name: str, what: str, where: str | None = None, fix: str | None = None, code: int = 2):
    def register(setup: Setup) -> Setup:
        assert name not in CASES
        CASES[name] = Case(setup, what, where, fix, code)
        return setup

    return register


# the model


@case("no config.json", "config.json", fix="fetch")
def _(box: Box) -> Arguments:
    (box.model / "config.json").unlink()
    return box.args()


@case("no model", "no such model directory", "missing")
def _(box: Box) -> Arguments:
    return [*box.args(), "--model", box.root / "missing"]


@case("model is a file", "directory", "recipe.yaml")
def _(box: Box) -> Arguments:
    return [*box.args(), "--model", box.recipe]


@case("model is not named", "no model to quantize", "recipe.yaml", "--model")
def _(box: Box) -> Arguments:
    return ["quantize", box.recipe, "--out", box.out]


@case("empty model", ".safetensors", fix="config.json")
def _(box: Box) -> Arguments:
    (box.root / "empty").mkdir()
    return [*box.args(), "--model", box.root / "empty"]


@case("pickles", "pickle", fix="safetensors")
def _(box: Box) -> Arguments:
    (box.model / "model.safetensors").rename(box.model / "pytorch_model.bin")
    return box.args()


def quantized_as(box: Box, config: dict[str, object], name: str, data: bytes) -> Arguments:
    """The model with one tensor of codes more, and what config.json says of them."""
    tensors = llama() | {name: ("U8", (len(data),), data)}
    shards = {"model.safetensors": tensors}
    make_model(box.model, shards, config=CONFIG | {"quantization_config": config})
    return box.args()


@case(
    "quantized by bitsandbytes",
    "already quantized: bitsandbytes, 1 module; this version decodes ascend, auto-round, awq",
    "x.weight.absmax` U8 [4]",
    "float",
)
def _(box: Box) -> Arguments:
    return quantized_as(box, {"quant_method": "bitsandbytes"}, "x.weight.absmax", bytes(4))


@case("quantized in two ways", "belongs to no weight", "x.weight_scale", "fetch the model again")
def _(box: Box) -> Arguments:
    return quantized_as(box, {"quant_method": "fp8"}, "x.weight_scale", bytes(4))


@case("truncated weights", "truncated", "model.safetensors")
def _(box: Box) -> Arguments:
    weights = box.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    return box.args()


@case("empty weights", "0 bytes", "model.safetensors")
def _(box: Box) -> Arguments:
    (box.model / "model.safetensors").write_bytes(b"")
    return box.args()


@case("garbage weights", "header length", "model.safetensors")
def _(box: Box) -> Arguments:
    (box.model / "model.safetensors").write_bytes(b"\xff" * 100)
    return box.args()


@case("missing shard", "is missing", fix="fetch")
def _(box: Box) -> Arguments:
    weight_map = dict.fromkeys(llama(), "model.safetensors")
    weight_map["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (box.model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return box.args()


@case("index leads out", "../model.safetensors", INDEX)
def _(box: Box) -> Arguments:
    (box.model / INDEX).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    return box.args()


@case("config twice", "stands twice", "config.json")
def _(box: Box) -> Arguments:
    (box.model / "config.json").write_text('{"dtype": "bfloat16", "dtype": "float16"}')
    return box.args()


@case("config is no JSON", "not valid JSON", "config.json")
def _(box: Box) -> Arguments:
    (box.model / "config.json").write_text("{")
    return box.args()


@case("config is a list", "JSON object", "config.json")
def _(box: Box) -> Arguments:
    (box.model / "config.json").write_text("[]")
    return box.args()


@case("same tensor in two files", "two", "model-2.safetensors")
def _(box: Box) -> Arguments:
    (box.model / "model.safetensors").rename(box.model / "model-1.safetensors")
    write_safetensors(
        box.model / "model-2.safetensors", {"model.embed_tokens.weight": tensor("BF16", 4, 2)}
    )
    return box.args()


@case("link out of the model", "link leads out", "secrets")
def _(box: Box) -> Arguments:
    (box.root / "secrets").write_text("hush")
    (box.model / "notes.txt").symlink_to(box.root / "secrets")
    return box.args()


@case("integers under a rule", "cannot quantize I32 [16, 16]", "model.x_proj.weight", "keep")
def _(box: Box) -> Arguments:
    write_safetensors(box.model / "model.safetensors", {"model.x_proj.weight": tensor("I32", 16, 16)})
    return box.args()


@case("siblings disagree", "q_proj", "recipe.yaml:3", "k_proj")
def _(box: Box) -> Arguments:
    box.edit_recipe("target: ascend\nrules:\n  - {match: '*.q_proj', scheme: w8a8_dynamic}\n")
    return box.args()


@case("embeddings under a rule", "embedding", "recipe.yaml:3", "keep")
def _(box: Box) -> Arguments:
    box.edit_recipe("target: ascend\nrules:\n  - {match: '*embed*', scheme: w8a8_dynamic}\n")
    return box.args()


# the recipe


def recipe_case(
    name: str, text: str | bytes, what: str, where: str, fix: str | None = None, code: int = 2
):
    def setup(box: Box) -> Arguments:
        box.recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
        return box.args()

    CASES[name] = Case(setup, what, where, fix, code)


RULE = "rules:\n  - match: '*_proj'\n    scheme: w8a8_dynamic\n"
recipe_case("empty recipe", "", "recipe is empty", "recipe.yaml:1", "`target` and `rules`")
recipe_case("comments only", "# nothing\n", "recipe is empty", "recipe.yaml:1")
recipe_case("list as recipe", "- a\n- b\n", "recipe is not a mapping", "recipe.yaml:1", "`target`")
recipe_case("binary recipe", bytes(range(256)), "recipe is not UTF-8 (byte 128)", "recipe.yaml", "text")
recipe_case("large recipe", "#" * 2**21, "recipe is over 262,144 bytes", "recipe.yaml", "text")
recipe_case("broken YAML", "target: [\n", "not valid YAML", "recipe.yaml:2")
recipe_case("tabs", "target:\n\tascend\n", "not valid YAML", "recipe.yaml:2")
recipe_case(
    "misspelt key", "tarqet: ascend\n" + RULE, "unknown key `tarqet`", "recipe.yaml:1", "`target`"
)
recipe_case("misspelt rule key", RECIPE + "    option: 1\n", "`rules.0.option`", ":5", "`optional`")
recipe_case("no rules", "target: ascend\n", "key `rules` is missing", "recipe.yaml:1", "`rules: ...`")
recipe_case("no target", RULE, "key `target` is missing", "recipe.yaml:1", "`target: ...`")
recipe_case("empty rules", "target: ascend\nrules: []\n", "`rules`: must not be empty", "recipe.yaml:2")
recipe_case(
    "key twice", "target: ascend\n" + RULE + "target: x\n", "`target` appears twice", ":5", ":1"
)
recipe_case("alias", "target: &a ascend\nmodel: *a\n" + RULE, "alias `*a`", "recipe.yaml:2", "quotes")
recipe_case("glob without quotes", "rules:\n  - match: *.q_proj\n", "not valid YAML", ":2", "quotes")
recipe_case("tag", "target: !!python/object/apply:os.system [id]\n" + RULE, "os.system` is not", ":1")
recipe_case("deep YAML", "a: " + "[" * 100_000, "nested too deeply", "recipe.yaml:1")
recipe_case("unknown target", "target: ascent\n" + RULE, "unknown target `ascent`", ":1", "`ascend`")
recipe_case(
    "unknown scheme",
    RECIPE.replace("w8a8_", "w8a8-"),
    "unknown scheme `w8a8-dynamic`",
    ":4",
    "`w8a8_dynamic`",
)
recipe_case(
    "unknown option",
    RECIPE.replace("w8a8_dynamic", "{name: w8a16, group: 3}"),
    "`group`",
    ":4",
    "no options",
)
recipe_case("bad regex", RECIPE.replace("*_proj", "re:(a"), "`re:(a` is not a regular", ":3", "glob")
recipe_case(
    "dead rule", RECIPE.replace("*_proj", "*.q_porj"), "`rules.0` matches no module", ":3", "q_proj`"
)
recipe_case(
    "shadowed rule",
    RECIPE + "  - match: '*.q_proj'\n    scheme: keep\n",
    "`rules.1` matches only modules that earlier rules take",
    ":5",
    ":3",
)
recipe_case("norms only", RECIPE.replace("*_proj", "*norm"), "no matrix", ":3", "BF16 [16]")
recipe_case(
    "expectation not met",
    RECIPE + "expect:\n  quantized_modules: '> 7'\n",
    "expected quantized_modules > 7; the plan has 7",
    "recipe.yaml:6",
    code=1,
)
recipe_case(
    "expectation is not a limit", RECIPE + "expect: {output_gib: much}\n", "expect.output_gib", ":5"
)
recipe_case(
    "size without its unit", RECIPE + "max_shard: 5\n", "write the unit, such as 5GB", "recipe.yaml:5"
)
recipe_case(
    "bad size", RECIPE + "max_shard: 5 boxes\n", "`max_shard`: expected a size", "recipe.yaml:5"
)


@case("no recipe", "the recipe does not exist", "missing.yaml", "path")
def _(box: Box) -> Arguments:
    return ["quantize", box.root / "missing.yaml", "--model", box.model, "--out", box.out]


@case("directory as recipe", "recipe is a directory", "folder", "file")
def _(box: Box) -> Arguments:
    (box.root / "folder").mkdir()
    return ["quantize", box.root / "folder", "--model", box.model, "--out", box.out]


def set_case(name: str, assignment: str, what: str, fix: str, code: int = 2):
    def setup(box: Box) -> Arguments:
        return box.args("--set", assignment)

    CASES[name] = Case(setup, what, f"--set {assignment}", fix, code)


set_case("set nonsense", "nonsense", "is not of the form KEY=VALUE", "--set target=ascend")
set_case("set nothing", "=1", "is not of the form KEY=VALUE", "--set target=ascend")
set_case("set no such key", "tarqet=ascend", "unknown key `tarqet`", "`target`")
set_case("set no such list", "rulez.0.scheme=keep", "no key `rulez` to set", "`rules`")
set_case("set no such item", "rules.9.scheme=keep", "the list has no item `9`", "0 to 0")
set_case("set a word as item", "rules.first.scheme=keep", "the list has no item `first`", "0 to 0")
set_case("set no such scheme", "rules.0.scheme=w8a18", "unknown scheme `w8a18`", "`w8a16`")
set_case("set no such target", "target=ascendd", "unknown target `ascendd`", "`ascend`")
set_case("set below text", "rules.0.scheme.name.x=1", "no key `name` to set", "`rules.0.scheme`")
set_case("set an alias", "target=[*a]", "not allowed", "quotes")
set_case("set a tag", "target=!!python/name:os.system", "YAML tag", "remove")
set_case(
    "set a size without its unit",
    "max_shard=5",
    "`max_shard`: a size of 5 bytes is below the smallest, 1KB: write the unit, such as 5GB",
    "docs/recipe.md",
)
set_case(
    "set an expectation",
    "expect.quantized_params_pct=>= 90",
    "quantized_params_pct >= 90; the plan has",
    "plan",
    1,
)


# the output


@case("out exists", "output directory exists", "out", "--force")
def _(box: Box) -> Arguments:
    (box.out / "deep").mkdir(parents=True)
    return box.args()


@case("out in the model", "inside the model directory", "model/out", "--out")
def _(box: Box) -> Arguments:
    return [*box.args("--force"), "--out", box.model / "out"]


@case("out in the model through a link", "inside the model directory", "link/out", "--out")
def _(box: Box) -> Arguments:
    (box.root / "link").symlink_to(box.model)
    return [*box.args("--force"), "--out", box.root / "link" / "out"]


@case("model in out", "contains the model", None, "--out")
def _(box: Box) -> Arguments:
    return [*box.args("--force"), "--out", box.root]


@case("out is the model", "is the model directory", "model", "--out")
def _(box: Box) -> Arguments:
    return [*box.args("--force"), "--out", box.model]


@case("out is here", "contains the current directory", ".", "--out")
def _(box: Box) -> Arguments:
    return [*box.args("--force"), "--out", "."]


@case("out is home", "contains your home", "home", "--out")
def _(box: Box) -> Arguments:
    return [*box.args("--force"), "--out", box.root / "home"]


@case("out has no name", "name of its own", "..", "--out")
def _(box: Box) -> Arguments:
    (box.root / "a" / "b").mkdir(parents=True)
    return [*box.args("--force"), "--out", box.root / "a" / "b" / ".."]


@case("out is a file", "not a directory", "out", "remove")
def _(box: Box) -> Arguments:
    box.out.write_text("mine")
    return box.args("--force")


@case("out is a link", "not a directory", "out", "remove")
def _(box: Box) -> Arguments:
    (box.root / "elsewhere").mkdir()
    box.out.symlink_to(box.root / "elsewhere")
    return box.args("--force")


@case("out is a broken link", "not a directory", "out", "remove")
def _(box: Box) -> Arguments:
    box.out.symlink_to(box.root / "nowhere")
    return box.args("--force")


@case("out is a link to itself", "circle", "out", "--out")
def _(box: Box) -> Arguments:
    box.out.symlink_to(box.out)
    return box.args()


@case("out below a file", "not a directory", "recipe.yaml", "--out")
def _(box: Box) -> Arguments:
    return [*box.args(), "--out", box.recipe / "deep" / "out"]


@case("out below a broken link", "not a directory", "broken", "--out")
def _(box: Box) -> Arguments:
    (box.root / "broken").symlink_to(box.root / "nowhere")
    return [*box.args(), "--out", box.root / "broken" / "out"]


@case("out where nothing can be written", "stores no files", "/proc", "--out", code=3)
def _(box: Box) -> Arguments:
    return [*box.args(), "--out", "/proc/out"]


@case("name too long", "name is too long", "xxx", "--out")
def _(box: Box) -> Arguments:
    return [*box.args(), "--out", box.root / ("x" * 256)]


@case("name too long with .partial", "name is too long", "xxx", "--out")
def _(box: Box) -> Arguments:
    return [*box.args(), "--out", box.root / ("x" * 250)]


@case("partial is not ours", "no journal", "out.partial", "move it away")
def _(box: Box) -> Arguments:
    box.partial.mkdir()
    (box.partial / "thesis.tex").write_text("years of work")
    return box.args()


@case("partial is not ours, fresh", "no journal", "out.partial", "move it away")
def _(box: Box) -> Arguments:
    box.partial.mkdir()
    (box.partial / "thesis.tex").write_text("years of work")
    return box.args("--fresh")


@case("partial is a file", "not a directory", "out.partial", "move it away")
def _(box: Box) -> Arguments:
    box.partial.write_text("mine")
    return box.args("--fresh")


@case("partial is a broken link", "not a directory", "out.partial", "move it away")
def _(box: Box) -> Arguments:
    box.partial.symlink_to(box.root / "nowhere")
    return box.args()


@case("partial of another plan", "recipe or version has changed", "out.partial", "--fresh")
def _(box: Box) -> Arguments:
    box.partial.mkdir()
    head = json.dumps({"plan": "another", "checksum": True, "source": source_of(box)})
    (box.partial / ".quantcli_journal").write_text(f"{head}\n")
    return box.args()


def source_of(box: Box) -> dict[str, list[int]]:
    status = (box.model / "model.safetensors").stat()
    return {"model.safetensors": [status.st_size, status.st_mtime_ns]}


# the command line


def words_case(name: str, *words: str, what: str, fix: str = "--help"):
    CASES[name] = Case(lambda box: [*box.args(), *words], what, None, fix)


words_case("no workers", "--workers", "0", what="--workers")
words_case("workers in words", "--workers", "abc", what="--workers")
words_case("too many workers", "--workers", "100000", what="--workers")
words_case("unknown option", "--worker", "2", what="no such option: --worker")
words_case("too many arguments", "another.yaml", what="another.yaml")
CASES["no such command"] = Case(lambda box: ["quantise"], "quantise", None, "--help")
CASES["no argument"] = Case(lambda box: ["quantize"], "recipe", None, "--help")


def check_message(result: Result, expected: Case, name: str) -> None:
    """One message in three lines: what, where, how to fix it."""
    assert result.code == expected.code, result
    assert "Traceback" not in result.err
    lines = result.later.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, result.err
    assert lines[0].startswith("error: "), result.err
    said = dict.fromkeys(("what", "where", "fix"), "")
    said["what"] = lines[0]
    for line in lines[1:]:
        if line.startswith("  --> "):
            said["where"] = line
        elif line.startswith("  fix: "):
            said["fix"] = line
        else:
            raise AssertionError(f"{name}: another line: {line}")
    for part in ("what", "where", "fix"):
        wanted = getattr(expected, part)
        assert wanted is None or wanted in said[part], (part, wanted, result.err)
    assert said["where"] or said["fix"], result.err
    assert not lines[0].endswith(".")


@pytest.mark.parametrize("name", CASES)
def test_refused(box: Box, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (box.root / "home" / "here").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(box.root / "home"))
    expected = CASES[name]
    arguments = expected.setup(box)
    before = snapshot(box.root)
    result = run_cli(*arguments)
    check_message(result, expected, name)
    # a plan that misses an expectation is shown, so that one can see why
    assert result.out.startswith("weights ") if expected.code == 1 else result.out == ""
    again = run_cli(*arguments, "--json")
    check_message(again, expected, name)
    error = again.json
    assert (error["ok"], error["exit_code"]) == (False, expected.code)
    assert set(error["error"]) == {"what", "where", "fix"}
    assert error["error"]["what"] == result.later.splitlines()[0].removeprefix("error: ")
    planned = run_cli(*arguments, "--plan")  # the plan is refused exactly as the run is
    if name != "no such command":
        assert (planned.code, planned.err) == (result.code, result.err)
    assert snapshot(box.root) == before, "something was left behind"


def test_option_without_a_value(box: Box) -> None:
    result = run_cli("quantize", box.recipe, "--json", "--set")
    assert result.code == 2
    assert result.err.startswith("error: option '--set' requires an argument\n")
    assert result.json["exit_code"] == 2


def test_no_arguments_are_a_question() -> None:
    result = run_cli()
    assert result.code == 0
    assert result.out.startswith("Usage: quantcli ")
    assert "Exit codes: 0 done, 1 the answer is no" in result.out


def test_there_are_many() -> None:
    assert len(CASES) >= 80


# accepted, and what only the weights show


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--set", "rules.0.match=*_proj"),
        ("--set", "rules.0.match=re:.*_(q|k|v|o|up|down|gate)_proj|.*proj"),
        ("--set", "expect.quantized_params_pct=>= 80"),
        ("--set", "max_shard=1KiB", "--no-checksum"),
        ("--workers", "1024"),
        ("--fresh",),
        ("--force",),
    ],
)
def test_plan_accepts_what_runs(box: Box, more: tuple[str, ...]) -> None:
    before = snapshot(box.root)
    planned = box.run(*more, "--plan", "--json")
    assert planned.code == 0, planned.err
    assert snapshot(box.root) == before
    done = box.run(*more, "--json")
    assert done.code == 0, done.err
    assert done.json["plan"]["digest"] == planned.json["plan"]["digest"]
    written = {path.name: path.stat().st_size for path in box.out.iterdir()}
    assert written == {name: entry["bytes"] for name, entry in done.json["files"].items()} | {
        "quantcli_manifest.json": written["quantcli_manifest.json"]
    }
    shards = {shard["file"]: shard["bytes"] for shard in planned.json["plan"]["shards"]}
    assert shards == {name: size for name, size in written.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w8a16", "fp8_dynamic"])
def test_weights_that_are_no_numbers(box: Box, value: float, scheme: str) -> None:
    tensors = llama()
    name = "model.layers.0.mlp.down_proj.weight"
    weights = np.zeros((16, 32), "f4")
    weights[11, 29] = value
    tensors[name] = ("BF16", (16, 32), bf16(weights))
    write_safetensors(box.model / "model.safetensors", tensors)
    (box.out / "old").mkdir(parents=True)
    before = snapshot(box.out)
    arguments = ("--force", "--set", f"rules.0.scheme={scheme}")
    assert box.run(*arguments, "--plan").code == 0  # headers do not show it
    for _ in range(2):  # resuming does not make it good
        result = box.run(*arguments, "--quiet")
        assert result.code == 2
        assert result.err.count("error: ") == 1
        assert result.err.startswith(
            f"error: weight is {value}\n  --> `{name}`[11, 29] in model.safetensors\n"
        )
        assert "  fix: " in result.err
        assert "Traceback" not in result.err
        assert snapshot(box.out) == before
    failed = box.run(*arguments, "--json")
    assert failed.json["error"]["where"].startswith(f"`{name}`[11, 29]")
    write_safetensors(box.model / "model.safetensors", llama(seed=1))
    assert box.run(*arguments).code == 2  # another model now
    assert snapshot(box.out) == before
    assert box.run(*arguments, "--fresh").code == 0
    assert "old" not in snapshot(box.out)


def test_float_weights_may_hold_anything(box: Box) -> None:
    """What is copied is copied, NaN or not."""
    tensors = llama()
    norm = np.full(16, np.nan, "f4")
    tensors["model.layers.0.input_layernorm.weight"] = ("BF16", (16,), bf16(norm))
    write_safetensors(box.model / "model.safetensors", tensors)
    assert box.run().code == 0


def test_float16_scale_that_overflows(box: Box) -> None:
    weights = np.full((16, 16), 3e38, "<f4")
    config = CONFIG | {"torch_dtype": "float16"}
    shards = {"model.safetensors": {"model.x_proj.weight": ("F32", (16, 16), weights.tobytes())}}
    make_model(box.root / "wide", shards, config=config)
    result = run_cli(*box.args("--model", box.root / "wide"))
    assert result.code == 2
    assert "overflows F16" in result.err
    assert "model.x_proj.weight" in result.err
    assert not box.out.exists()


def test_error_survives_a_hostile_name(box: Box) -> None:
    """Nothing that came from outside reaches the terminal as an escape code."""
    evil = box.root / "\x1b[31mred\x07"
    result = run_cli(*box.args("--model", evil))
    assert result.code == 2
    assert "\x1b" not in result.err
    assert "red" in result.err


def test_out_in_bytes_that_are_no_text(box: Box) -> None:
    out = Path(os.fsdecode(os.fsencode(box.root) + b"/out\xff"))
    result = run_cli(*box.args("--json"), "--out", out)
    assert result.code == 0, result.err
    assert (out / "config.json").exists()


def test_no_tokenizer_no_problem(box: Box) -> None:
    (box.model / "tokenizer.json").unlink()
    assert box.run().code == 0


def test_default_output_is_named_after_model_and_recipe(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    (box.root / "here").mkdir()
    monkeypatch.chdir(box.root / "here")
    assert run_cli("quantize", box.recipe, "--model", make_llama(box.root / "Llama-1B")).code == 0
    assert (box.root / "here" / "Llama-1B-recipe" / "config.json").exists()
    for named in (".", box.root / "Llama-1B" / "."):
        monkeypatch.chdir(box.root / "Llama-1B")
        planned = run_cli("quantize", box.recipe, "--model", named, "--plan", "--json")
        assert planned.code == 2  # it would be inside the model
        assert "inside the model" in planned.err
        assert "Llama-1B-recipe" in planned.err


def test_recipe_names_model_and_output(box: Box) -> None:
    box.edit_recipe(f"model: {box.model}\noutput: {box.root}/named\n{RECIPE}")
    assert run_cli("quantize", box.recipe).code == 0
    assert (box.root / "named" / "config.json").exists()
    assert run_cli("quantize", box.recipe, "--out", box.out).code == 0
    assert snapshot(box.out) == snapshot(box.root / "named")
