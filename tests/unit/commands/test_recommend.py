"""Recommendations: devices by name, memory by hand, the order of recipes, `auto`."""

from __future__ import annotations

import json
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

import quantcli
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands.choosing.caches import cache_sizes
from quantcli.commands.choosing.devices import NATIVE, known_devices, parse_device
from quantcli.commands.choosing.options import Serving, parse_tokens
from quantcli.commands.choosing.ranking import Candidate, Room, costs, labels_of
from quantcli.commands.choosing.weights import Model, unquantized_nbytes, weight_nbytes
from quantcli.commands.recommend import choose
from quantcli.core.errors import AnswerNo, InputError
from quantcli.core.events import Progress
from quantcli.planning.plan import Plan
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
from quantcli.recipe.shipped import shipped_recipes
from quantcli.sources.decode import decoded
from tests.builders import make_model, tensor
from tests.hub_server import used

TINY = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
# of the bundled model
LAYERS, HIDDEN, KEYS, WIDTH, VOCABULARY = 6, 256, 128, 768, 4096
LINEARS = {"q": (HIDDEN, HIDDEN), "k": (KEYS, HIDDEN), "v": (KEYS, HIDDEN), "o": (HIDDEN, HIDDEN),
           "gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}  # fmt: skip
ROWS = ("o", "down")  # whose inputs are shared
NORMS = 2 * (LAYERS * (2 * HIDDEN + 2 * 32) + HIDDEN)  # bytes
TABLES = 2 * 2 * VOCABULARY * HIDDEN  # bytes of embeddings and head


def headers(folder: Path, shapes: dict[str, tuple[int, ...]], **config: Any) -> Path:
    """A model of zeros in bfloat16."""
    tensors = {name: tensor("BF16", *shape) for name, shape in shapes.items()}
    usual = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16,
             "num_key_value_heads": 2, "vocab_size": 64, "torch_dtype": "bfloat16",
             "max_position_embeddings": 4096}  # fmt: skip
    return make_model(folder, {"model.safetensors": tensors}, config=usual | config)


def attention(layer: int) -> dict[str, tuple[int, ...]]:
    name = f"model.layers.{layer}.self_attn"
    sides = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    return {f"{name}.{module}.weight": shape for module, shape in sides.items()}


