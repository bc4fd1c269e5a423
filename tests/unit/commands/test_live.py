"""A transformers model in memory as the source of a conversion."""

import gc
import hashlib
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import quantcli
from quantcli.checkpoint.memory import MemoryFile, Span
from quantcli.commands import live
from quantcli.core.events import SILENT
from tests.e2e.calibrating import TEXT, write_tokenizer
from tests.tiny_models import build_tiny

DYNAMIC = {
    "target": "ascend",
    "rules": [{"role": ["attention", "mlp", "expert"], "scheme": "w8a8_dynamic", "optional": True}],
}
STATIC = {
    "target": "ascend",
    "calibration": {"samples": 4, "length": 16},
    "rules": [{"role": ["attention", "mlp"], "scheme": {"name": "w8a8_static", "observer": "minmax"}}],
}


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def one_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()


@pytest.fixture(scope="module")
def llama():
    return build_tiny("llama").to(torch.bfloat16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


# step3p7 and inkling2 have weights that are computed from several parameters
@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "step3p7", "inkling2_text"])
def test_the_bytes_are_those_of_the_saved_model(tmp_path, family):
    """Tied heads, experts taken apart, weights that are computed, other names."""
    model = build_tiny(family).to(torch.bfloat16)
    config, before = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    quantcli.quantize(DYNAMIC, model=model, out=tmp_path / "live", workers=2)
    assert model.config.to_dict() == config
    model.save_pretrained(tmp_path / "model")
    quantcli.quantize(DYNAMIC, model=tmp_path / "model", out=tmp_path / "saved")
    assert digests(tmp_path / "live") == digests(tmp_path / "saved")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    gc.collect()
    assert [*(tmp_path / "temporary").glob("quantcli-*")] == []


def test_a_loaded_model_is_saved_as_it_was(tmp_path):
    """from_pretrained notes how it changed the names, and which experts it put together."""
    from transformers import AutoModelForCausalLM

    build_tiny("mixtral").half().save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    checkpoint = live.live_checkpoint(loaded, None, SILENT)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert checkpoint.tensors.keys() == saved.keys()
    for name, stored in checkpoint.tensors.items():
        with stored.open() as rows:
            assert torch.equal(rows.weight(0, 2**20).view(saved[name].shape), saved[name]), name
    config = (tmp_path / "model" / "config.json").read_bytes()
    assert (checkpoint.path / "config.json").read_bytes() == config


