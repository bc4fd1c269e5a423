"""MXFP4 experts of gpt-oss: against a decoder by element, against transformers, and damage."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from quantcli.checkpoint import columns
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.tensors import read_rows, read_span, read_tensor
from quantcli.core.errors import InputError
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
from quantcli.sources.decode import decoded
from tests.builders import make_model, tensor

E, N, K = 3, 10, 96  # experts, rows as stored, inputs
LAYER = "model.layers.0.mlp.experts"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def drawn(exponents=(0, 255)):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (E, N, K // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(*exponents, (E, N, K // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales


def model(folder, blocks, scales, dtype="bfloat16", **others):
    """The first stack with rows of gate and up, the second with as many rows as hidden states."""
    config = {
        "model_type": "gpt_oss", "hidden_size": K, "num_local_experts": E, "dtype": dtype,
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    down = torch.zeros(E, K, 1, 16, dtype=torch.uint8)
    tensors = {
        "gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales,
        "down_proj_blocks": down, "down_proj_scales": torch.full((E, K, 1), 127, dtype=torch.uint8),
        **others,
    }  # fmt: skip
    made = make_model(folder, {"model.safetensors": {"a": tensor("BF16", 1)}}, config=config)
    stored = {f"{LAYER}.{name}": values for name, values in tensors.items() if values is not None}
    save_file(stored, made / "model.safetensors")
    return open_checkpoint(made)


def by_element(blocks, scales, expert, row, column):
    group, place = divmod(column, 32)
    octet = int(blocks[expert, row, group, place // 2])
    code = octet & 15 if place % 2 == 0 else octet >> 4
    sign = -1 if code >= 8 else 1
    return math.ldexp(sign * VALUES[code % 8], int(scales[expert, row, group]) - 127)


@pytest.fixture
def sound(tmp_path):
    # gate_up_proj has 2 I rows, down_proj I = 32 inputs: so N must be 64 there
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (E, 64, K // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (E, 64, K // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales, model(tmp_path / "m", blocks, scales)


def test_numbers_are_those_of_a_decoder_by_element(sound, monkeypatch):
    monkeypatch.setattr(columns, "STRIP_BYTES", 64 * 5)
    blocks, scales, checkpoint = sound
    split = decoded(checkpoint)
    stack = split.tensors[f"{LAYER}.0.gate_up_proj.weight"].stack
    assert str(stack.spec) == f"F32 [{E}, {K}, 64]"
    whole = read_tensor(stack)
    for expert in range(E):
        matrix = split.tensors[f"{LAYER}.{expert}.gate_up_proj.weight"]
        assert matrix.spec.shape == (64, K)
        rows = read_tensor(matrix)
        for row in range(0, 64, 7):
            for column in range(K):
                expected = by_element(blocks, scales, expert, row, column)
                assert float(rows[row, column]) == expected
                assert float(whole[expert, column, row]) == expected
        assert torch.equal(whole[expert], rows.t())
        assert torch.equal(read_rows(matrix, [63, 2]), rows[[63, 2]])
    assert torch.equal(read_span(stack, 1, 5), whole[1:])


def test_any_rows_of_all_matrices(sound):
    """Rows that begin and end within a byte, and within another expert."""
    _, _, checkpoint = sound
    stack = decoded(checkpoint).tensors[f"{LAYER}.0.gate_up_proj.weight"].stack
    whole = read_tensor(stack).view(E * K, 64)
    flat = replace(stack, spec=replace(stack.spec, shape=(E * K, 64)))
    with flat.open() as reader:
        for start, count in ((0, 1), (1, 2), (K - 3, 7), (2 * K + 31, 2), (5, 2 * K), (E * K - 1, 9)):
            assert torch.equal(reader.weight(start, count), whole[start : start + count])


def test_numbers_are_those_of_the_library(sound):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales, checkpoint = sound
    stack = decoded(checkpoint).tensors[f"{LAYER}.0.gate_up_proj.weight"].stack
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert expected.shape == (E, K, 64)
    assert torch.equal(read_tensor(stack).bfloat16(), expected)


def test_bytes_on_disk_are_counted_once(sound):
    _, _, checkpoint = sound
    split = decoded(checkpoint)
    assert split.nbytes == checkpoint.nbytes
    assert sum(stored.nbytes for stored in split.tensors.values()) == checkpoint.nbytes
    assert split.fingerprint == checkpoint.fingerprint
    assert any("decoded from mxfp4 in groups of 32" in note for note in split.notes)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"gate_up_proj_scales": None}, "means nothing without .*gate_up_proj_scales"),
        ({"gate_up_proj_blocks": None}, "means nothing without .*gate_up_proj_blocks"),
        ({"down_proj_scales": torch.zeros(E, K, 2, dtype=torch.uint8)}, r"is U8 \[3, 96, 2\]"),
        ({"down_proj_scales": torch.zeros(E, K, 1)}, r"is F32 \[3, 96, 1\]"),
        ({"down_proj_blocks": torch.zeros(E, K, 16, dtype=torch.uint8)}, r"is U8 \[3, 96, 16\]"),
        ({"down_proj_blocks": torch.zeros(E, K, 1, 8, dtype=torch.uint8)}, r"is U8 \[3, 96, 1, 8\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(sound, tmp_path, changed, says):
    blocks, scales, _ = sound
    with pytest.raises(InputError, match=says):
        decoded(model(tmp_path / "damaged", blocks, scales, **changed))


def test_stacks_that_do_not_fit_together_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not fit"):  # 10 rows are not 2 x 32
        decoded(model(tmp_path / "m", *drawn()))


RECIPE = 'target: compressed-tensors\nrules: [{match: "*", scheme: bf16}]\n'


def test_a_scale_of_nan_is_an_error_that_names_the_tensor(sound, tmp_path):
    blocks, scales, _ = sound
    scales = scales.clone()
    scales[1, 5, 2] = 255
    split = decoded(model(tmp_path / "nan", blocks, scales))
    matrix = split.tensors[f"{LAYER}.1.gate_up_proj.weight"]
    with pytest.raises(InputError, match="255, which stands for NaN") as caught:
        read_tensor(matrix)
    assert f"`{LAYER}.gate_up_proj_scales`" in caught.value.where
    with pytest.raises(InputError, match="255"):
        read_tensor(matrix.stack)
    assert read_tensor(split.tensors[f"{LAYER}.0.gate_up_proj.weight"]).isfinite().all()


def test_the_plan_has_the_float_stacks(sound, tmp_path):
    _, _, checkpoint = sound
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)
    (shard,) = make_plan(load_recipe(recipe), checkpoint).shards
    specs = {spec.name: str(spec) for spec in shard.tensors}
    assert specs == {
        f"{LAYER}.gate_up_proj": f"BF16 [{E}, {K}, 64]", f"{LAYER}.down_proj": f"BF16 [{E}, 32, {K}]"
    }  # fmt: skip