def mixture(folder: Path, *, stacked: bool) -> Path:
    """Two layers of six experts each."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 64)}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp"
        shapes |= attention(layer) | {f"{block}.gate.weight": (6, 64)}
        if stacked:
            experts = {"experts.gate_up_proj": (6, 64, 64), "experts.down_proj": (6, 64, 32)}
        else:
            sides = {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}
            experts = {f"experts.{e}.{m}.weight": s for e in range(6) for m, s in sides.items()}
        shapes |= {f"{block}.{name}": shape for name, shape in experts.items()}
    kind = "qwen3_5_moe_text" if stacked else "qwen3_moe"
    return headers(folder, shapes, model_type=kind, num_experts=6, moe_intermediate_size=32)


def model_of(folder: Path) -> Model:
    return Model.of(decoded(open_checkpoint(folder)))


def plan_of(recipe: str, model: Model) -> Plan:
    return make_plan(load_recipe(shipped_recipes()[recipe]), model.checkpoint)


@pytest.fixture(scope="module")
def tiny() -> Model:
    return model_of(TINY)


@pytest.fixture(scope="module")
def ampere() -> Any:
    return quantcli.recommend(TINY, "3xA100")


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "count", "gb"),
    [
        ("2x910B", "Ascend 910B", 2, 64),
        ("ascend-910b4", "Ascend 910B4", 1, 32),
        ("Atlas 800I A2", "Ascend 910B", 1, 64),
        ("4090", "RTX 4090", 1, 24),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 1, 24),
        ("8 x H100:94GB", "H100", 8, 94),
        ("A100-40", "A100-40", 1, 40),
        ("cpu:64GB", "cpu", 1, 64),
        ("2x48GB-ada", "48GB-ada", 2, 48),
    ],
)
def test_a_device_by_name(text, name, count, gb):
    device = parse_device(text)
    assert (device.name, device.count, device.nbytes) == (name, count, gb * 10**9)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("0xH100", "number of devices"),
        ("9999x4090", "number of devices"),
        ("4900", "no device `4900`"),
        ("48GB-foo", "no kind of device `foo`"),
        ("H100:many", "memory"),
        ("H100:1:2", "is not a device"),
        ("", "is not a device"),
    ],
)
def test_what_is_no_device(text, what):
    with pytest.raises(InputError, match=what) as caught:
        parse_device(text)
    assert text in str(caught.value.where)
    if text == "4900":
        assert "RTX 4090" in caught.value.fix


def test_every_recipe_has_a_device_and_every_format_a_label():
    """Data that lags behind targets or recipes shows here."""
    devices = [parse_device(f"{entry['name']}:8GB") for entry in known_devices()]
    places = {place for device in devices for place in (*device.formats, *device.experts)}
    cells = [
        (cell["target"], cell["label"]) for cell in quantcli.support().support if cell["supported"]
    ]
    labels = {*cells, ("compressed-tensors", "int4 g128 W4A16 asymmetric"),
              ("compressed-tensors", "int4 channel W4A8"), ("gptq", "int8 channel W8A16")}  # fmt: skip
    unknown = {p for p in places if not any(p[0] == t and fnmatchcase(la, p[1]) for t, la in labels)}
    assert not unknown
    for name in shipped_recipes():
        recipe = load_recipe(shipped_recipes()[name])
        places = [(recipe.target.name, label) for label in labels_of(recipe)]
        assert places
        kernels = (
            d.kernel(*place, expert=e) for d in devices for e in (False, True) for place in places
        )
        assert any(kernels), (name, places)


def test_kernels_follow_the_hardware():
    int8, fp8 = (
        ("compressed-tensors", "int8 W8A8 dynamic"),
        ("compressed-tensors", "fp8 channel dynamic"),
    )
    assert parse_device("A100").kernel(*int8) == NATIVE
    assert parse_device("A100").kernel(*fp8) == "inputs stay float"
    assert parse_device("H100").kernel(*fp8) == NATIVE
    assert parse_device("B200").kernel(*int8) is None
    assert parse_device("910B").kernel("ascend", "W8A8FP8_DYNAMIC") is None
    assert parse_device("A5").kernel("ascend", "W8A8FP8_DYNAMIC") == NATIVE
    assert parse_device("cpu:8GB").kernel(*int8, expert=True) is None
    assert parse_device("cpu-amx:8GB").kernel(*int8, expert=True) == NATIVE


@pytest.mark.parametrize(
    ("text", "tokens"), [("32k", 32768), ("32K", 32768), ("8192", 8192), ("1M", 2**20)]
)
def test_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["0", "-1", "1e30", "many", "99999999999", "0.1"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(InputError, match="number of tokens"):
        parse_tokens(text)


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["vllm_int8_dynamic", "w8a8_static", "gptq_int4", "w4a4_flatquant"])
def test_one_device_has_the_bytes_of_the_plan(tiny, recipe):
    plan = plan_of(recipe, tiny)
    assert weight_nbytes(tiny, plan, 1) == plan.weight_nbytes


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("recipe", ["w8a8_moe_dynamic", "w4a8_moe", "vllm_w4a16"])
def test_experts_that_are_alike_count_as_all(tmp_path, recipe, stacked):
    model = model_of(mixture(tmp_path / "model", stacked=stacked))
    assert set(model.times.values()) == {6}
    whole = make_plan(load_recipe(shipped_recipes()[recipe]), model.whole)
    plan = plan_of(recipe, model)
    assert plan.quantized_modules < whole.quantized_modules
    assert weight_nbytes(model, plan, 1) == whole.weight_nbytes
    assert unquantized_nbytes(model, 1) == model.whole.nbytes


def test_experts_that_differ_are_all_planned(tmp_path):
    shapes = attention(0) | {"model.layers.0.mlp.gate.weight": (2, 64)}
    shapes |= {f"model.layers.0.mlp.experts.{e}.down_proj.weight": (64, 32 * (e + 1)) for e in range(2)}
    model = model_of(
        headers(tmp_path / "model", shapes, model_type="qwen3_moe", num_experts=2, num_hidden_layers=1)
    )
    assert model.times == {}
    assert unquantized_nbytes(model, 1) == model.whole.nbytes


@pytest.mark.parametrize("devices", [2, 8])
def test_float_weights_of_a_device_by_hand(tiny, devices):
    """Devices share tables and linears, keys and values over four heads at most; norms they do not."""
    shared = {"k": min(devices, 4), "v": min(devices, 4)}
    linears = sum(2 * n * k // shared.get(name, devices) for name, (n, k) in LINEARS.items())
    assert unquantized_nbytes(tiny, devices) == TABLES // devices + LAYERS * linears + NORMS


def test_int8_weights_of_a_device_by_hand(tiny):
    """Scales of rows are shared with the rows; those of o_proj and down_proj are on both devices."""
    scales = {name: n if name in ROWS else n // 2 for name, (n, _) in LINEARS.items()}
    linears = sum(n * k // 2 + 4 * scales[name] for name, (n, k) in LINEARS.items())
    found = weight_nbytes(tiny, plan_of("vllm_int8_dynamic", tiny), 2)
    assert found == TABLES // 2 + LAYERS * linears + NORMS


def test_groups_of_a_device_by_hand(tiny):
    """Two devices together have all once, but for norms and the group numbers of whole inputs."""
    plan = plan_of("gptq_int4", tiny)
    twice = sum(4 * k for name, (_, k) in LINEARS.items() if name not in ROWS)
    both = 2 * weight_nbytes(tiny, plan, 2)
    assert both - plan.weight_nbytes == NORMS + LAYERS * twice


# -- the cache -------------------------------------------------------------------------------------


def test_a_plain_cache_by_hand(tiny):
    sizes = cache_sizes(tiny.whole, tiny.roles)
    token = LAYERS * 2 * KEYS * 2
    assert sizes.nbytes(1000, 3, 1, 2) == 3000 * token
    assert sizes.nbytes(1000, 3, 2, 1) == 3000 * token // 4
    assert sizes.nbytes(1000, 3, 8, 2) == 3000 * token // 4  # a head at least
    assert sizes.longest(3000 * token + 5, 3, 1, 2, 10**6) == 1000
    assert sizes.longest(10**12, 3, 1, 2, 2048) == 2048


def sizes_of(folder: Path) -> Any:
    model = model_of(folder)
    return cache_sizes(model.whole, model.roles)


def test_a_window_bounds_the_cache_of_its_layers(tmp_path):
    shapes = attention(0) | attention(1) | {"model.embed_tokens.weight": (64, 64)}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 100}
    folder = headers(tmp_path / "model", shapes, model_type="qwen3", **kinds)
    assert sizes_of(folder).nbytes(1000, 1, 1, 2) == (100 + 1000) * 2 * 32 * 2


def test_latents_are_on_every_device(tmp_path):
    name = "model.layers.0.self_attn"
    shapes = {
        f"{name}.{module}.weight": shape
        for module, shape in {
            "q_proj": (4 * 24, 64),
            "kv_a_proj_with_mqa": (32 + 8, 64),
            "kv_b_proj": (4 * 32, 32),
            "o_proj": (64, 64),
        }.items()
    }
    latent = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    folder = headers(
        tmp_path / "model", shapes, model_type="deepseek_v3", **latent | {"num_hidden_layers": 1}
    )
    sizes = sizes_of(folder)
    assert sizes.nbytes(10, 1, 1, 2) == sizes.nbytes(10, 1, 4, 2) == 10 * (32 + 8) * 2


def test_recurrent_layers_keep_a_state_whatever_the_context(tmp_path):
    linear = "model.layers.0.linear_attn"
    shapes = attention(1) | {
        f"{linear}.in_proj_qkvz.weight": (128, 64),
        f"{linear}.conv1d.weight": (96, 1, 4),
        f"{linear}.out_proj.weight": (64, 32),
    }
    keys = {"linear_num_value_heads": 2, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
            "linear_key_head_dim": 16, "linear_conv_kernel_dim": 4}  # fmt: skip
    sizes = sizes_of(headers(tmp_path / "model", shapes, model_type="qwen3_next", **keys))
    state = 4 * (2 * 16 * 16 + 3 * (2 * 16 + 2 * 2 * 16))
    assert sizes.nbytes(10, 2, 1, 2) == 2 * (state + 10 * 2 * 32 * 2)
    unknown = sizes_of(headers(tmp_path / "other", shapes, model_type="qwen3_next"))
    assert unknown.state == 0
    assert "recurrent" in unknown.notes[0]


# -- the order -------------------------------------------------------------------------------------


def candidate(recipe: str, **changes: Any) -> Candidate:
    room = Room(
        devices=1, weights=10, cache=5, reserve=1, usable=changes.pop("usable", 20), max_context=9
    )
    usual = Candidate(recipe, "fp8", room, NATIVE, (8, 8), needs_data=False, mean_change=0.02)
    return replace(usual, **changes)


def test_the_order_of_recipes():
    in_order = [
        candidate("own", own=True, mean_change=0.03),
        candidate("near", mean_change=0.01),
        candidate("far"),
        candidate("unmeasured", mean_change=None),
        candidate("float inputs", bits=(8, 16), mean_change=0.001),
        candidate("not as stored", bits=(8, 16), mean_change=0.001, kernels="inputs stay float"),
        candidate("four", bits=(4, 16), mean_change=0.001),
        candidate("four and four", bits=(4, 4), mean_change=0.001),
        candidate("too large", usable=15, mean_change=0.001),
    ]
    assert sorted({*in_order}, key=lambda each: each.order) == in_order


def test_costs_are_of_all_recipes_and_only_those():
    changes = costs()["mean_change"]
    assert set(changes) == set(shipped_recipes())
    refused = {name for name, change in changes.items() if change is None}
    assert refused == {name for name in shipped_recipes() if name.endswith("_moe")} | {
        "w8a8_moe_dynamic"
    }
    assert all(0 < change < 1 for change in changes.values() if change is not None)
    assert changes["vllm_int8_dynamic_smooth"] < changes["vllm_int8_dynamic"] < changes["vllm_w4a16"]


def test_a_recommendation(ampere):
    first = ampere.recipes[0]
    assert ampere.best == first["recipe"] == "vllm_int8_dynamic_smooth"
    assert ampere.best_without_data == "vllm_int8_dynamic"
    assert (first["devices"], ampere.device["count"]) == (2, 3)
    assert any("8 attention heads cannot be split over 3" in note for note in ampere.notes)
    assert "calibration.data=TEXT.jsonl" in first["command"]
    assert (ampere.context, ampere.positions, ampere.concurrency) == (2048, 2048, 8)
    assert first["cache_bytes"] == 8 * 2048 * LAYERS * 2 * KEYS * 2 // 2
    ranks = {row["recipe"]: row["rank"] for row in ampere.recipes}
    assert ranks["gptq_int8"] == 1
    assert 1 < ranks["vllm_int8_dynamic"] < ranks["vllm_w4a16"] == ranks["gptq_int4"]
    left_out = {row["recipe"]: row["why"] for row in ampere.left_out}
    assert "no kernel for W8A8_DYNAMIC" in left_out["w8a8_dynamic"]
    assert left_out.keys() | {row["recipe"] for row in ampere.recipes} == set(shipped_recipes())
    kernels = {row["recipe"]: row["kernels"] for row in ampere.recipes}
    assert kernels["vllm_fp8_dynamic"] == "inputs stay float"
    assert json.loads(json.dumps(ampere.to_dict()))["recipes"] == ampere.recipes


def test_the_longest_context_is_the_longest(ampere):
    """What is said to fit fits, and one token more does not."""
    usable = 0.9 * 1.2e9
    found = quantcli.recommend(TINY, "A100:1.2GB", context="1M")
    assert found.best is None
    assert any("was made for 2,048 tokens" in note for note in found.notes)
    longest = found.recipes[0]["max_context"]
    row = next(r for r in found.recipes if r["recipe"] == "gptq_int8")
    token = row["cache_bytes"] / 2**20
    room = usable - row["weights_bytes"] - row["reserve_bytes"]
    assert row["max_context"] == room // token
    assert f"--context {max(r['max_context'] for r in found.recipes)}" in found.advice
    again = quantcli.recommend(TINY, "A100:1.2GB", context=longest)
    assert again.recipes[0]["fits"]


def test_a_chip_with_options_of_its_own():
    found = quantcli.recommend(TINY, "310P")
    commands = {row["recipe"]: row["command"] for row in found.recipes}
    assert set(commands) == {"w8a8_dynamic", "w8a8_dynamic_smooth", "w8a8_static", "w8a8_static_smooth"}
    assert "--set 'target={name: ascend, device: 310P}'" in commands["w8a8_dynamic"]


def test_headers_of_the_hub_are_enough(tmp_path):
    served = tmp_path / "served" / "org" / "name"
    mixture(served, stacked=False)
    with used(tmp_path / "served", tmp_path / "cache") as hub:
        found = quantcli.recommend("org/name", "910B")
        assert hub.fetched()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    here = quantcli.recommend(served, "910B")
    sizes = [(row["recipe"], row["weights_bytes"], row["cache_bytes"]) for row in found.recipes]
    assert sizes == [(row["recipe"], row["weights_bytes"], row["cache_bytes"]) for row in here.recipes]
    assert "--model org/name" in found.recipes[0]["command"]


def test_a_quantized_model_is_decoded(tmp_path, ampere):
    out = tmp_path / "out"
    quantcli.quantize("vllm_int8_dynamic", model=TINY, out=out)
    found = quantcli.recommend(out, "A100")
    assert any("quantized already (compressed-tensors" in note for note in found.notes)
    assert found.unquantized["weights_bytes"] == TABLES + NORMS + LAYERS * sum(
        2 * n * k for n, k in LINEARS.values()
    )
    assert {row["recipe"] for row in found.recipes} == {row["recipe"] for row in ampere.recipes}


def test_a_thousand_devices_share_what_can_be_shared():
    assert quantcli.recommend(TINY, "1000xA100").unquantized["devices"] == 8


def test_a_model_without_layers_is_refused(tmp_path):
    folder = make_model(tmp_path / "model", config={"_class_name": "UNet2DConditionModel"})
    with pytest.raises(InputError, match="not a language model"):
        quantcli.recommend(folder, "H100")


@pytest.mark.parametrize("option", ["context", "concurrency"])
def test_options_out_of_range(option):
    with pytest.raises(InputError, match="must be"):
        quantcli.recommend(TINY, "H100", **{option: 0})
    with pytest.raises(InputError, match="must be from 1"):
        Serving(parse_device("H100"), concurrency=10**9)


# -- auto ------------------------------------------------------------------------------------------


class Heard(Progress):
    """Keeps messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, text: str) -> None:
        self.messages.append(text)


def test_auto_takes_the_first_that_can_run():
    heard = Heard()
    chosen = choose("auto", str(TINY), "A100", progress=heard)
    assert chosen.recipe == "vllm_int8_dynamic"
    assert any("`vllm_int8_dynamic` for A100-80" in text for text in heard.messages)
    assert any("`vllm_int8_dynamic_smooth` comes first" in text for text in heard.messages)
    text = ("calibration.data=x.txt",)
    assert choose("auto", str(TINY), "A100", text) == ("vllm_int8_dynamic_smooth", text)


def test_auto_and_its_device_need_each_other():
    with pytest.raises(InputError, match="needs --for"):
        choose("auto", str(TINY), None)
    with pytest.raises(InputError, match="only with `auto`"):
        choose("w8a8_dynamic", str(TINY), "A100")
    with pytest.raises(AnswerNo, match="no recipe fits"):
        choose("auto", str(TINY), "A100:1GB")
    with pytest.raises(InputError, match="only `quantize` takes it"):
        quantcli.calibrate("auto", model=TINY)
