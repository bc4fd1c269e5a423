"""Checkpoints for other engines, planned: what is refused, and which tensors go where."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.files import MANIFEST
from quantcli.checkpoint.manifest import encode_manifest
from quantcli.core.errors import InputError
from quantcli.core.registry import discover
from quantcli.planning.plan import CacheScale, Copy, PlannedCache, Repack
from quantcli.planning.recode import recode
from quantcli.planning.repack import Repacking, _cache_of, _modules, plan_repacking
from quantcli.targets.base import Target, target_of
from tests.builders import Tensor, make_model, tensor
from tests.quantized import awq, flatquant, int8_rows, np, packed_int4
from tests.quantized import f32 as f32_of
from tests.unit.planning.test_recode import INT4, INT8, config_of

LAYER = "model.layers.0"


def f32(values: Any) -> Tensor:
    return f32_of(np.array(values, "f4"))


UP = f"{LAYER}.mlp.up_proj"
FP8 = INT8 | {"type": "float", "strategy": "tensor"}
SCALES = {f"{LAYER}.self_attn.{side}_scale": f32([0.5]) for side in "kv"}
DYNAMIC = INT8 | {"strategy": "token", "dynamic": True}
CT = "compressed-tensors"


def repacked(folder: Path, target: str, shards: Any, config: Any, description: Any = None) -> Repacking:
    files = {"quant_model_description.json": json.dumps(description)} if description else {}
    shards = shards if "model.safetensors" in shards else {"model.safetensors": shards}
    make_model(folder, shards, config={"num_hidden_layers": 1, **config}, files=files)
    return plan_repacking(open_checkpoint(folder), discover(Target)[target]())


def ascend(label: str, tensors: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    return {"model_quant_type": label, "version": "1.0.0", **dict.fromkeys(tensors, label), **more}


def attention() -> dict[str, Tensor]:
    """fp8 with static inputs, of one attention."""
    tensors = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        module = f"{LAYER}.self_attn.{name}"
        tensors[f"{module}.weight"] = tensor("F8_E4M3", 32, 32)
        tensors |= {f"{module}.{part}": f32([0.25]) for part in ("weight_scale", "input_scale")}
    return tensors


def with_cache(config: dict[str, Any], scheme: Any) -> dict[str, Any]:
    settings = config["quantization_config"] | {"kv_cache_scheme": scheme}
    heads = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return config | heads | {"quantization_config": settings}


CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def test_a_float_model_has_no_codes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this is a float model: there are no codes to pack") as caught:
        repacked(tmp_path, "ascend", {f"{UP}.weight": tensor("BF16", 4, 4)}, {})
    assert caught.value.fix == "`quantcli quantize` makes an ascend checkpoint of it"


def test_a_format_that_is_decoded_alone(tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    tensors = awq(UP, 64, 32)[0]
    with pytest.raises(InputError, match="no format that can be packed: awq") as caught:
        repacked(tmp_path, "ascend", tensors, {"quantization_config": settings})
    assert f"{UP}.qweight" in str(caught.value.where)


def test_a_transform_has_one_format(tmp_path: Path) -> None:
    tensors = flatquant(UP, 64, 8, 8)[0]
    label = "W4A4_FLATQUANT_DYNAMIC"
    with pytest.raises(InputError, match=f"{label} exists in ascend alone") as caught:
        repacked(tmp_path, CT, tensors, {"torch_dtype": "bfloat16"}, ascend(label, tensors))
    assert caught.value.where == f"`{UP}`"


def test_scales_without_codes_are_nothing_to_pack(tmp_path: Path) -> None:
    config = config_of(INT8, DYNAMIC, "int-quantized")
    config["quantization_config"]["ignore"] = ["re:.*"]
    floats = {f"{UP}.weight": tensor("BF16", 32, 32), "model.own_scales": tensor("F32", 4)}
    with pytest.raises(InputError, match="no module of this compressed-tensors checkpoint") as caught:
        repacked(tmp_path, "ascend", floats, config)
    assert caught.value.fix == "there is nothing to pack"


def test_scales_of_the_cache_go_along(tmp_path: Path) -> None:
    config = with_cache(config_of(FP8, FP8, "float-quantized"), CACHE)
    plan = repacked(tmp_path, "modelopt", attention() | SCALES, config)
    items = [item for shard in plan.shards for item in shard.items]
    assert sum(isinstance(item, Repack) for item in items) == 4
    copied = [item for item in items if isinstance(item, Copy)]
    assert all(isinstance(item, CacheScale) for item in copied)
    names = [item.source.spec.name for item in copied]
    assert names == [f"{LAYER}.self_attn.{side}_proj.{side}_scale" for side in "kv"]
    assert plan.cache is not None
    assert plan.state == "lossless"
    assert plan.manifest()["source"]["target"] == CT


def test_a_target_without_a_place_for_the_cache(tmp_path: Path) -> None:
    config = with_cache(config_of(INT8, DYNAMIC, "int-quantized"), CACHE)
    tensors = int8_rows(f"{LAYER}.self_attn.k_proj", 32, 32)[0] | SCALES
    with pytest.raises(InputError, match="target `ascend` has no place for its scales") as caught:
        repacked(tmp_path, "ascend", tensors, config)
    assert caught.value.where == f"`{LAYER}.self_attn.k_scale`"


def test_a_target_without_some_tensors_of_the_cache(tmp_path: Path, monkeypatch: Any) -> None:
    """They may be left out only if they are 0."""
    modelopt = type(discover(Target)["modelopt"]())
    some = modelopt.cache_tensors
    monkeypatch.setattr(modelopt, "cache_tensors", lambda self, cache: some(self, cache)[:1])
    config = with_cache(config_of(FP8, FP8, "float-quantized"), CACHE)
    with pytest.raises(
        InputError, match="has no offsets of the cache, and this one is not 0"
    ) as caught:
        repacked(tmp_path, "modelopt", attention() | SCALES, config)
    assert caught.value.where == f"`{LAYER}.self_attn.v_scale`"


def test_tensors_of_the_cache_that_are_0_may_go(tmp_path: Path, monkeypatch: Any) -> None:
    modelopt = type(discover(Target)["modelopt"]())
    some = modelopt.cache_tensors
    monkeypatch.setattr(modelopt, "cache_tensors", lambda self, cache: some(self, cache)[:1])
    config = with_cache(config_of(FP8, FP8, "float-quantized"), CACHE)
    none = {f"{LAYER}.self_attn.v_scale": f32([0.0])}
    plan = repacked(tmp_path, "modelopt", attention() | SCALES | none, config)
    names = {spec.name for shard in plan.shards for spec in shard.tensors}
    assert f"{LAYER}.self_attn.k_proj.k_scale" in names
    assert not any(name.endswith("v_scale") for name in names)


def test_a_label_that_the_target_has_not(tmp_path: Path) -> None:
    tensors = packed_int4(UP, 64, 32, 32, symmetric=True, wide=False)[0]
    with pytest.raises(InputError, match="stores fp8 alone") as caught:
        repacked(tmp_path, "fp8", tensors, config_of(INT4, None, "pack-quantized"))
    assert caught.value.where == f"`{UP}` (int4 g32 W4A16)"


def test_what_lies_next_to_codes(tmp_path: Path, blocks: list[dict[str, Any]]) -> None:
    """Static int8 in float16 for Ascend: floats and biases are copied."""
    tensors = {
        f"{module}.{suffix}": made
        for module in (f"{LAYER}.self_attn.{name}_proj" for name in "qkv")
        for suffix, made in {
            "weight": tensor("I8", 32, 32),
            "input_scale": f32([0.5]),
            "input_offset": f32([0.0]),
            "deq_scale": ("I64", (32,), np.full(32, 0x3F800000, "<i8").tobytes()),
            "quant_bias": tensor("I32", 32),
        }.items()
    }
    bias = f"{LAYER}.self_attn.q_proj.bias"
    floats = {bias: tensor("F32", 32), "lm_head.weight": tensor("F16", 16, 32)}
    floats["model.norm.weight"] = tensor("F16", 32)
    description = ascend("W8A8", tensors, **dict.fromkeys(floats, "FLOAT"))
    manifest = {"manifest_version": 1, "recipe": "target: ascend\nrules: []\n", "files": {}}
    (tmp_path / MANIFEST).write_bytes(encode_manifest(manifest))
    plan = repacked(tmp_path, CT, tensors | floats, {"torch_dtype": "float16"}, description)
    assert len(blocks) == 6, "of no rows and of one, for each last part of a name"
    ones = 0x3F800000  # the bits of a float32 that is 1
    assert blocks[1] == {
        "weight": ((1, 32), {0}),
        "quant_bias": ((1,), {0}),
        "deq_scale": ((1,), {ones}),
        "input_scale": ((1,), {1.0}),
        "input_offset": ((1,), {0.0}),
    }
    specs = {spec.name: spec for shard in plan.shards for spec in shard.tensors}
    assert specs["lm_head.weight"].dtype == "F16"
    assert specs[bias].dtype == "F32"
    suffixes = {name.rpartition(".")[2] for name in specs}
    assert suffixes == {"weight", "weight_scale", "input_scale", "input_zero_point", "bias"}
    assert plan.floats == 3
    assert plan.sidecars["quantcli_source_recipe.yaml"] == manifest["recipe"].encode()
    (tmp_path / MANIFEST).write_bytes(encode_manifest({**manifest, "recipe": None}))
    again = plan_repacking(open_checkpoint(tmp_path), discover(Target)[CT]())
    assert "quantcli_source_recipe.yaml" not in again.sidecars


def test_global_scales_that_are_no_reciprocal_are_noted(tmp_path: Path) -> None:
    lost = next(x for x in np.linspace(0.5, 1, 1000, dtype="f4") if 1 / (1 / x) != x)
    modules = [UP, UP.replace("0", "1")]
    tensors = {
        f"{module}.{suffix}": made
        for module in modules
        for suffix, made in {
            "weight": tensor("U8", 32, 16),
            "weight_scale": tensor("F8_E4M3", 32, 2, fill=60),
            "weight_scale_2": f32(0.25),
            "input_scale": f32(lost),
        }.items()
    }
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": []}
    config = {"quantization_config": settings, "num_hidden_layers": 2, "torch_dtype": "bfloat16"}
    plan = repacked(tmp_path / "lost", CT, tensors, config)
    assert plan.state == "lossless but for the last bits of global scales"
    (note,) = (note for note in plan.notes if "is not 1 / x" in note)
    assert note.startswith(f"input_global_scale of 2 modules, such as `{UP}`, is not 1 / x for any")
    tensors |= {f"{module}.input_scale": f32(0.5) for module in modules}
    assert repacked(tmp_path / "kept", CT, tensors, config).state == "lossless"
    with pytest.raises(InputError, match="this is a modelopt checkpoint already"):
        repacked(tmp_path / "kept", "modelopt", tensors, config)


def test_a_file_of_scales_alone_goes(tmp_path: Path) -> None:
    """What its modules have now lies in the files of their codes, which get new numbers."""
    config = config_of(INT8, DYNAMIC, "int-quantized")
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    codes = [int8_rows(f"{LAYER}.mlp.{name}_proj", 32, 32)[0] for name in ("up", "down")]
    scales = {name: made.pop(name) for made in codes for name in [*made] if name.endswith("_scale")}
    scales = {name: ("F32", shape, f32([[0.5]] * 32)[2]) for name, (_, shape, _) in scales.items()}
    shards = dict(zip(names, [codes[0], scales, codes[1]], strict=True))
    make_model(tmp_path, shards, config=config, index=True)
    plan = plan_repacking(open_checkpoint(tmp_path), discover(Target)["ascend"]())
    assert [shard.file for shard in plan.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    first, second = ({spec.name for spec in shard.tensors} for shard in plan.shards)
    assert {name.rpartition(".")[2] for name in first} == {"weight", "weight_scale", "weight_offset"}
    assert not first & second
    assert plan.lines[0].modules == 2
    assert plan.floats == 0
    assert plan.quantized_params == plan.params == 2 * 32 * 32


@pytest.mark.parametrize(("bias", "cast"), [("BF16", "F32"), ("F32", None)])
def test_static_int8_for_another_engine(tmp_path: Path, bias: str, cast: str | None) -> None:
    """The other format stores biases next to codes in float32."""
    tensors = int8_rows(UP, 32, 32)[0] | {f"{UP}.input_scale": f32([0.5])}
    nbytes = sum(len(data) for _, _, data in tensors.values())
    tensors |= {f"{UP}.bias": tensor(bias, 32), "a.bias": tensor("F32", 4)}
    tensors["lm_head.weight"] = tensor("BF16", 4, 32)
    config = config_of(INT8, INT8 | {"strategy": "tensor"}, "int-quantized")
    plan = repacked(tmp_path, "ascend", tensors, config)
    (shard,) = plan.shards
    assert shard.file == "model.safetensors"
    copies = {item.source.spec.name: item for item in shard.items if isinstance(item, Copy)}
    assert copies.keys() == {f"{UP}.bias", "a.bias", "lm_head.weight"}
    assert copies[f"{UP}.bias"].dtype == cast
    assert copies["a.bias"].dtype is None, "of no quantized module"
    (line,) = plan.lines
    assert line.nbytes_before == nbytes
    packed = {spec.name: spec.nbytes for spec in shard.tensors if spec.name not in copies}
    assert line.nbytes_after == sum(packed.values())
    assert packed[f"{UP}.quant_bias"] == 4 * 32
    assert [note for note in plan.notes if "must fit" in note] == [
        "input_scale must fit bfloat16 as it is, which is checked while writing"
    ]
    stored = target_of(plan.checkpoint).open_stored(plan.checkpoint)
    modules = list(_modules(plan.checkpoint, stored))
    assert [(module.name, module.shape) for module in modules] == [(UP, (32, 32)), ("lm_head", (4, 32))]
    assert [module.numerics is None for module in modules] == [False, True]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What plans pack to see what comes of it: shape and numbers of each tensor, by suffix."""
    packed: list[dict[str, Any]] = []

    def spy(item: Repack, target: Target, stored: Any, *more: Any) -> Any:
        packed.append(
            {suffix: (tuple(t.shape), {*t.flatten().tolist()}) for suffix, t in stored.items()}
        )
        return recode(item, target, stored, *more)

    monkeypatch.setattr("quantcli.planning.repack.recode", spy)
    return packed


