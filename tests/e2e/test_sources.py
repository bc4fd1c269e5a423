"""Quantized checkpoints are converted as the float models are that they stand for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.commands import quantize as commands
from tests import quantized
from tests.builders import Tensor, make_model
from tests.e2e.calibrating import RECIPE as STATIC
from tests.e2e.calibrating import Models, make_bench
from tests.e2e.conftest import CONFIG, Box, bf16, llama, make_llama, run_cli

Made = tuple[dict[str, Tensor], np.ndarray]  # tensors of a module, and its weight
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}
INT4 = {"bits": 4, "group_size": 8}
KINDS: dict[str, tuple[Callable[[str, int, int, int], Made], dict[str, Any], str]] = {
    "fp8": (
        lambda module, n, k, seed: quantized.fp8_blocks(module, n, k, (16, 8), seed),
        FP8,
        "fp8 blocks of 16 x 8",
    ),
    "awq": (
        lambda module, n, k, seed: quantized.awq(module, n, k, 8, seed),
        {"quant_method": "awq", **INT4},
        "awq int4 in groups of 8",
    ),
    "gptq": (
        lambda module, n, k, seed: quantized.gptq(module, n, k, 8, act_order=True, seed=seed),
        {"quant_method": "gptq", "desc_act": True, **INT4},
        "gptq int4 in groups of 8",
    ),
}
PLAIN = 'target: ascend\nrules:\n  - match: "*"\n    scheme: bf16\n'


def make_source(folder: Path, kind: str) -> tuple[Path, Path]:
    """A llama whose projections but one are quantized, and the float model that it stands for."""
    make, settings, _ = KINDS[kind]
    theirs: dict[str, Tensor] = {}
    floats: dict[str, Tensor] = {}
    for seed, (name, (dtype, shape, data)) in enumerate(llama(layers=2).items()):
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and module != "model.layers.1.mlp.down_proj":
            tensors, weight = make(module, *shape, seed)
            theirs |= tensors
            floats[name] = quantized.f32(weight)
        else:
            theirs[name] = floats[name] = dtype, shape, data
    files = {"tokenizer.json": "{}"}
    config = CONFIG | {"quantization_config": settings}
    # scales in another file than their codes
    shards: dict[str, dict[str, Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, stored in theirs.items():
        shards["b.safetensors" if "scale" in name else "a.safetensors"][name] = stored
    source = make_model(folder / kind, shards, config=config, index=True, files=files)
    plain = make_model(folder / "float", {"model.safetensors": floats}, config=CONFIG, files=files)
    return source, plain


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(first: Path, second: Path) -> None:
    """Both hold the same tensors, bit for bit."""
    a, b = tensors_of(first), tensors_of(second)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor.view(-1).view(torch.uint8), b[name].view(-1).view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_float_model(box: Box, kind: str) -> None:
    source, plain = make_source(box.root, kind)
    plan = run_cli(
        "quantize", box.recipe, "--model", source, "--out", box.out, "--plan", "--json"
    ).json["plan"]
    assert plan["decoded"] == [
        {
            "format": KINDS[kind][2],
            "modules": 13,
            "bytes": sum(
                t.nbytes for n, t in tensors_of(source).items() if "proj" in n and "1.mlp.down" not in n
            ),
            "first": "model.layers.0.self_attn.q_proj",
        }
    ]
    assert f"decoded from {KINDS[kind][2]}: 13 modules" in plan["notes"]
    assert plan["bytes_before"] == sum(t.nbytes for t in tensors_of(source).values())
    rule = plan["rules"][0]
    kept = 2 * 16 * 32  # the float projection
    assert rule["bytes_before"] == plan["decoded"][0]["bytes"] + kept
    assert rule["modules"] == 14
    assert run_cli("quantize", box.recipe, "--model", source, "--out", box.out).code == 0
    other = box.root / "other"
    assert run_cli("quantize", box.recipe, "--model", plain, "--out", other).code == 0
    same(box.out, other)
    assert "quantization_config" not in json.loads((box.out / "config.json").read_text())
    assert run_cli("verify", box.out, "--full", "--against", source).code == 0
    found = run_cli("verify", box.out, "--against", source, "--json").json
    assert len(found["modules"]) == 14
    assert all(35 < module["sqnr_db"] < 60 for module in found["modules"])


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_and_workers_change_nothing(box: Box, kind: str) -> None:
    from quantcli.convert.execute import RunOptions, execute

    source, _ = make_source(box.root, kind)
    outs = []
    for workers, elements in ((1, 2**19), (3, 48)):
        out = box.root / f"{workers}"
        job = commands.plan(box.recipe, model=str(source), out=out)
        execute(job.plan, job.out, RunOptions(workers, block_elements=elements))
        outs.append((out / "model-00001-of-00001.safetensors").read_bytes())
    assert outs[0] == outs[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["bf16", "keep", "no rule"])
def test_a_plain_float_model(box: Box, kind: str, how: str) -> None:
    """Decoded weights in the serving dtype, whatever is said of them: none could be left as it is."""
    source, plain = make_source(box.root, kind)
    text = PLAIN if how == "bf16" else PLAIN.replace("bf16", "keep")
    if how == "no rule":
        text = PLAIN.replace('"*"', '"*.down_proj"')
    box.edit_recipe(text)
    assert run_cli("quantize", box.recipe, "--model", source, "--out", box.out).code == 0
    made, expected = tensors_of(box.out), tensors_of(plain)
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].bfloat16()), name
    assert "quantization_config" not in json.loads((box.out / "config.json").read_text())
    plan = run_cli(
        "quantize", box.recipe, "--model", source, "--out", box.root / "x", "--plan", "--json"
    )
    reasons = {kept["reason"] for kept in plan.json["plan"]["kept"]}
    before = sum(kept["bytes_before"] for kept in plan.json["plan"]["kept"])
    assert before == plan.json["plan"]["bytes_before"]
    assert {
        "bf16": "rules.0: bf16, decoded",
        "keep": "rules.0: keep, decoded",
        "no rule": "no rule matches: attention, decoded",
    }[how] in reasons
    assert run_cli("verify", box.out, "--full", "--against", source).code == 0


def test_bf16_is_the_serving_dtype_of_whole_modules(box: Box) -> None:
    """Of float32 models too: weights and biases of what the rule matches, and nothing else."""
    floats = {n: quantized.f32(np.ones(s, "f4") / 3) for n, (_, s, _) in llama().items()}
    floats["model.layers.0.mlp.up_proj.bias"] = quantized.f32(np.ones(32, "f4") / 3)
    make_model(box.model, {"model.safetensors": floats}, config={**CONFIG, "torch_dtype": "float16"})
    box.edit_recipe(PLAIN.replace('"*"', '"*_proj"'))
    assert box.run().code == 0
    for name, tensor in tensors_of(box.out).items():
        assert tensor.dtype == (torch.float16 if "_proj" in name else torch.float32), name
        assert torch.equal(
            tensor.float(), (torch.ones(()) / 3).to(tensor.dtype).float().expand_as(tensor)
        )
    floats["model.layers.0.mlp.up_proj.weight"] = quantized.f32(np.full((32, 16), 1e5, "f4"))
    make_model(box.model, {"model.safetensors": floats}, config={**CONFIG, "torch_dtype": "float16"})
    done = box.run("--force")
    assert done.code == 2
    assert "error: a value overflows F16, in which the model is served" in done.err
    assert "`model.layers.0.mlp.up_proj.weight`, rows from 0" in done.err


BACK = [
    ("ascend", "w8a8_dynamic", 1),
    ("ascend", "w8a16", 1),
    ("ascend", "w4a4_dynamic", 1),
    ("ascend", "fp8_dynamic", 1),
    ("compressed-tensors", "w8a8_dynamic", 1),
    ("compressed-tensors", "fp8_dynamic", 1),
    ("compressed-tensors", "fp8_tensor", None),
    ("fp8", "fp8_tensor", None),
    ("fp8", "fp8_block", 128),
    ("compressed-tensors", "fp8_block", 128),
]


@pytest.mark.parametrize(("target", "scheme", "rows"), BACK)
def test_there_and_back(tmp_path: Path, target: str, scheme: str, rows: int | None) -> None:
    """What this tool wrote comes back as its codes times its scales, whoever reads it.

    rows: that share a scale; None: all.
    """
    model = make_llama(tmp_path / "model", side=128)
    recipe, out, back = (tmp_path / name for name in ("recipe.yaml", "out", "back"))
    recipe.write_text(f'target: {target}\nrules:\n  - match: "*_proj"\n    scheme: {scheme}\n')
    assert run_cli("quantize", recipe, "--model", model, "--out", out).code == 0
    codes = tensors_of(out)
    for into in ("ascend", "compressed-tensors", "fp8"):
        recipe.write_text(PLAIN.replace("ascend", into))
        done = run_cli("quantize", recipe, "--model", out, "--out", back, "--force")
        assert done.code == 0, done.err
        floats = tensors_of(back)
        assert floats.keys() == tensors_of(model).keys()
        for name, tensor in floats.items():
            scale = codes.get(f"{name}_scale", codes.get(f"{name}_scale_inv"))
            expected = codes[name]
            if scale is not None:
                n, k = expected.shape
                wide = scale.reshape(1, 1) if rows is None else scale.repeat_interleave(rows, 0)
                if rows == 128:
                    wide = wide.repeat_interleave(rows, 1)
                expected = (expected.float() * wide.expand(n, k)).bfloat16()
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, expected), name
        assert "quantization_config" not in json.loads((back / "config.json").read_text())
        assert ("quant_model_description.json" in {p.name for p in back.iterdir()}) == (
            into == "ascend"
        )


def test_scales_that_are_not_finite_are_named(box: Box) -> None:
    source, _ = make_source(box.root, "fp8")
    tensors = load_file(source / "b.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight_scale_inv"
    tensors[name][0, 1] = struct.unpack("<f", struct.pack("<I", 0x7FC00000))[0]
    save_file(tensors, source / "b.safetensors")
    for text in (box.recipe.read_text(), PLAIN):
        box.edit_recipe(text)
        done = run_cli("quantize", box.recipe, "--model", source, "--out", box.out, "--fresh")
        assert done.code == 2
        assert "error: weight_scale_inv is nan" in done.err
        assert f"`{name}`[0, 1] in b.safetensors" in done.err


@pytest.mark.parametrize("kind", ["fp8", "awq"])
def test_calibrate(tmp_path: Path, kind: str) -> None:
    """A quantized model is shown text as the float one is that it stands for."""
    model = Models(tmp_path)("qwen3")
    stored = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    make, settings, _ = KINDS[kind]
    theirs: dict[str, Tensor] = {}
    for seed, (name, tensor) in enumerate(stored.items()):
        if name.endswith("_proj.weight"):
            tensors, weight = make(name.removesuffix(".weight"), *tensor.shape, seed)
            theirs |= tensors
            stored[name] = torch.from_numpy(weight)
        else:
            theirs[name] = "BF16", tuple(tensor.shape), bf16(tensor.float().numpy())
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    names = ("tokenizer.json", "tokenizer_config.json")
    source = make_model(
        tmp_path / "source",
        {"model.safetensors": theirs},
        config=config | {"quantization_config": settings},
        files={name: (model / name).read_text() for name in names},
    )
    outs = []
    for place, found in (("a", source), ("b", model)):
        (tmp_path / place).mkdir()
        bench = make_bench(tmp_path / place, found, STATIC)
        assert bench.calibrate().code == 0
        done = bench.run("--calibration", bench.store)
        assert done.code == 0, done.err
        outs.append(bench.out)
    same(*outs)


@pytest.mark.parametrize(
    ("recipe", "words"), [(None, "not rounding"), (PLAIN, "never rounded to codes")]
)
def test_compared_with_what_the_source_was_made_from(box: Box, recipe: str | None, words: str) -> None:
    """What the source has lost already is no fault of the conversion: the finding says it."""
    source, plain = make_source(box.root, "awq")
    if recipe is not None:
        box.edit_recipe(recipe)
    assert run_cli("quantize", box.recipe, "--model", source, "--out", box.out).code == 0
    (file,) = plain.glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    before = {
        name: tensor + 0.2 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if "proj" in name and "layers.1.mlp.down_proj" not in name
        else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(before, file, metadata={"format": "pt"})
    done = run_cli("verify", box.out, "--against", plain, "--json")
    assert done.code == 1
    (found, *others) = [f for f in done.json["findings"] if f["check"] == "sqnr"]
    assert len(others) == 12
    assert words in found["fix"]
    assert "made from a quantized model, compare with that one" in found["fix"]


def test_outliers_count_the_bytes_that_are_read(box: Box) -> None:
    from quantcli.commands.inspect import outliers
    from quantcli.core.events import Progress

    class Counted(Progress):
        todo = done = 0

        def begin(self, nbytes: int, shards: int) -> None:
            self.todo = nbytes

        def advance(self, nbytes: int) -> None:
            self.done += nbytes

    source, _ = make_source(box.root, "awq")
    counted = Counted()
    found = outliers(str(source), counted)
    names = {module["module"] for module in found["modules"]}
    stored = {n: t.nbytes for n, t in tensors_of(source).items() if n.rpartition(".")[0] in names}
    assert counted.todo == counted.done == sum(stored.values())
