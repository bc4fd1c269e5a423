"""Every family of transformers with experts in one parameter is known: none is left out."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.spec import TensorSpec
from quantcli.sources.decode import decoded
from quantcli.sources.expert_stack import ExpertMatrix
from quantcli.sources.stacked import EXPERTS
from quantcli.targets.compressed_tensors.target import CompressedTensors
from tests.builders import make_model, tensor

MERGING = {"MergeModulelist", "ErnieFuseAndSplitTextVisionExperts"}


def expert_parameters(module: ast.Module) -> Iterator[str]:
    """Names of parameters with three sides, the first of which counts experts."""
    for node in ast.walk(module):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        made = node.value.args[:1]
        if ast.unparse(node.value.func).rpartition(".")[2] != "Parameter" or not made:
            continue
        sides = made[0].args if isinstance(made[0], ast.Call) else []
        if len(sides) == 1 and isinstance(sides[0], (ast.Tuple, ast.List)):
            sides = sides[0].elts
        if len(sides) == 3 and "expert" in ast.unparse(sides[0]).lower():
            yield ast.unparse(node.targets[0])


@cache
def families() -> dict[str, list[str]]:
    """The folders of families with such parameters, and the classes in their files."""
    found = {}
    library = importlib.util.find_spec("transformers")
    assert library is not None
    assert library.origin is not None
    for folder in sorted((Path(library.origin).parent / "models").iterdir()):
        texts = [file.read_text() for file in sorted(folder.glob("modeling_*.py"))]
        modules = [ast.parse(text) for text in texts if "expert" in text.lower()]
        if any(name for module in modules for name in expert_parameters(module)):
            nodes = [node for module in modules for node in ast.walk(module)]
            found[folder.name] = [node.name for node in nodes if isinstance(node, ast.ClassDef)]
    return found


def model_types(folder: str) -> list[str]:
    from transformers.models.auto.configuration_auto import (
        CONFIG_MAPPING_NAMES,
        model_type_to_module_name,
    )

    return [kind for kind in CONFIG_MAPPING_NAMES if model_type_to_module_name(kind) == folder]


def is_merged(folder: str) -> bool:
    """Whether the library makes the stacks of tensors that files have for each expert."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    keys = [*model_types(folder), *families()[folder]]
    rules = [rule for key in keys for rule in get_checkpoint_conversion_mapping(key) or []]
    operations = [type(o).__name__ for rule in rules for o in getattr(rule, "operations", [])]
    return not MERGING.isdisjoint(operations)


def test_the_search_finds_what_is_known():
    assert len(families()) > 60
    assert is_merged("qwen3_moe")
    assert is_merged("mixtral")
    assert not is_merged("gpt_oss")
    assert not is_merged("llama4")


def is_known(folder: str) -> bool:
    """Whether a family has an entry, or is refused for a reason of its own."""
    if any(kind in EXPERTS for kind in model_types(folder)):
        return True
    specs = {"m.layers.0.mlp.input_linear.weight": TensorSpec("x", "BF16", (4, 16, 8))}
    (refusal,) = CompressedTensors().check_tensors(specs, Settings({"model_type": folder}))
    return "order that is not known" not in refusal.what


def test_every_family_with_stacks_on_disk_has_an_entry_or_is_refused():
    stacked = [folder for folder in families() if not is_merged(folder)]
    assert len(stacked) > 15
    assert [folder for folder in stacked if not is_known(folder)] == []
    assert not is_known("a_family_of_tomorrow")


NAME = "model.layers.0.ffn.w_in"
CONFIG = {"model_type": "new_moe", "num_experts": 4, "hidden_size": 32}


def refusals(shape, name=NAME, config=CONFIG):
    return list(
        CompressedTensors().check_tensors({name: TensorSpec(name, "BF16", shape)}, Settings(config))
    )


@pytest.mark.parametrize("shape", [(4, 48, 32), (4, 32, 48)])
def test_a_stack_of_an_unknown_name_is_seen_by_its_shape(shape):
    (refusal,) = refusals(shape)
    assert refusal.module == NAME
    assert "add an entry for it to EXPERTS" in refusal.fix
    assert "`new_moe`" in refusal.what


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((4, 1, 32), NAME),  # a convolution over each channel
        ((32, 1, 4), NAME),
        ((4, 32, 3), "model.layers.0.mixer.conv1d.weight"),
        ((8, 48, 32), NAME),
        ((4, 48, 31), NAME),
        ((4, 32), NAME),
    ],
)
def test_other_tensors_are_not_taken_for_stacks(shape, name):
    assert refusals(shape, name) == []


def test_one_expert_is_none():
    assert refusals((1, 48, 32), config={**CONFIG, "num_experts": 1}) == []


@pytest.mark.parametrize("kind", ["mistral4", "zaya", "hy_v4", "qwen4_exp_text"])
def test_families_with_the_usual_stacks_are_split(tmp_path, kind):
    experts = "model.layers.0.mlp.experts"
    tensors = {
        f"{experts}.gate_up_proj": tensor("BF16", 3, 12, 8),
        f"{experts}.down_proj": tensor("BF16", 3, 8, 6),
    }
    config = {"model_type": kind, "hidden_size": 8, "n_routed_experts": 3}
    made = make_model(tmp_path, {"model.safetensors": tensors}, config=config)
    split = decoded(open_checkpoint(made))
    assert all(isinstance(stored, ExpertMatrix) for stored in split.tensors.values())
    assert len(split.tensors) == 9
