"""Stacks of experts: each layout against a transcription by index, split, read by rows, and merged."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantcli.checkpoint import columns
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.header import read_header
from quantcli.checkpoint.tensors import read_rows, read_span, read_tensor, tensor_bytes
from quantcli.core.errors import InputError
from quantcli.sources import expert_stack
from quantcli.sources.decode import decoded
from quantcli.sources.expert_stack import ExpertMatrix, Stack
from quantcli.sources.stacked import EXPERTS, merged_experts, split_experts
from tests.builders import make_model, tensor
from tests.tiny_models import FAMILIES, STACKED, make_tiny

E, H, I = 3, 10, 6  # noqa: E741 - H, I and 2 I differ
GATED, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
STACKS = {
    "halves of rows": Stack("x", GATED, "inputs"),
    "interleaved rows": Stack("x", GATED, "inputs", interleaved=True),
    "halves of columns": Stack("x", GATED, "inputs", transposed=True),
    "interleaved columns": Stack("x", GATED, "inputs", transposed=True, interleaved=True),
    "down": Stack("x", DOWN, "outputs"),
    "down, transposed": Stack("x", DOWN, "outputs", transposed=True),
    "one after another": Stack("x", DOWN, "outputs", flat=True),
    "one after another, transposed": Stack("x", DOWN, "outputs", transposed=True, flat=True),
    "three in one": Stack("x", (*GATED, "third_proj"), "inputs", interleaved=True),
}
SHAPES = {
    "halves of rows": (E, 2 * I, H), "interleaved rows": (E, 2 * I, H),
    "halves of columns": (E, H, 2 * I), "interleaved columns": (E, H, 2 * I),
    "down": (E, H, I), "down, transposed": (E, I, H), "one after another": (E * H, I),
    "one after another, transposed": (E * I, H), "three in one": (E, 3 * I, H),
}  # fmt: skip


def drawn(shape, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def by_index(layout, values, expert, projection):
    """The matrix [n, k] of an expert, element by element as the layout says."""
    n, k = (H, I) if layout.startswith(("down", "one")) else (I, H)
    matrix = torch.empty(n, k, dtype=values.dtype)
    for i in range(n):
        for j in range(k):
            if layout == "halves of rows":
                matrix[i, j] = values[expert, projection * I + i, j]
            elif layout == "interleaved rows":
                matrix[i, j] = values[expert, 2 * i + projection, j]
            elif layout == "three in one":
                matrix[i, j] = values[expert, 3 * i + projection, j]
            elif layout == "halves of columns":
                matrix[i, j] = values[expert, j, projection * I + i]
            elif layout == "interleaved columns":
                matrix[i, j] = values[expert, j, 2 * i + projection]
            elif layout == "down":
                matrix[i, j] = values[expert, i, j]
            elif layout == "down, transposed":
                matrix[i, j] = values[expert, j, i]
            elif layout == "one after another":
                matrix[i, j] = values[expert * H + i, j]
            else:
                matrix[i, j] = values[expert * I + j, i]
    return matrix


def stored_in(folder, values):
    """The tensor on disk, behind another one."""
    save_file({"a": drawn((7,), torch.float32), "x": values}, folder / "m.safetensors")
    return next(s for s in read_header(folder / "m.safetensors")[0] if s.spec.name == "x")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request):
    return request.param


@pytest.mark.parametrize("layout", STACKS)
def test_matrices_are_those_of_the_layout(layout, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "STRIP_BYTES", 8 * H)  # so that there are several strips
    monkeypatch.setattr(columns, "_CHUNK_BYTES", 50)  # of one or two whole rows
    monkeypatch.setattr(columns, "_PIECE", 3)
    values, stack = drawn(SHAPES[layout], dtype), STACKS[layout]
    matrices = stack.matrices(stored_in(tmp_path, values), "l.experts", E)
    names = [matrix.spec.name for matrix in matrices]
    assert names == [f"l.experts.{e}.{p}.weight" for e in range(E) for p in stack.projections]
    for number, matrix in enumerate(matrices):
        expected = by_index(layout, values, *divmod(number, len(stack.projections)))
        n = len(expected)
        assert matrix.spec.shape == expected.shape
        assert matrix.nbytes == expected.nbytes
        assert torch.equal(read_tensor(matrix), expected)
        for start, count in ((0, 1), (1, 3), (n - 2, 2), (n - 1, 5)):
            assert torch.equal(read_span(matrix, start, count), expected[start : start + count])
        with matrix.open() as reader:  # in no order
            for start in (n - 3, 0, 2):
                assert torch.equal(reader.weight(start, 3), expected[start : start + 3])
        assert torch.equal(read_rows(matrix, [n - 1, 1]), expected[[n - 1, 1]])


@pytest.mark.parametrize("layout", STACKS)
def test_split_and_merged_are_the_bytes_on_disk(layout, dtype, tmp_path):
    values, stack = drawn(SHAPES[layout], dtype), STACKS[layout]
    matrices = stack.matrices(stored_in(tmp_path, values), "l.experts", E)
    merged = stack.merge([read_tensor(matrix) for matrix in matrices])
    assert merged.shape == values.shape
    assert bytes(tensor_bytes(merged)) == bytes(tensor_bytes(values))


@pytest.mark.parametrize("layout", STACKS)
def test_a_row_costs_no_more_than_it_spans(layout, tmp_path, monkeypatch):
    """Of the stack of all experts only a few rows are read, or a strip of columns."""
    wide = tuple(side * 16 for side in SHAPES[layout][-2:])
    shape = wide if STACKS[layout].flat else (E, *wide)
    monkeypatch.setattr(columns, "STRIP_BYTES", 4 * max(wide))
    matrices = STACKS[layout].matrices(stored_in(tmp_path, drawn(shape)), "e", E)
    sizes, pread = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: sizes.append(pread(*args)) or sizes[-1])
    read_span(matrices[-1], 5, 1)
    row = 2 * matrices[-1].spec.shape[1]
    assert row <= sum(sizes) <= max(row, 4 * max(wide))


def test_every_byte_of_a_stack_is_in_one_matrix(tmp_path):
    for layout, stack in STACKS.items():
        stored = stored_in(tmp_path, drawn(SHAPES[layout]))
        matrices = stack.matrices(stored, "e", E)
        assert sum(matrix.nbytes for matrix in matrices) == stored.nbytes


# -- families ------------------------------------------------------------------------------------


# a tiny model for each entry; those of several parts stand for their language models
MODELS = [family for family in (*FAMILIES, *STACKED) if family in EXPERTS]
# parameters of transformers that multiply with [k, n]
TRANSPOSED = ("aria_text", "llama4_text", "gpt_oss")


def test_every_entry_has_a_model():
    stacks = {family: tuple(layout.stacks for layout in layouts) for family, layouts in EXPERTS.items()}
    assert {stacks[family] for family in MODELS} == {*stacks.values()}


def model_of(checkpoint):
    """The model that transformers itself makes of a checkpoint."""
    import transformers

    (name,) = checkpoint.config.texts("architectures")
    return getattr(transformers, name).from_pretrained(checkpoint.path, dtype=torch.bfloat16)


@pytest.mark.parametrize("published", [True, False], ids=["published", "saved"])
@pytest.mark.parametrize("family", [family for family in MODELS if family != "dbrx"])
def test_an_entry_is_what_the_library_makes_of_the_file(family, published, tmp_path):
    """transformers renames and turns the stacks by its own table."""
    path = make_tiny(tmp_path / "m", family, published=published)
    checkpoint = split_experts(open_checkpoint(path))
    parameters = dict(model_of(checkpoint).named_parameters())
    found = 0
    for name, stored in checkpoint.tensors.items():
        if not isinstance(stored, ExpertMatrix):
            continue
        experts, expert, projection, _ = name.rsplit(".", 3)
        if family == "step3p7":  # parameters have other names than tensors
            experts = experts.replace(".moe.", ".mlp.").replace("model.", "model.language_model.")
        if family == "inkling2_text":
            experts = experts.replace("model.llm.", "model.")
        fused = "down_proj" if projection == "down_proj" else "gate_up_proj"
        expected = parameters[f"{experts}.{fused}"][int(expert)]
        if family in TRANSPOSED:
            expected = expected.t()
        if projection not in ("down_proj", "gate_up_proj"):
            expected = expected.chunk(2)[projection == "up_proj"]
        assert torch.equal(read_tensor(stored), expected), name
        found += 1
    one_by_one = family == "qwen3_5_moe" and not published
    layers = 0 if one_by_one else checkpoint.text_config.size("num_hidden_layers")
    assert found == layers * 8 * (2 if family == "gpt_oss" else 3)  # experts, projections


def test_the_flat_experts_of_dbrx_are_what_the_library_multiplies_with(tmp_path):
    """By what each expert makes of the rows of a unit matrix."""
    path = make_tiny(tmp_path / "m", "dbrx")
    split = split_experts(open_checkpoint(path))
    layer = model_of(split).transformer.blocks[2].ffn.experts
    unit = torch.eye(64, dtype=torch.bfloat16)
    for expert in range(8):
        gate, up, down = (
            read_tensor(split.tensors[f"transformer.blocks.2.ffn.experts.{expert}.{name}_proj.weight"])
            for name in ("gate", "up", "down")
        )
        ours = torch.nn.functional.linear(
            layer.mlp.activation_fn(unit @ gate.t()) * (unit @ up.t()), down
        )
        chosen = torch.full((64, 1), expert)
        theirs = layer(unit, chosen, torch.ones(64, 1, dtype=torch.bfloat16))
        assert torch.equal(ours, theirs.squeeze(1))


@pytest.mark.parametrize("family", MODELS)
def test_names_of_single_experts_are_merged_to_what_is_on_disk(family, tmp_path):
    checkpoint = open_checkpoint(make_tiny(tmp_path / "m", family))
    on_disk = load_file(tmp_path / "m" / "model.safetensors")
    split = split_experts(checkpoint)
    merged = list(merged_experts(split))
    stacks = EXPERTS[family][0].stacks
    layers = checkpoint.text_config.size("n_layers" if family == "dbrx" else "num_hidden_layers")
    assert len(merged) == len(stacks) * layers
    for stack in merged:
        values = stack.stack.merge([read_tensor(matrix) for matrix in stack.matrices])
        assert torch.equal(values, on_disk[stack.name])
    kept = {n for n, t in split.tensors.items() if not isinstance(t, ExpertMatrix)}
    assert kept | {stack.name for stack in merged} == on_disk.keys()
    assert list(merged_experts(checkpoint)) == []  # nothing to merge


@given(
    layouts=st.sampled_from(sorted(EXPERTS.values(), key=repr)),
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=3, unique=True),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_split_and_merged_are_the_bytes_of_any_sizes(layouts, sizes, seed, tmp_path_factory):
    """H, I and 2 I all differ."""
    experts, hidden, width = sizes
    assume(2 * width != hidden)
    generator = torch.Generator().manual_seed(seed)
    for layout in layouts:
        values = {}
        for stack in layout.stacks:
            inner = width * (2 if stack.joined else len(stack.projections))
            sides = (inner, hidden) if stack.hidden == "inputs" else (hidden, width)
            sides = sides[::-1] if stack.transposed else sides
            shape = (experts * sides[0], sides[1]) if stack.flat else (experts, *sides)
            values[f"l.{stack.name}"] = torch.randn(shape, generator=generator).bfloat16()
        folder = tmp_path_factory.mktemp("stacks")
        save_file(values, folder / "model.safetensors")
        kind = next(kind for kind, entry in EXPERTS.items() if entry == layouts)
        config = {"model_type": kind, layout.hidden: hidden, "num_experts": experts}
        (folder / "config.json").write_text(json.dumps(config))
        split = split_experts(open_checkpoint(folder))
        assert not split.tensors.keys() & values.keys()
        numbers = {name: read_tensor(stored) for name, stored in split.tensors.items()}
        assert sum(matrix.numel() for matrix in numbers.values()) == sum(
            v.numel() for v in values.values()
        )
        for stack in layout.stacks:
            names = [
                f"l.{layout.experts}.{expert}.{projection}.weight"
                for expert in range(experts)
                for projection in stack.projections
            ]
            merged = stack.merge([numbers[name] for name in names])
            assert bytes(tensor_bytes(merged)) == bytes(tensor_bytes(values[f"l.{stack.name}"]))


def test_a_set_that_lacks_a_matrix_is_not_merged(tmp_path):
    split = split_experts(open_checkpoint(make_tiny(tmp_path / "m", "granitemoe")))
    experts = "model.layers.1.block_sparse_moe.experts"
    del split.tensors[f"{experts}.3.up_proj.weight"]
    names = {stack.name for stack in merged_experts(split)}
    assert "model.layers.1.block_sparse_moe.input_linear.weight" not in names
    assert "model.layers.1.block_sparse_moe.output_linear.weight" in names
    assert len(names) == 5


NAME = "model.layers.0.block_sparse_moe.input_linear.weight"
CONFIG = {"model_type": "granitemoe", "hidden_size": 8, "num_local_experts": 2}
NO_COUNT = {"model_type": "granitemoe", "hidden_size": 8}
OUTPUTS = "model.layers.0.block_sparse_moe.output_linear.weight"
OTHER = {OUTPUTS: tensor("BF16", 2, 8, 6)}


def model_with(folder, *shape, dtype="BF16", name=NAME, config=CONFIG, **others):
    shards = {"model.safetensors": {name: tensor(dtype, *shape), **others}}
    return open_checkpoint(make_model(folder, shards, config=config))


def test_a_split_checkpoint_is_the_same_model(tmp_path):
    checkpoint = model_with(tmp_path, 2, 12, 8, **OTHER, **{"model.norm.weight": tensor("BF16", 8)})
    split = decoded(checkpoint)
    assert list(split.on_disk) == [NAME, *OTHER, "model.norm.weight"]
    assert (split.fingerprint, split.nbytes) == (checkpoint.fingerprint, checkpoint.nbytes)
    assert sum(spec.numel for spec in split.specs()) == 3 * 2 * 6 * 8 + 8
    shapes = ["BF16 [6, 8]"] * 4 + ["BF16 [8, 6]"] * 2 + ["BF16 [8]"]
    assert [str(spec) for spec in split.specs()] == shapes
    assert split.notes[-1].endswith("`model.layers.0.block_sparse_moe.experts.0.gate_proj`")
    assert decoded(split) is split


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((2, 11, 8), r"is BF16 \[2, 11, 8\]; `granitemoe` stores experts as \[experts, 2 x n, k\]"),
        ((12, 8), r"is BF16 \[12, 8\]"),
        ((2, 3, 12, 8), r"is BF16 \[2, 3, 12, 8\]"),
        ((0, 12, 8), r"is BF16 \[0, 12, 8\]"),
        ((2, 8, 12), r"with k the `hidden_size` of config.json, 8"),  # transposed
        ((expert_stack._MOST_EXPERTS + 1, 2, 1), r"is BF16 \[65537"),
    ],
)
def test_shapes_that_no_such_stack_has_are_refused(tmp_path, shape, says):
    with pytest.raises(InputError, match=says) as caught:
        decoded(model_with(tmp_path, *shape))
    assert NAME in caught.value.where
    assert "model.safetensors" in caught.value.where


@pytest.mark.parametrize(
    "part", ["1.up_proj.weight", "9.up_proj.weight", "0.w1.weight", "0.up_proj.bias"]
)
def test_a_stack_next_to_single_experts_is_refused(tmp_path, part):
    name = f"model.layers.0.block_sparse_moe.experts.{part}"
    with pytest.raises(InputError, match=rf"experts\.{part}` is there as well"):
        decoded(model_with(tmp_path, 2, 12, 8, **OTHER, **{name: tensor("BF16", 6, 8)}))


@pytest.mark.parametrize(
    ("shape", "others", "says"),
    [
        ((2, 12, 8), {}, r"output_linear\.weight` is missing"),
        (
            (2, 12, 8),
            {OUTPUTS: tensor("BF16", 3, 8, 6)},
            r"\[3, 8, 6\], and does not fit .* \[2, 12, 8\]",
        ),
        (
            (2, 12, 8),
            {OUTPUTS: tensor("BF16", 2, 8, 5)},
            r"\[2, 8, 5\], and does not fit .* \[2, 12, 8\]",
        ),
    ],
)
def test_stacks_that_make_no_experts_together_are_refused(tmp_path, shape, others, says):
    with pytest.raises(InputError, match=says):
        decoded(model_with(tmp_path, *shape, config=NO_COUNT, **others))


@pytest.mark.parametrize("count", [1, 3, 2**40])
def test_another_number_of_experts_in_config_is_refused(tmp_path, count):
    config = {**CONFIG, "num_local_experts": count}
    with pytest.raises(InputError, match=f"config.json has {count} in `num_local_experts`"):
        decoded(model_with(tmp_path, 2, 12, 8, config=config, **OTHER))


@pytest.mark.parametrize("kind", ["llama", None])
def test_other_families_are_left_alone(tmp_path, kind):
    checkpoint = model_with(tmp_path, 2, 11, 8, config={**CONFIG, "model_type": kind})
    assert split_experts(checkpoint) is checkpoint


@pytest.mark.parametrize("count", ["2", 2.0, True, -1, {"a": 2}, [2, "2"], [[2]]])
@pytest.mark.parametrize("kind", ["granitemoe", "llama"])
def test_a_number_of_experts_of_another_type_is_refused(tmp_path, kind, count):
    config = {**CONFIG, "num_local_experts": count, "model_type": kind}
    with pytest.raises(InputError, match=r"num_local_experts` (is .*, not|should be) a (whole )?n"):
        decoded(model_with(tmp_path, 2, 12, 8, config=config, **OTHER))


def test_the_language_model_of_several_parts_decides(tmp_path):
    config = {"model_type": "any", "text_config": CONFIG}
    split = split_experts(model_with(tmp_path, 2, 12, 8, config=config, **OTHER))
    assert len(split.tensors) == 6
