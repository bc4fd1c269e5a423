"""config.json: dtypes at all levels, tied embeddings, and each key against another model's."""

import math
from types import SimpleNamespace

import pytest

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import InputError
from quantcli.verification.config import check_dtypes, check_tied, compare_config

HEAD = {"lm_head.weight": SimpleNamespace(spec=TensorSpec("lm_head.weight", "BF16", (8, 4)))}
BLOCK = {"quant_method": "compressed-tensors"}


def model(config, tensors=()):
    return SimpleNamespace(config=Settings(config), tensors=dict(tensors), path="OUT")


def differences(ours, reference, *, sealed=True, recipe="target: ascend"):
    manifest = {"serving_dtype": "F16", "recipe": recipe} if sealed else None
    findings = list(compare_config(model(ours), model(reference), manifest))
    assert {f.check for f in findings} <= {"source"}
    assert all(f.severity == "error" and f.fix for f in findings)
    return [f.what for f in findings]


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("vocab_size", 128, 129),
        ("rope_theta", 1e4, 5e5),
        ("rope_scaling", {"factor": 8.0}, None),
        ("num_key_value_heads", 4, 2),
        ("hidden_act", "gelu", "silu"),
        ("attention_bias", 1, True),
        ("tie_word_embeddings", True, False),
        ("layer_types", ["full", "full"], ["full", "sliding"]),
        ("sliding_window", 0, False),
    ],
)
@pytest.mark.parametrize("place", ["", "text_config."])
def test_each_key(key, value, other, place):
    def config(content):
        return {"text_config": {key: content}} if place else {key: content}

    text = f"`{place}{key}` is {value!r} in config.json, not {other!r} as in the other model"
    assert differences(config(value), config(other)) == [text]
    assert differences(config(value), config(value)) == []


def test_keys_that_one_of_them_lacks():
    """null is not the same: libraries put their default in place of an absent key alone."""
    added, lost = differences({"a": None}, {"b": None})
    assert added == "`a` is None in config.json; the other model has no such key"
    assert lost == "`b` is missing in config.json; in the other model it is None"


def test_code_that_the_source_does_not_name():
    ours = {"auto_map": {"AutoConfig": "c.C", "AutoModel": "evil.M"}}
    (what,) = differences(ours, {"auto_map": {"AutoConfig": "c.C"}})
    assert what.startswith("`auto_map.AutoModel` is 'evil.M' in config.json; the other model has no")


def test_numbers_that_are_the_same():
    assert differences({"a": 1.0, "b": [math.nan, math.inf]}, {"a": 1, "b": [math.nan, math.inf]}) == []


@pytest.mark.parametrize(
    ("ours", "reference"),
    [
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "bfloat16"}, {"torch_dtype": "torch.bfloat16"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, {}),
        ({"dtype": "float16", "text_config": {"dtype": "float16"}},
         {"dtype": "float16", "text_config": {"dtype": "bfloat16"}}),
        ({"dtype": "bfloat16", "vision_config": {"dtype": "float32"}},
         {"dtype": "bfloat16", "vision_config": {"dtype": "float32"}}),
        ({"dtype": "bfloat16", "quantization_config": BLOCK}, {"dtype": "bfloat16"}),
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization_config": BLOCK}),
        ({"text_config": {"quantization_config": BLOCK}}, {"text_config": {}}),
    ],
)  # fmt: skip
def test_the_changes_of_a_conversion(ours, reference):
    assert differences(ours, reference) == []


@pytest.mark.parametrize(
    ("ours", "reference", "what"),
    [
        ({"dtype": "float16"}, {"dtype": "bfloat16"},
         "`dtype` is 'float16' in config.json; by the other model it is bfloat16"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, {"dtype": "bfloat16"},
         "`torch_dtype` is 'float32' in config.json; by the other model it is bfloat16"),
        ({"text_config": {"dtype": "float16"}}, {"text_config": {"dtype": "bfloat16"}},
         "`text_config.dtype` is 'float16' in config.json; by the other model it is bfloat16"),
        ({"dtype": "float16"}, {"dtype": "float32"},
         "`dtype` is 'float16' in config.json; by the other model it is bfloat16"),
        ({"vision_config": {"dtype": "float16"}}, {"vision_config": {"dtype": "float32"}},
         "`vision_config.dtype` is 'float16' in config.json; by the other model it is float32"),
        ({"vision_config": {"dtype": "float16"}}, {"vision_config": {}},
         "`vision_config.dtype` is 'float16' in config.json; by the other model it is absent"),
        ({}, {"dtype": "bfloat16"},
         "`dtype` is missing in config.json; in the other model it is bfloat16"),
        ({"quantization_config": BLOCK, "text_config": {"compression_config": {**BLOCK}}},
         {"text_config": {}},
         "`text_config.compression_config` is not in the other model, and engines read another block"),
    ],
)  # fmt: skip
def test_dtypes_and_quantization_that_no_conversion_sets(ours, reference, what):
    assert differences(ours, reference) == [what]


