"""A recipe's way to the plan: each rule meets each module once."""

from collections import Counter

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.core.errors import InputError
from quantcli.planning.plan import Quantize
from quantcli.planning.planner import make_plan
from quantcli.recipe import recipe as recipes
from tests.builders import tensor, write_safetensors
from tests.e2e.conftest import make_llama

RECIPE = """\
target: compressed-tensors
calibration: {data: text.txt}
rules:
  - {match: "*.o_proj", scheme: keep}
  - {match: ["*.q_proj", "re:.*[kv]_proj"], scheme: w8a8_static}
  - {match: "*_proj", scheme: w8a8_dynamic}
"""


@pytest.fixture
def met(monkeypatch):
    """How often each rule was asked about each module."""
    counts = Counter()
    usual = recipes.Rule.matches

    def counted(rule, module, role=None):
        counts[rule.number, module] += 1
        return usual(rule, module, role)

    monkeypatch.setattr(recipes.Rule, "matches", counted)
    return counts


def test_a_rule_meets_a_module_once(tmp_path, met):
    model = open_checkpoint(make_llama(tmp_path / "m", layers=3))
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("text")
    recipe = recipes.load_recipe(tmp_path / "r.yaml")
    plan = make_plan(recipe, model)
    assert plan.quantized_modules == 3 * 6
    assert make_plan(recipe, model).digest == plan.digest  # as after a calibration
    modules = [n.removesuffix(".weight") for n in model.tensors if n.endswith(".weight")]
    assert {module for _, module in met} == {*modules}
    assert set(met.values()) == {1}
    # no rule is asked about what an earlier one takes
    assert {number for number, module in met if module.endswith("o_proj")} == {1}


def test_items_name_their_rules(tmp_path):
    model = open_checkpoint(make_llama(tmp_path / "m"))
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("text")
    plan = make_plan(recipes.load_recipe(tmp_path / "r.yaml"), model)
    items = [item for shard in plan.shards for item in shard.items if isinstance(item, Quantize)]
    lines = {i.module.rpartition(".")[2]: i.where.rpartition(":")[2] for i in items}
    assert lines["q_proj"] == lines["v_proj"] == "5"
    assert lines["down_proj"] == "6"


def test_a_weight_of_no_module_is_refused(tmp_path):
    make_llama(tmp_path / "m")
    table = {".weight": tensor("BF16", 16, 16), "a.q_proj.weight": tensor("BF16", 16, 16)}
    write_safetensors(tmp_path / "m" / "model.safetensors", table)
    (tmp_path / "r.yaml").write_text("target: ascend\nrules: [{match: '*', scheme: w8a8_dynamic}]\n")
    with pytest.raises(InputError, match="module without a name"):
        make_plan(recipes.load_recipe(tmp_path / "r.yaml"), open_checkpoint(tmp_path / "m"))