def test_blocks_of_int4_hold_nothing(tmp_path: Path, blocks: list[dict[str, Any]]) -> None:
    tensors = packed_int4(UP, 64, 32, 32, symmetric=True, wide=False)[0]
    plan = repacked(tmp_path, "gptq", tensors, config_of(INT4, None, "pack-quantized"))
    shape = ((2,), {64, 32})
    assert blocks == [
        {"weight_packed": ((0, 4), set()), "weight_scale": ((0, 1), set()), "weight_shape": shape},
        {"weight_packed": ((8, 4), {0}), "weight_scale": ((8, 1), {1.0}), "weight_shape": shape},
    ]
    assert not any("must fit" in note for note in plan.notes)


def cached(**change: Any) -> Any:
    """The cache of a checkpoint, as `_cache_of` reads it: of one tensor."""
    key = SimpleNamespace(spec=SimpleNamespace(name=f"{LAYER}.self_attn.k_scale"))
    source = SimpleNamespace(cache="fp8", tensors=[key], attention=("q",), layers={})
    cache = SimpleNamespace(**{**vars(source), **change}) if change != {"all": None} else None
    return SimpleNamespace(checkpoint=SimpleNamespace(tensors={key.spec.name: key}), cache=cache)


ENGINE: Any = SimpleNamespace(name="engine", caches={"fp8"}, cache_tensors=lambda _: ())


@pytest.mark.parametrize(
    "change", [{"all": None}, {"cache": None}, {"tensors": []}, {"attention": ()}, {"cache": "int8"}]
)
def test_a_cache_that_has_no_place(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="`engine` has no place for its scales") as caught:
        _cache_of(cached(**change), ENGINE)
    assert caught.value.where == f"`{LAYER}.self_attn.k_scale`"


def test_a_cache_that_goes_along() -> None:
    assert _cache_of(cached(), ENGINE) == PlannedCache("fp8", ("q",), measured=False)  # type: ignore[arg-type]
