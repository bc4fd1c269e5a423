"""Names of float modules in the spellings of engines: all of them, and none of a quantized module."""

import re

import pytest

from quantcli.targets.names import ignored
from quantcli.targets.spellings import float_towers, of_no_module, skip_list, spellings

OLD, NEW = "language_model.model.layers", "model.language_model.layers"


def skips(entries, name):
    """Whether transformers 5 takes a module for float because of entries of modules_to_not_convert."""
    return any(
        re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(entry) for entry in entries
    )


def ignores(entries, name):
    """Whether compressed-tensors does, because of entries of `ignore`."""
    return any(
        re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name
        for entry in entries
    )


@pytest.mark.parametrize(
    ("module", "others"),
    [
        (f"{OLD}.0.mlp.up_proj", {f"{NEW}.0.mlp.up_proj", "model.layers.0.mlp.up_proj"}),
        (f"{NEW}.0.mlp.up_proj", {f"{OLD}.0.mlp.up_proj", "model.layers.0.mlp.up_proj"}),
        ("model.layers.7.mlp.up_proj", {f"{OLD}.7.mlp.up_proj", f"{NEW}.7.mlp.up_proj"}),
        ("language_model.lm_head", {"lm_head"}),
        ("lm_head", {"language_model.lm_head"}),
        ("visual.merger.mlp.0", {"model.visual.merger.mlp.0"}),
        ("model.visual.merger.mlp.0", {"visual.merger.mlp.0"}),
        (
            "vision_tower.vision_model.head.mlp.fc1",
            {
                "vision_tower.head.mlp.fc1",
                "model.vision_tower.head.mlp.fc1",
                "model.vision_tower.vision_model.head.mlp.fc1",
            },
        ),
        (
            "model.encoder.layers.0.fc1",
            {
                "encoder.layers.0.fc1",
                "model.encoder.layers.0.mlp.fc1",
                "encoder.layers.0.mlp.fc1",
            },
        ),
        ("head", {"model.head", "lm_head", "language_model.lm_head"}),
        (
            "model.layers.7.mamba.in_proj",
            {
                "model.layers.7.mixer.in_proj",
                f"{NEW}.7.mamba.in_proj",
                f"{OLD}.7.mamba.in_proj",
                f"{NEW}.7.mixer.in_proj",
                f"{OLD}.7.mixer.in_proj",
            },
        ),
    ],
)
def test_spellings_of_engines(module, others):
    assert set(spellings(module)[1:]) == others
    assert spellings(module)[0] == module


def test_names_of_deepseek_v4_as_transformers_has_them():
    found = spellings("layers.2.attn.indexer.wq_b")
    assert "model.layers.2.self_attn.compressor.indexer.q_b_proj" in found
    assert "model.layers.2.mlp.shared_experts.down_proj" in spellings("layers.2.ffn.shared_experts.w2")


def test_a_decoder_alone_has_the_names_of_its_tensors():
    floats = ["model.layers.0.self_attn.q_proj", "lm_head"]
    quantized = ["model.layers.1.self_attn.q_proj"]
    assert skip_list(floats, quantized) == floats
    assert ignored(floats, quantized) == floats


TOWER = [f"vision_tower.vision_model.encoder.layers.{i}.self_attn.q_proj" for i in range(3)]
HEAD = "language_model.lm_head"
KEPT = [f"{OLD}.0.self_attn.q_proj", *TOWER, "multi_modal_projector.linear_1", HEAD]
QUANTIZED = [f"{OLD}.{i}.self_attn.q_proj" for i in (1, 2, 10)]


