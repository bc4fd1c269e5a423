"""The description of the Ascend format: an entry for each tensor, and for each look-up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.commands.verify import run as verify
from quantcli.core.errors import InputError
from quantcli.targets.ascend.loader import also_asked
from quantcli.verification.options import VerifyOptions
from tests.tiny_drafts import drawn, save_draft

INT8, FLOAT = "W8A8_DYNAMIC", "FLOAT"
LINEARS = {f"model.layers.0.self_attn.{name}_proj": (64, 64) for name in "qkvo"} | {
    "model.layers.0.mlp.down_proj": (64, 96),
    "model.embed_tokens": (32, 64),
    "lm_head": (32, 64),
}


def converted(tmp_path: Path, model_type: str, shapes: dict[str, tuple[int, ...]], *bare: str) -> Path:
    """A model with these weights and bare parameters, its projections in int8."""
    tensors = drawn(shapes)
    for name in bare:
        tensors[name] = drawn({"x": (8,)})["x.weight"]
    config = {"model_type": model_type, "architectures": ["TinyModel"], "torch_dtype": "bfloat16"}
    model = save_draft(tmp_path / "model", config, tensors)
    rules = [{"match": ["*tower*", "*.mamba.*"], "scheme": "keep", "optional": True},
             {"match": "*_proj", "scheme": "w8a8_dynamic"}]  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps({"target": "ascend", "rules": rules}))
    job = commands.plan(tmp_path / "r.yaml", model=str(model), out=tmp_path / "out")
    commands.quantize(job)
    return tmp_path / "out"


def description(out: Path) -> dict[str, str]:
    table: dict[str, str] = json.loads((out / "quant_model_description.json").read_text())
    return table


@pytest.mark.parametrize("bare", [
    "image_newline", "model.image_newline", "class_embedding", "vision_tower.patch.positions",
    "model.layers.0.mixer.A_log", "a", "x.weight_g", "version_of_this",
])  # fmt: skip
def test_every_tensor_has_an_entry_whatever_its_name(tmp_path: Path, bare: str) -> None:
    out = converted(tmp_path, "llava_onevision", LINEARS, bare)
    table = description(out)
    assert open_checkpoint(out).tensors.keys() <= table.keys()
    assert table[bare] == FLOAT
    report = verify(VerifyOptions(out, full=True, against=str(tmp_path / "model")))
    assert report["ok"], report["findings"]


@pytest.mark.parametrize(("model_type", "module", "label", "asked"), [
    # with the number and name that vLLM's classes give modules
    ("granitemoehybrid", "model.layers.1.mamba.in_proj", FLOAT, "model.layers.1.mixer.in_proj"),
    ("stablelm", "model.layers.0.self_attn.q_proj", INT8, "model.layers.0.self_attn.qkv_proj"),
    ("stablelm", "lm_head", FLOAT, ".lm_head"),
    ("bert", "encoder.layer.0.attention.self.key", FLOAT, "encoder.layer.0.attention.output.key"),
    ("llava", "vision_tower.encoder.layers.0.self_attn.q_proj", FLOAT,
     "vision_tower.vision_model.encoder.layers.0.self_attn.qkv_proj"),
    ("qwen2_5_vl", "model.visual.blocks.0.mlp.gate_proj", INT8,
     "model.visual.blocks.0.mlp.gate_up_proj"),
])  # fmt: skip
def test_names_that_only_the_engine_has(
    tmp_path: Path, model_type: str, module: str, label: str, asked: str
) -> None:
    """Found by a run of vLLM-Ascend's look-up and vLLM 0.32's classes on tiny models."""
    out = converted(tmp_path, model_type, LINEARS | {module: (32, 64)})
    table = description(out)
    assert table[f"{module}.weight"] == label
    assert table[f"{asked}.weight"] == label
    report = verify(VerifyOptions(out, full=True))
    assert report["ok"], report["findings"]


def test_plain_models_have_no_more_entries_than_tensors(tmp_path: Path) -> None:
    out = converted(tmp_path, "qwen3", LINEARS)
    keys = {key for key in description(out) if "." in key}
    assert keys == open_checkpoint(out).tensors.keys()
    assert also_asked("model.layers.0.self_attn.q_proj", "qwen3") == []


@pytest.mark.parametrize(("model_type", "source"), [
    ("falcon_h1", "falcon_h1.py:345"), ("minicpm3", "minicpm3.py:85"), ("whisper", "whisper.py:649"),
])  # fmt: skip
def test_families_with_modules_that_no_entry_can_name(
    tmp_path: Path, model_type: str, source: str
) -> None:
    with pytest.raises(InputError, match=source):
        converted(tmp_path, model_type, LINEARS)
