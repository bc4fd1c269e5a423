"""The numbers of modules in other formats: what each refusal says, and what is taken over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.core.errors import InputError
from quantcli.core.numerics import multiplier
from quantcli.core.registry import discover
from quantcli.planning.plan import Repack
from quantcli.planning.recode import (
    _around,
    _bias_is_there,
    _cast,
    _divisor,
    _multiplied,
    _neighbours,
    _quotient,
    moved_scales,
    recode,
)
from quantcli.planning.repack import plan_repacking
from quantcli.schemes.base import Scheme
from quantcli.targets.base import Target
from quantcli.targets.compressed_tensors.target import CompressedTensors
from tests.builders import make_model, tensor
from tests.quantized import int8_rows, packed_int4

NAME = "model.layers.0.mlp.up_proj"
N, K = 64, 32
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
INPUTS = INT8 | {"strategy": "tensor", "symmetric": False}
INT4 = INT8 | {"num_bits": 4, "strategy": "group", "group_size": 32}


class Sixteen(CompressedTensors):
    """The same format for an engine that holds all scales in 16 bits."""

    def engine_dtype(self, *_: Any) -> str:
        return "BF16"


class Unsigned(Sixteen):
    """One whose kernels are not known to take negative scales."""

    def layout(self, numerics: Any) -> Any:
        layout = super().layout(numerics)
        return replace(layout, params=tuple(replace(p, values="positive") for p in layout.params))


def config_of(weights: Any, inputs: Any, form: str, dtype: str = "bfloat16") -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    settings = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
                "quantization_status": "compressed", "config_groups": {"group_0": group}}  # fmt: skip
    return {"model_type": "llama", "torch_dtype": dtype, "quantization_config": settings}


def item_of(folder: Path, tensors: Any, config: Any, target: Target) -> Repack:
    """The one module of a checkpoint for compressed-tensors, planned for another target."""
    make_model(folder, {"model.safetensors": tensors}, config=config)
    plan = plan_repacking(open_checkpoint(folder), target)
    (item,) = (item for shard in plan.shards for item in shard.items if isinstance(item, Repack))
    return item


def ascend() -> Target:
    return discover(Target)["ascend"]()


@pytest.fixture(scope="module", params=["bfloat16", "float16"])
def static(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Repack:
    """int8 with static, asymmetric inputs, for Ascend."""
    tensors = int8_rows(NAME, N, K)[0]
    tensors[f"{NAME}.input_scale"] = tensor("F32", 1, fill=60)
    tensors[f"{NAME}.input_zero_point"] = tensor("I8", 1)
    config = config_of(INT8, INPUTS, "int-quantized", request.param)
    return item_of(tmp_path_factory.mktemp("static"), tensors, config, ascend())


def serving(item: Repack) -> torch.dtype:
    return {"BF16": torch.bfloat16, "F16": torch.float16}[item.module.serving_dtype]


def stored_static(item: Repack, scale: float = 0.0625, offset: int = -7) -> dict[str, torch.Tensor]:
    """Rows of a module whose input_scale is a power of two, so that no number is rounded."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (N, K), generator=draw, dtype=torch.int8)
    scales = torch.randint(1, 100, (N, 1), generator=draw).float() / 2**13
    return {
        "weight": codes,
        "weight_scale": scales,
        "input_scale": torch.tensor([scale]),
        "input_zero_point": torch.tensor([offset], dtype=torch.int8),
    }


def test_static_int8_to_ascend_and_back(static: Repack) -> None:
    stored = stored_static(static)
    bias = torch.arange(N).float()
    there = recode(static, ascend(), stored, 0, bias)
    assert torch.equal(there["weight"], stored["weight"])
    assert float(there["input_scale"]) == 0.0625
    assert float(there["input_offset"]) == -7
    bits = there["deq_scale"]
    deq = bits.view(torch.int32)[::2].view(torch.float32) if bits.dtype == torch.int64 else bits
    assert torch.equal(deq, stored["weight_scale"].flatten() / 16)
    sums = stored["weight"].double().sum(1)
    assert torch.equal(there["quant_bias"].double(), (bias.double() / deq.double() + 7 * sums).round())

    back_item = replace(static, origin=ascend())
    back = recode(back_item, CompressedTensors(), there, 0, bias)
    assert back.keys() == stored.keys()
    for name, before in stored.items():
        assert torch.equal(back[name].double(), before.double()), name