@pytest.mark.parametrize("value", [7, [], {}, ["bfloat16"], {"text": "bfloat16"}])
def test_a_dtype_that_is_not_text(value):
    with pytest.raises(InputError, match=r"config\.json: `dtype` should be text, not "):
        list(check_dtypes(stored({"dtype": value}), {"serving_dtype": ["BF16"]}))


def test_no_dtype():
    (what,) = differences({"dtype": None}, {"dtype": "bfloat16"})
    assert what.startswith("`dtype` is None in config.json; by the other model it is bfloat16")
    assert differences({"dtype": None}, {"dtype": None}) == []
    assert list(check_dtypes(stored({"dtype": None}), {"serving_dtype": ["BF16"]})) == []


def test_nesting_without_end():
    deep, other = 1, 2
    for _ in range(2000):
        deep, other = [deep], [other]
    (what,) = differences({"a": deep}, {"a": other})
    assert what == "config.json is nested too deeply to be compared"


def test_a_float32_model_of_another_producer_may_be_served_in_float16():
    assert differences({"dtype": "float16"}, {"dtype": "float32"}, sealed=False) == []


def stored(config, dtype="BF16"):
    tensor = SimpleNamespace(spec=SimpleNamespace(dtype=dtype))
    return SimpleNamespace(
        checkpoint=model(config, {"model.norm.weight": tensor}), modules={}, unchecked={}
    )


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("level", ["", "text_config."])
def test_dtypes_against_the_manifest(key, level):
    inner = {key: "float16"}
    config = {"text_config": inner} if level else inner
    first, *_ = check_dtypes(stored(config), {"serving_dtype": "BF16"})
    assert (first.check, first.severity) == ("config", "error")
    assert (
        first.what == f"`{level}{key}` is 'float16'; the manifest says that the model is served in BF16"
    )
    assert list(check_dtypes(stored(config, "F16"), {"serving_dtype": "F16"})) == []


def test_dtypes_without_a_manifest_are_notes():
    config = {"dtype": "float16", "text_config": {"torch_dtype": "bfloat16"}}
    odd, rounded = check_dtypes(stored(config), None)
    assert (odd.severity, rounded.severity) == ("note", "note")
    assert odd.what.startswith("`text_config.torch_dtype` is 'bfloat16'; another key says F16")
    assert rounded.what == "is BF16; the model is served in F16, to which it is rounded"
    assert list(check_dtypes(stored({"dtype": "bfloat16"}, "F32"), None)) == []


@pytest.mark.parametrize(
    ("config", "places"),
    [
        ({"tie_word_embeddings": True}, [""]),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
         ["text_config."]),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True}},
         ["", "text_config."]),
        ({"text_config": {"tie_word_embeddings": False}}, []),
    ],
)  # fmt: skip
def test_a_head_that_engines_leave_out(config, places):
    notes = list(check_tied(model(config, HEAD)))
    assert [note.what.split(" is ")[0] for note in notes] == [
        f"`{place}tie_word_embeddings`" for place in places
    ]
    assert {note.severity for note in notes} <= {"note"}
    assert list(check_tied(model(config))) == []


def test_an_engine_that_serves_in_float16_alone():
    """The recipe says so; the manifest's dtype alone is not enough."""
    ours, reference = {"dtype": "float16"}, {"dtype": "bfloat16"}
    recipe = "target:\n  name: ascend\n  device: 310P\n"
    assert differences(ours, reference, recipe=recipe) == []
    assert len(differences(ours, reference)) == 1
    assert len(differences(reference, reference, recipe=recipe)) == 1