@pytest.mark.parametrize("prefix", [f"{OLD}.", f"{NEW}.", "model.layers.", "thinker.text.layers."])
def test_every_engine_skips_what_is_float_and_no_more(prefix):
    """The last prefix is of no engine that is known: only expressions match it."""
    names = ignored(KEPT, QUANTIZED)
    assert ignores(names, f"{prefix}0.self_attn.q_proj")
    assert not any(ignores(names, f"{prefix}{i}.self_attn.q_proj") for i in (1, 2, 10))
    if "thinker" not in prefix:
        names = skip_list(KEPT, QUANTIZED)
        assert skips(names, f"{prefix}0.self_attn.q_proj")
        assert not any(skips(names, f"{prefix}{i}.self_attn.q_proj") for i in (1, 2, 10))


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.encoder.layers.1.self_attn.q_proj",
        "model.vision_tower.renamed.9.attn.q_proj",
        "model.multi_modal_projector.linear_1",
        "lm_head",
        "language_model.lm_head",
    ],
)
def test_whole_parts_and_the_head(name):
    assert ignores(ignored(KEPT, QUANTIZED), name)
    assert skips(skip_list(KEPT, QUANTIZED), name)


def test_entries_are_the_fewest_that_tell_modules_apart():
    assert ignored(KEPT, QUANTIZED)[len(KEPT) :] == [
        r"re:(?:.*\.)?vision_tower\..+",
        r"re:(?:.*\.)?multi_modal_projector\..+",
        r"re:(?:.*\.)?lm_head$",
        r"re:(?:.*\.)?layers\.(?:0)\.self_attn\.q_proj$",
    ]


def test_a_quantized_tower_is_told_from_a_float_text():
    """They have modules of the same names, but for their beginnings."""
    text = [f"{OLD}.{i}.self_attn.q_proj" for i in range(2)]
    tower = ["vision_tower.layers.0.self_attn.q_proj", "vision_model.layers.1.self_attn.q_proj"]
    names, skipped = ignored(text, tower), skip_list(text, tower)
    for name in text:
        for spelled in spellings(name)[:2]:
            assert ignores(names, spelled)
            assert skips(skipped, spelled)
    for name in (spelled for module in tower for spelled in spellings(module)):
        assert not ignores(names, name)
        assert not skips(skipped, name)


def test_a_spelling_that_ends_a_quantized_name_is_left_out():
    """transformers would take `vision_model.layers.0.proj` for `model.layers.0.proj`."""
    names = skip_list([f"{OLD}.0.proj"], ["vision_model.layers.0.proj"])
    assert names == [f"{OLD}.0.proj", f"{NEW}.0.proj"]


def test_names_that_nothing_tells_apart_stay_as_they_are():
    assert ignored(["a.up_proj"], ["x.a.up_proj"]) == ["a.up_proj", r"re:(?:.*\.)?model\.a\.up_proj$"]


def test_parts_with_something_quantized_are_not_skipped_as_a_whole():
    assert float_towers(
        ["visual.blocks.0.a", "audio.a", "lm_head", "layers.0.a"], ["visual.merger.b"]
    ) == ["audio"]
    assert float_towers(["encoder.layers.0.a"], ["vision_tower.encoder.layers.0.b"]) == []


def test_many_numbers_are_in_several_expressions():
    floats = [f"{OLD}.{i}.mlp.up_proj" for i in range(0, 404, 2)]
    quantized = [f"{OLD}.{i}.mlp.up_proj" for i in range(1, 404, 2)]
    names = ignored(floats, quantized)
    assert len(names) == len(floats) + 3
    assert all(len(name) < 1000 for name in names)
    for i in range(404):
        assert ignores(names, f"{NEW}.{i}.mlp.up_proj") == (i % 2 == 0)


def test_listed_names_that_no_module_has():
    modules = ["language_model.model.layers.0.mlp.up_proj", "visual.merger.mlp.0"]
    listed = [
        "model.visual",
        "model.language_model.layers.0.mlp.up_proj",
        "model.language_model.layers.0.mlp",
        "model.lm_head",
        "gate",
        "model.vision",
        "visual.merger.mlp.2",
        "visual.merger.mlp.2",
    ]
    assert of_no_module(listed, modules) == ["model.vision", "visual.merger.mlp.2"]