def test_quant_bias_must_be_that_of_the_stored_bias(static: Repack) -> None:
    there = recode(static, ascend(), stored_static(static), 0, None)
    item = replace(static, origin=ascend())
    off_by_one = {**there, "quant_bias": there["quant_bias"] + 1}  # as producers round
    assert recode(item, CompressedTensors(), off_by_one, 0, None)
    there["quant_bias"][3] += 1000
    with pytest.raises(InputError, match="but a module without a bias gives") as caught:
        recode(item, CompressedTensors(), there, 10, None)
    assert f"quant_bias is {int(there['quant_bias'][3])}" in caught.value.what
    with pytest.raises(InputError, match="but the stored bias gives"):
        recode(item, CompressedTensors(), there, 10, torch.zeros(N))


def test_one_step_of_inputs_needs_no_change(static: Repack) -> None:
    """Two formats whose engines hold input_scale in one dtype."""
    stored = stored_static(static, 0.1)
    packed = recode(static, type("Other", (CompressedTensors,), {})(), stored, 0, None)
    assert {name: t.tolist() for name, t in packed.items()} == {
        n: t.tolist() for n, t in stored.items()
    }


def test_steps_of_inputs_are_those_of_a_multiplier(static: Repack) -> None:
    stored = stored_static(static, 1 / 3.0)
    stored["weight_scale"] *= 3
    there = recode(static, ascend(), stored, 0, None)
    assert float(multiplier(there["input_scale"].to(serving(static)))) == 3
    near = stored | {"input_scale": torch.tensor([(1 + 0.75 * 2.0**-20) / 3])}
    again = recode(static, ascend(), near, 0, None)
    assert torch.equal(again["input_scale"], there["input_scale"])
    with pytest.raises(InputError, match="makes other steps than ascend can"):
        recode(
            static,
            ascend(),
            stored | {"input_scale": torch.tensor([(1 + 1.25 * 2.0**-20) / 3])},
            0,
            None,
        )
    stored["input_scale"] = torch.tensor([0.1003])
    with pytest.raises(InputError, match="makes other steps than ascend can") as caught:
        recode(static, ascend(), stored, 0, None)
    r = (1 / stored["input_scale"].double()).to(serving(static))
    assert f"with numbers of 16 bits, here {float(r)!r}" in caught.value.what
    assert caught.value.where == f"`{NAME}.input_scale` in model.safetensors"


