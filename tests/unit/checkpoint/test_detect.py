from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.detect import Quantization, quantization
from quantcli.core.errors import InputError
from tests.builders import Tensor, make_model, tensor

I8 = tensor("I8", 2, 2)
U8 = tensor("U8", 2, 2)
F8 = tensor("F8_E4M3", 2, 2)
F32 = tensor("F32", 2)
BF16 = tensor("BF16", 2, 2)
DESCRIPTION = "quant_model_description.json"


def told(
    folder: Path, tensors: dict[str, Tensor], config: Any = None, **files: str
) -> Quantization | None:
    named = {f"{name}.json": content for name, content in files.items()}
    model = make_model(folder, {"model.safetensors": tensors}, config=config, files=named)
    return quantization(open_checkpoint(model))


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.weight": BF16, "a.bias": F32},
        {"norm.weight": F32, "router.e_score_correction_bias": F32},
        {"a.position_ids": tensor("I64", 4), "a.mask": tensor("BOOL", 4), "a.buffer": I8},
        {"attn.k_scale": F32},
    ],
    ids=["float", "norms", "buffers", "kv-scale"],
)
def test_float_models_are_not_quantized(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    assert told(tmp_path, tensors) is None


def test_a_config_that_speaks_of_quantization_over_float_weights_is_stale(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    assert told(tmp_path, {"a.weight": BF16}, config) is None


def method(**block: Any) -> dict[str, Any]:
    return {"quantization_config": block}


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        pytest.param(
            {"a.weight": F8, "a.weight_scale_inv": F32, "b.weight": BF16},
            method(quant_method="fp8", weight_block_size=[128, 128]),
            Quantization("fp8 (blocks of 128 x 128)", 1, "`a.weight` F8_E4M3 [2, 2]"),
            id="fp8-blocks",
        ),
        pytest.param(
            {"a.weight": F8, "a.weight_scale": F32},
            method(quant_method="modelopt", quant_algo="MIXED_PRECISION"),
            Quantization("modelopt (MIXED_PRECISION)", 1, "`a.weight` F8_E4M3 [2, 2]"),
            id="modelopt",
        ),
        pytest.param(
            {"a.qweight": tensor("I32", 2), "a.qzeros": F32, "b.qweight": tensor("I32", 3)},
            method(quant_method="gptq", bits=4),
            Quantization("gptq (4)", 2, "`a.qweight` I32 [2]"),
            id="gptq",
        ),
        pytest.param(
            {"a.weight_packed": tensor("I32", 2), "a.weight_scale": BF16},
            {"text_config": method(quant_method="compressed-tensors", format="pack-quantized")},
            Quantization("compressed-tensors (pack-quantized)", 1, "`a.weight_packed` I32 [2]"),
            id="compressed-tensors-in-text-config",
        ),
        pytest.param(
            {"a.weight": I8, "a.weight_scale": F32},
            {"compression_config": {"quant_method": "compressed-tensors"}},
            Quantization("compressed-tensors", 1, "`a.weight` I8 [2, 2]"),
            id="compression-config",
        ),
        pytest.param(
            {"a.weight": U8, "a.weight.absmax": F32},
            method(quant_method="bitsandbytes"),
            Quantization("bitsandbytes", 1, "`a.weight` U8 [2, 2]"),
            id="bitsandbytes-counts-a-module-once",
        ),
        pytest.param(
            {"experts.gate_up_proj_blocks": U8, "experts.gate_up_proj_scales": U8},
            method(quant_method="mxfp4"),
            Quantization("mxfp4", 1, "`experts.gate_up_proj_blocks` U8 [2, 2]"),
            id="mxfp4",
        ),
        pytest.param(
            {"a.weight": F8, "b.weight": I8},
            None,
            Quantization("unnamed, F8_E4M3, I8", 2, "`a.weight` F8_E4M3 [2, 2]"),
            id="no-config",
        ),
        pytest.param(
            {"a.weight": I8},
            method(bits=8),
            Quantization("unnamed (8)", 1, "`a.weight` I8 [2, 2]"),
            id="method-unnamed",
        ),
        pytest.param(
            {"a.weight": I8},
            method(quant_method="\x1b[2J", format="x" * 1000),
            Quantization(f"'\\x1b[2J' ({'x' * 40})", 1, "`a.weight` I8 [2, 2]"),
            id="hostile-words",
        ),
    ],
)
def test_named(tmp_path: Path, tensors: dict[str, Tensor], config: Any, expected: Quantization) -> None:
    assert told(tmp_path, tensors, config) == expected


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (
            method(quant_method={"deep": [1]}),
            "quantization_config.quant_method` should be text, not an",
        ),
        (method(quant_method=["fp8"]), "quantization_config.quant_method` should be text, not a list"),
        ({"quantization_config": "int8"}, "quantization_config` should be an object, not text: it is"),
        (
            {"text_config": {"compression_config": 3}},
            "text_config.compression_config` should be an obj",
        ),
    ],
)
def test_a_name_of_another_type_is_refused(tmp_path: Path, config: Any, what: str) -> None:
    checkpoint = open_checkpoint(
        make_model(tmp_path, {"model.safetensors": {"a.weight": I8}}, config=config)
    )
    with pytest.raises(InputError, match=re.escape(f"config.json: `{what}")) as refused:
        quantization(checkpoint)
    assert refused.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("description", "name"),
    [
        (
            {
                "model_quant_type": "W8A8_DYNAMIC",
                "a.weight": "W8A8_DYNAMIC",
                "a.weight_scale": "W8A8_DYNAMIC",
                "b.weight": "W8A8_DYNAMIC",
                "c.weight": "W8A8",
                "norm.weight": "FLOAT",
                "experts.weight": "W8A8_DYNAMIC",
                "d.weight": 8,
            },
            "ascend (W8A8_DYNAMIC 2, W8A8 1)",
        ),
        ({"a.weight": "FLOAT"}, "ascend (no kinds named)"),
        ({"a.weight": "\x1b[2J"}, "ascend ('\\x1b[2J' 1)"),
        ([], "ascend (unreadable description)"),
    ],
)
def test_ascend_is_named_by_its_description(tmp_path: Path, description: Any, name: str) -> None:
    tensors = {"a.weight": I8, "a.weight_scale": F32, "b.weight": I8, "c.weight": I8, "d.weight": I8}
    files = {"quant_model_description": json.dumps(description)}
    found = told(tmp_path, tensors, method(quant_method="other"), **files)
    assert found == Quantization(name, 4, "`a.weight` I8 [2, 2]")