@pytest.fixture(scope="module")
def calibrated(llama, tokenizer, tmp_path_factory):
    """A saved model and its conversion with ranges from a text."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "text.txt").write_text(TEXT)
    llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    recipe = {**STATIC, "calibration": {**STATIC["calibration"], "data": str(folder / "text.txt")}}
    written = quantcli.quantize(recipe, model=folder / "model", out=folder / "out")
    return SimpleNamespace(recipe=recipe, model=folder / "model", out=written.out)


def test_a_calibration_runs_the_model_in_memory(calibrated, llama, tokenizer, tmp_path):
    job = quantcli.prepare(calibrated.recipe, llama, tokenizer=tokenizer, out=tmp_path / "out")
    assert job.plan.model == "LlamaForCausalLM"
    job.calibrate()
    assert digests(job.convert().out) == digests(calibrated.out)


def test_example_inputs(calibrated, llama, tmp_path):
    """Ids in every form are the same data, for a folder as for a model in memory."""
    from transformers import BatchEncoding

    ids = torch.arange(40).view(2, 20) % 90 + 4
    ragged = [ids[0].tolist(), ids[1, :12].tolist()]
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 12:] = 0
    forms = [
        ragged,
        [torch.tensor(row) for row in ragged],
        [{"input_ids": row} for row in ragged],
        {"input_ids": ids, "attention_mask": mask},
        [BatchEncoding({"input_ids": ids, "attention_mask": mask})],
    ]
    out = tmp_path / "out"
    job = quantcli.prepare(STATIC, llama, forms[0], out=out)
    assert (job.plan.calibration["samples"], job.plan.calibration["length"]) == (2, 20)
    tokens = {row["tokens"] for row in job.calibrate().modules}
    assert tokens == {32}
    for form in forms:
        assert quantcli.plan(STATIC, model=llama, out=out, example_inputs=form).calibration["complete"]
    in_folder = tmp_path / "in_folder"
    written = quantcli.quantize(STATIC, model=calibrated.model, out=in_folder, example_inputs=ragged)
    converted = digests(job.convert().out)
    assert {
        n: d for n, d in digests(written.out).items() if n in converted and "tokenizer" not in n
    } == {n: d for n, d in converted.items() if "manifest" not in n} | {
        "quantcli_manifest.json": digests(written.out)["quantcli_manifest.json"]
    }
    recipe = (out / "quantcli_recipe.yaml").read_text()
    assert "data: example_inputs" in recipe
    assert "samples: 2\n" in recipe
    # other ids are other data
    with pytest.raises(quantcli.InputError, match="calibration"):
        quantcli.plan(STATIC, model=llama, out=tmp_path / "in_folder2", example_inputs=[[5, 6]],
                      calibration=tmp_path / "out.calibration")  # fmt: skip


def test_texts_as_example_inputs(calibrated, llama, tokenizer, tmp_path):
    texts = ["A short text.", "Another one, which is longer than the sixteen tokens."]
    given = {"example_inputs": texts, "out": tmp_path / "out"}
    by_text = quantcli.calibrate(STATIC, model=llama, tokenizer=tokenizer, **given)
    ids = [tokenizer(text)["input_ids"][:16] for text in texts]
    by_ids = quantcli.calibrate(STATIC, model=llama, example_inputs=ids, out=tmp_path / "ids")
    assert by_text.modules == by_ids.modules
    with pytest.raises(quantcli.InputError, match="the model has no tokenizer") as error:
        quantcli.calibrate(STATIC, model=llama, example_inputs=texts, out=tmp_path / "none")
    assert error.value.fix == "give the `tokenizer` of the model, or token ids"
    with pytest.raises(quantcli.InputError, match="all parts need one calibration") as error:
        quantcli.plan(STATIC, model=llama, example_inputs=ids, out=tmp_path / "parts", part="1/2")
    assert error.value.fix.startswith("call `calibrate` with the same recipe, model and data once")


@pytest.mark.parametrize(
    ("examples", "what"),
    [
        ("a text", "is one text"),
        ([], "is empty"),
        (3, "`example_inputs` is 3"),
        ([[]], "has no tokens"),
        ([[1, 2.5]], "not a token id"),
        ([[1, -2]], "not a token id"),
        ([[1, True]], "not a token id"),
        ([{"ids": [1]}], "`input_ids` is missing"),
        ([3], "a sample is a int"),
        ([[1, [2]]], "several depths"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "another shape"),
        ([[1, 200]], "token 200 in sample 1 is beyond"),
        ([[1] * 300], "longer than the model's 256 positions"),
    ],
)
def test_examples_that_are_none(llama, tmp_path, examples, what):
    with pytest.raises(quantcli.InputError, match=what):
        quantcli.calibrate(STATIC, model=llama, example_inputs=examples, out=tmp_path / "out")


def test_examples_that_nothing_needs(llama, tmp_path):
    with pytest.raises(quantcli.InputError, match="nothing in this recipe needs a calibration"):
        quantcli.prepare(DYNAMIC, llama, [[1, 2]], out=tmp_path / "out")


class _Sharded(torch.Tensor):
    pass


def changed(**attributes):
    """A tiny model with other attributes."""
    model = build_tiny("llama")
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def sharded():
    model = build_tiny("llama")
    weight = model.model.norm.weight.detach().as_subclass(_Sharded)
    model.state_dict = lambda: {"model.norm.weight": weight}
    return model


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: nn.Linear(2, 2), "is a Linear, not a transformers model"),
        (lambda: changed(merge_and_unload=None), "has an adapter"),
        (lambda: changed(hf_quantizer=object()), "is quantized"),
        (lambda: build_tiny("llama").to("meta"), "is not in memory"),
        (sharded, "is a _Sharded: its values are not in one place"),
        (lambda: object(), "`model` is <object"),
    ],
)
def test_models_that_cannot_be_read(tmp_path, make, what):
    with pytest.raises(quantcli.InputError, match=what):
        quantcli.plan(DYNAMIC, model=make(), out=tmp_path / "out")
    assert [*(tmp_path / "temporary").glob("quantcli-*")] == []


def test_a_tokenizer_for_a_folder(tmp_path, tokenizer):
    with pytest.raises(quantcli.InputError, match="only for a model in memory"):
        quantcli.plan(DYNAMIC, model=tmp_path, tokenizer=tokenizer)


def test_a_run_continues_with_the_same_weights_alone(tmp_path):
    model = build_tiny("llama").to(torch.bfloat16)

    def stop(event):
        if event.kind == "file":
            raise KeyboardInterrupt

    recipe, out = {**DYNAMIC, "max_shard": "30KB"}, tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantcli.quantize(recipe, model=model, out=out, on_progress=stop, workers=1)
    assert quantcli.plan(recipe, model=model, out=out).shards_done > 0
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    with pytest.raises(quantcli.InputError):
        quantcli.quantize(recipe, model=model, out=out)
    assert quantcli.quantize(recipe, model=model, out=out, fresh=True).shards_reused == 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24).view(4, 6),
        torch.arange(24).view(4, 6).t(),
        torch.arange(60, dtype=torch.bfloat16).view(3, 4, 5).transpose(1, 2),
        torch.arange(60, dtype=torch.int16).view(3, 4, 5)[:, 1:3, ::2],
        torch.arange(12, dtype=torch.float32)[::3],
        torch.tensor(7.0)[None].expand(3),
    ],
)
def test_bytes_of_a_tensor_with_any_strides(tmp_path, monkeypatch, tensor):
    monkeypatch.setattr("quantcli.checkpoint.memory._PIECE", 8)
    expected = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    size = len(expected)
    file = MemoryFile.of(tmp_path / "f", [Span(3, 3 + size, lambda: tensor)], None)
    for start in range(size):
        for stop in range(start + 1, size + 1):
            block = bytearray(stop - start)
            assert file.read(3 + start, memoryview(block)) == stop - start
            assert block == expected[start:stop]
    assert file.read(2, memoryview(bytearray(1))) == file.read(3 + size, memoryview(bytearray(1))) == 0
    assert Path(file) == tmp_path / "f"