def test_a_multiplier_that_no_number_of_16_bits_has(static: Repack) -> None:
    """1 / r is near r's step, but the reciprocal of no number is r."""
    dtype = serving(static)
    numbers = torch.arange(1, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[(numbers.float() > 0.01) & (numbers.float() < 100)]
    lost = sorted({float(r) for r in numbers} - set(multiplier(numbers).tolist()))
    assert lost
    stored = stored_static(static, 1 / lost[len(lost) // 2])
    with pytest.raises(InputError, match="makes other steps than ascend can"):
        recode(static, ascend(), stored, 0, None)


def test_a_scale_that_is_no_product(static: Repack) -> None:
    """deq_scale of float16 has few bits. That of bfloat16 has those of float32, and finds a factor."""
    stored = stored_static(static, 1 / 3.0)
    stored["weight_scale"][5] = 0.1234567
    if serving(static) == torch.bfloat16:
        assert recode(static, ascend(), stored | {"weight_scale": 3 * stored["weight_scale"]}, 8, None)
        return
    with pytest.raises(InputError) as caught:
        recode(static, ascend(), stored, 8, None)
    value = float(stored["weight_scale"][0])  # no multiple of 3 either
    assert caught.value.what.startswith(
        f"weight_scale {value!r} would be rounded: ascend holds deq_scale"
    )
    assert caught.value.where == f"`{NAME}.weight_scale`[8] in model.safetensors"


def test_an_offset_that_division_would_lose(static: Repack) -> None:
    """As engines find it again from the ends of the range, and cut the fraction off."""
    item = replace(static, origin=ascend())
    there = recode(static, ascend(), stored_static(static, 0.5, 122), 0, None)
    assert int(recode(item, CompressedTensors(), there, 0, None)["input_zero_point"]) == 122
    r = torch.tensor([7.3]).to(serving(static)).float()
    steps = torch.linspace(0.13, 0.14, 4000)
    there["input_scale"] = steps[multiplier(steps.to(serving(static))) == r][:1]
    if serving(static) == torch.float16:
        assert recode(item, CompressedTensors(), there, 0, None)
        return
    with pytest.raises(InputError, match="would lose input_offset 122") as caught:
        recode(item, CompressedTensors(), there, 0, None)
    assert caught.value.where == f"`{NAME}`"


def test_an_offset_beyond_eight_bits(static: Repack) -> None:
    there = recode(static, ascend(), stored_static(static, 0.5, 0), 0, None)
    there["input_offset"] = torch.tensor([200.0])
    sums = there["weight"].int().sum(1)
    there["quant_bias"] = (-200 * sums).to(torch.int32)
    item = replace(static, origin=ascend())
    with pytest.raises(InputError, match="cannot hold this input_offset as it is") as caught:
        recode(item, CompressedTensors(), there, 0, None)
    assert caught.value.fix == "keep the checkpoint as it is"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight_scale", torch.nan, "holds a weight_scale that is NaN or Inf"),
        ("weight_scale", torch.inf, "holds a weight_scale that is NaN or Inf"),
        ("weight_scale", -0.25, "weight_scale is -0.25: a scale is a positive number"),
        ("weight_scale", 0.0, "weight_scale is 0: a scale is a positive number"),
        ("input_scale", -0.25, "input_scale is -0.25: a scale is a positive number"),
        ("input_scale", 0.0, "input_scale is 0: a scale is a positive number"),
    ],
)
def test_numbers_that_are_no_scales(static: Repack, name: str, value: float, words: str) -> None:
    stored = stored_static(static)
    row = min(5, len(stored[name]) - 1)
    stored[name][row] = value
    with pytest.raises(InputError) as caught:
        recode(static, ascend(), stored, 20, None)
    assert caught.value.what == words
    place = (
        "[25]" if name == "weight_scale" and value <= 0 else "[20]" if name == "weight_scale" else ""
    )
    assert caught.value.where == f"`{NAME}.{name}`{place} in model.safetensors"


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Repack:
    """int4 in groups, for GPTQ: both take negative scales."""
    tensors = packed_int4(NAME, N, K, 32, symmetric=True, wide=False)[0]
    config = config_of(INT4, None, "pack-quantized")
    return item_of(tmp_path_factory.mktemp("int4"), tensors, config, discover(Target)["gptq"]())


def stored_int4() -> dict[str, torch.Tensor]:
    words = torch.randint(-(2**31), 2**31, (N, K // 8), generator=torch.Generator().manual_seed(1))
    return {
        "weight_packed": words.to(torch.int32),
        "weight_scale": (torch.arange(1, N + 1).float() / 256).bfloat16()[:, None],
        "weight_shape": torch.tensor([N, K]),
    }


def test_negative_scales_go_where_they_are_known(grouped: Repack) -> None:
    stored = stored_int4()
    stored["weight_scale"][1::2] *= -1
    gptq = discover(Target)["gptq"]()
    packed = recode(grouped, gptq, stored, 0, None)
    assert torch.equal(packed["scales"].t().float(), stored["weight_scale"].float())
    with pytest.raises(InputError, match="unsigned is not known to take negative scales") as caught:
        recode(grouped, type("U", (Unsigned,), {"name": "unsigned"})(), stored, 0, None)
    assert caught.value.what.startswith(f"weight_scale is {-2 / 256:g}:")
    assert caught.value.where == f"`{NAME}.weight_scale`[1] in model.safetensors"
    stored["weight_scale"][7] = 0
    with pytest.raises(InputError, match="a scale is a positive number"):
        recode(grouped, gptq, stored, 0, None)


def test_a_scale_that_the_engine_would_round(grouped: Repack) -> None:
    stored = stored_int4()
    stored["weight_scale"] = stored["weight_scale"].float()
    assert recode(grouped, discover(Target)["gptq"](), stored, 0, None)
    stored["weight_scale"][[9, 11]] += 1e-6
    value = float(stored["weight_scale"][9])
    with pytest.raises(InputError) as caught:
        recode(grouped, discover(Target)["gptq"](), stored, 16, None)
    assert caught.value.what == f"weight_scale {value!r} would be rounded: gptq holds it in bfloat16"
    assert caught.value.where == f"`{NAME}.weight_scale`[25] in model.safetensors"


def test_global_scales_that_are_no_reciprocal() -> None:
    """One format stores the number with which engines multiply, the other what they divide by."""
    numerics = discover(Scheme)["nvfp4"]().numerics
    exact = {"weight": torch.zeros(0, 0, dtype=torch.uint8), "weight_scale": torch.ones(0, 0)}
    lost = next(x for x in torch.linspace(0.5, 1, 1000)[:, None] if multiplier(1 / x) != x)
    parts = exact | {"weight_global_scale": torch.tensor([0.25]), "input_global_scale": lost}
    assert moved_scales(numerics, parts, CompressedTensors()) == ["input_global_scale"]


def test_codes_of_fp8_are_compared_by_their_bits(tmp_path: Path) -> None:
    """-0 is another code than 0."""
    number = INT8 | {"type": "float", "strategy": "tensor"}
    tensors = {
        f"{NAME}.weight": tensor("F8_E4M3", N, K),
        f"{NAME}.weight_scale": tensor("F32", 1, fill=60),
    }
    tensors[f"{NAME}.input_scale"] = tensor("F32", 1, fill=60)
    modelopt = discover(Target)["modelopt"]()
    item = item_of(tmp_path, tensors, config_of(number, number, "float-quantized"), modelopt)
    stored = {
        "weight": torch.arange(N * K).to(torch.uint8).view(N, K).view(torch.float8_e4m3fn),
        "weight_scale": torch.tensor([0.3]),
        "input_scale": torch.tensor([0.7]),
    }
    with pytest.raises(InputError, match="holds a weight that is NaN or Inf"):
        recode(item, modelopt, stored, 0, None)
    stored["weight"].view(torch.uint8)[stored["weight"].float().isnan()] = 0x80  # -0
    packed = recode(item, modelopt, stored, 0, None)
    assert torch.equal(packed["weight"].view(torch.uint8), stored["weight"].view(torch.uint8))
    assert [float(packed[name]) for name in ("weight_scale", "input_scale")] == pytest.approx(
        [0.3, 0.7]
    )


def test_a_global_scale_next_to_it_is_taken(tmp_path: Path) -> None:
    number = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group",
              "group_size": 16, "dynamic": False}  # fmt: skip
    tensors = {
        f"{NAME}.weight_packed": tensor("U8", N, K // 2),
        f"{NAME}.weight_scale": tensor("F8_E4M3", N, K // 16, fill=60),
        f"{NAME}.weight_global_scale": tensor("F32", 1, fill=60),
        f"{NAME}.input_global_scale": tensor("F32", 1, fill=60),
    }
    config = config_of(number, number | {"dynamic": "local"}, "nvfp4-pack-quantized")
    modelopt = discover(Target)["modelopt"]()
    item = item_of(tmp_path, tensors, config, modelopt)
    lost = next(x for x in torch.linspace(0.5, 1, 1000)[:, None] if multiplier(1 / x) != x)
    stored = {
        "weight": torch.zeros(N, K // 2, dtype=torch.uint8),
        "weight_scale": torch.ones(N, K // 16).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor([0.25]),
        "input_scale": lost,
    }
    back = recode(replace(item, origin=modelopt), CompressedTensors(), stored, 0, None)
    assert torch.equal(back["input_global_scale"], 1 / lost)
    assert float(multiplier(back["input_global_scale"])) == pytest.approx(float(lost), rel=2**-23)


def test_a_format_without_quant_bias(static: Repack) -> None:
    """Its engine multiplies inputs with a number of 16 bits all the same."""
    stored = stored_static(static, 0.5)
    packed = recode(replace(static, origin=Sixteen()), CompressedTensors(), stored, 0, None)
    assert float(packed["input_scale"]) == 0.5
    assert int(packed["input_zero_point"]) == -7


@pytest.mark.parametrize("beyond", [0.0, 1.0])
def test_a_quotient_next_to_one_that_the_engine_holds(static: Repack, beyond: float) -> None:
    """float16 engines hold deq_scale in few bits, so that the float32 next to such a number is none."""
    stored = stored_static(static, 0.5)
    stored["weight_scale"][:] = 0.5
    stored["weight_scale"][3] = 2 * torch.nextafter(torch.tensor(0.25), torch.tensor(beyond))
    if serving(static) == torch.bfloat16:
        assert recode(static, ascend(), stored, 0, None)
        return
    with pytest.raises(InputError, match="would be rounded: ascend holds deq_scale") as caught:
        recode(static, ascend(), stored, 0, None)
    assert caught.value.where == f"`{NAME}.weight_scale`[3] in model.safetensors"


def test_the_first_scale_of_a_row_that_the_engine_would_round(grouped: Repack) -> None:
    scale = torch.ones(4, 3)
    scale[1] = torch.tensor([1.0, 1.001, 1.002])
    with pytest.raises(InputError, match=rf"weight_scale {float(scale[1, 1])!r} would be rounded"):
        _cast({"weight_scale": scale}, "weight_scale", grouped, discover(Target)["gptq"](), 0)


@pytest.mark.parametrize(("dtype", "up"), [(torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-7)])
def test_numbers_around_one(dtype: torch.dtype, up: float) -> None:
    """Below a power of two they are half as far apart."""
    wanted = [1.0]
    for step in range(1, 9):
        wanted += [1 - step * up / 2, 1 + step * up]
    assert [float(number) for number in _around(torch.ones((), dtype=dtype))] == wanted


def test_global_scales_next_to_each_other() -> None:
    one, name = torch.ones(1), "weight_global_scale"
    assert _neighbours(name, one + 2.0**-23, one)
    assert _neighbours(name, one - 2.0**-23, one)
    assert not _neighbours(name, one + 2.0**-22, one)
    assert not _neighbours("weight_scale", one, one)


@pytest.mark.parametrize(("deq", "slack"), [(1.0, 1025), (2.0, 513)])
def test_quant_bias_is_that_of_the_stored_one_but_for_rounding(
    static: Repack, deq: float, slack: int
) -> None:
    """One step, and a millionth of the sum."""
    total = round(2**30 / deq)
    weight, offset = torch.tensor([[1, -1], [2, 3], [0, 0]], dtype=torch.int8), torch.tensor([0.0])
    parts = {"weight": weight, "input_offset": offset, "deq_scale": torch.full((3,), deq)}
    parts["quant_bias"] = torch.tensor([total + slack, total - slack, total], dtype=torch.int32)
    bias = torch.full((3,), 2.0**30)
    _bias_is_there(parts, static, 0, bias)
    parts["quant_bias"][1:] = torch.tensor([total + slack + 1, total + slack + 2])  # the first counts
    with pytest.raises(InputError, match=f"the stored bias gives {total}") as caught:
        _bias_is_there(parts, replace(static, origin=ascend()), 0, bias)
    assert caught.value.what.startswith(f"quant_bias is {total + slack + 1},")
    parts["input_offset"] += 1  # the sums of the rows are 0, 5 and 0
    parts["quant_bias"] = torch.tensor([total, total - slack - 4, total], dtype=torch.int32)
    _bias_is_there(parts, static, 0, bias)
    parts["quant_bias"][1] -= 1
    with pytest.raises(InputError, match=f"gives {total - 5}"):
        _bias_is_there(parts, static, 0, bias)


def test_a_quotient_has_as_many_zeros_as_can_be() -> None:
    """Several numbers have the same product in float32 if it is in the next power of two."""
    r, step = torch.tensor([1.0078125]), 2.0**-23
    numbers = 1.99 + torch.arange(64) * step
    products = numbers * r
    assert len(set(products.tolist())) < 60
    found = _quotient(products[:, None], r, torch.bfloat16)[:, 0]
    for number, product in list(zip(found.tolist(), products.tolist(), strict=True))[4:-4]:
        same = numbers[products == product].tolist()
        assert number == max(same, key=lambda x: round(x / step) & -round(x / step))


def test_an_offset_is_found_again_from_the_ends_of_the_range(static: Repack) -> None:
    """By an engine that computes in float32 and cuts the fraction off, or it is refused."""
    r, lost, one = torch.tensor([7.3125]), [], np.float32(1)
    for offset in range(-128, 128):
        try:
            step = one * _divisor(r, torch.tensor([float(offset)]), static).numpy()[0]
        except InputError:
            lost.append(offset)
            continue
        high, low = step * (127 - offset), step * (-128 - offset)
        assert int(np.trunc(-128 - low / ((high - low) / np.float32(255)))) == offset
    assert lost == [122, 126]


def test_of_two_numbers_with_one_multiplier_the_nearest_is_taken(static: Repack) -> None:
    dtype = serving(static)
    start = int(torch.tensor(1.75, dtype=dtype).view(torch.int16))
    numbers = torch.arange(start, start + 256, dtype=torch.int16).view(dtype)
    multipliers = multiplier(numbers)
    nearest = smallest = 0
    for r in set(multipliers.tolist()):
        same = numbers[multipliers == r].tolist()
        wanted = min(same, key=lambda x: abs(x - 1 / r))
        if float((1 / torch.tensor([1 / r]).double()).to(dtype)) != r:
            continue
        assert float(_multiplied(torch.tensor([1 / r]), dtype, static, ascend())) == wanted
        nearest += wanted != min(same)
        smallest += wanted == min(same) != max(same)
    assert nearest > 3
    assert smallest > 3
