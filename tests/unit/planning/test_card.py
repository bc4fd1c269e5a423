"""The model card of a plan: front matter for the Hub, and foreign texts that stay in their place."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.planning.card import figures
from quantcli.planning.card.markdown import code, fenced, plain, quote, table, unquote
from quantcli.planning.card.source import SOURCE_CARD, split
from quantcli.planning.planner import make_plan
from quantcli.recipe.recipe import load_recipe
from tests.builders import make_model, tensor

RECIPE = "target: ascend\nrules: [{match: '*_proj', scheme: w8a8_dynamic}]\n"
FRONT = """\
license: other
license_name: tiny-1
license_link: LICENSE
language: [en, no]
pipeline_tag: text-generation
library_name: transformers
base_model: org/parent
base_model_relation: finetune
tags: [chat, fp8, ascend]
widget:
- text: |
    two lines
    and an emoji \u200d of several
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "model"
    tensors = {
        "model.embed_tokens.weight": tensor("BF16", 32, 16),
        "model.layers.0.self_attn.o_proj.weight": tensor("BF16", 16, 16, fill=60),
    }
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    return make_model(folder, {"model.safetensors": tensors}, config=config)


@pytest.fixture
def plan(model, tmp_path):
    """The plan of a model with a card; keywords are for its checkpoint, words for the recipe."""

    def make(card=None, *overrides, **facts):
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        source = shutil.copytree(model, tmp_path / "model", dirs_exist_ok=True)
        if card is not None:
            (source / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
        checkpoint = replace(open_checkpoint(source), **facts)
        return make_plan(load_recipe(tmp_path / "recipe.yaml", overrides), checkpoint)

    return make


def card_of(plan):
    text = plan.sidecars["README.md"].decode()
    return text, ModelCard(text, ignore_metadata_errors=False).data.to_dict()


def test_the_hub_reads_the_front_matter(plan):
    text, front = card_of(plan(f"---\n{FRONT}---\n# Tiny\n", hub_id="org/Tiny@v1"))
    assert front == {
        "base_model": "org/Tiny", "base_model_relation": "quantized", "library_name": "transformers",
        "license": "other", "license_name": "tiny-1", "license_link": "LICENSE",
        "language": ["en", "no"], "pipeline_tag": "text-generation",
        "tags": ["chat", "ascend", "quantcli"], "quantized_by": "quantcli",
    }  # fmt: skip
    assert "[org/Tiny](https://huggingface.co/org/Tiny) at revision `v1`" in text
    assert text.endswith(f"\n\n{SOURCE_CARD}\n\n> # Tiny\n")


def test_a_model_without_a_card_gets_one(plan):
    made = plan()
    text, front = card_of(made)
    assert front == {
        "library_name": "transformers", "tags": ["ascend", "quantcli"], "quantized_by": "quantcli"
    }  # fmt: skip
    assert SOURCE_CARD not in text
    assert "| `w8a8_dynamic` | `W8A8_DYNAMIC` | 1 | 512 bytes | 384 bytes |" in text
    assert "* no rule matches: embedding (1.0 kB): `model.embed_tokens`" in text
    bits = 8 * made.weight_nbytes / made.params
    assert f"{bits:.2f} bits per parameter" in text
    assert "```sh\nvllm serve CHECKPOINT --quantization ascend\n```" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["target"]["name"] == "ascend"


@pytest.mark.parametrize(
    ("front", "overrides", "hub_id", "base"),
    [
        ("base_model: org/parent", (), None, None),  # of whoever trained the model
        ("base_model: org/parent\nbase_model_relation: quantized", (), None, "org/parent"),
        ("base_model: org/a@refs/pr/1\nbase_model_relation: quantized", (), None, "org/a"),
        ("base_model: [org/a, org/b]\nbase_model_relation: quantized", (), None, None),
        ("base_model: x\nbase_model_relation: quantized", (), "org/own", "org/own"),
        ("license: mit", ("base_model=org/said",), "org/own", "org/said"),
    ],
)
def test_the_base_model_is_the_one_that_was_quantized(plan, front, overrides, hub_id, base):
    _, data = card_of(plan(f"---\n{front}\n---\n", *overrides, hub_id=hub_id))
    assert data.get("base_model") == base
    assert data.get("base_model_relation") == ("quantized" if base else None)


@pytest.mark.parametrize(
    ("front", "reason"),
    [
        ("a: &a [x]\nb: *a", "alias"),
        ("a: !!python/object:os.system x", "tag"),
        ("a: [", "not valid YAML"),
        ("- a", "not a mapping"),
        ("a: 1\na: 2", "appears twice"),
        ("license: 0x" + "f" * 5000, "is too large"),
        ("a: " + "x" * 70_000, "over 65,536 characters"),
    ],
)
def test_broken_front_matter_is_quoted_and_noted(plan, front, reason):
    made = plan(f"---\n{front}\n---\n# Tiny\n")
    text, data = card_of(made)
    (note,) = [note for note in made.notes if "README.md" in note]
    assert reason in note
    assert set(data) == {"library_name", "tags", "quantized_by"}
    assert f"{SOURCE_CARD}\n\n> ---\n> {front.splitlines()[0]}\n" in text


def test_entries_that_are_not_text_are_left_out_with_a_note(plan):
    made = plan('---\nlicense: {a: b}\ntags: [a, [b]]\nlibrary_name: "a\\nb"\npipeline_tag: x\n---\n')
    data = card_of(made)[1]
    assert data["pipeline_tag"] == "x"
    assert "license" not in data
    assert data["tags"] == ["ascend", "quantcli"]
    assert any("`library_name`, `license`, `tags`" in note for note in made.notes)


def test_a_hostile_card_stays_in_its_quotation(plan):
    lines = [
        figures.BEGIN,
        figures.END,
        SOURCE_CARD,
        "---",
        "```",
        "</details>",
        "# \x1b[2J\u202e",
        "\u2028x",
    ]
    text, _ = card_of(plan("\r\n".join(lines)))
    quotation = text.partition(f"\n{SOURCE_CARD}\n\n")[2]
    assert all(line.startswith(">") for line in quotation.splitlines(keepends=False) if line.strip("x"))
    assert not set("\x1b\u202e\r") & set(text)
    changed = figures.replaced(text, "figures")
    assert changed is not None
    assert changed.count("figures\n") == 1
    assert changed.endswith(quotation)


def test_a_long_card_is_cut_at_a_line(plan):
    made = plan(b"line of a card\xff\n" * 20_000)
    text, _ = card_of(made)
    assert len(text) < 2**18 + 2**16
    assert text.endswith("> line of a card\ufffd\n")
    assert any("over 262,144 bytes" in note for note in made.notes)


def test_card_false_copies_the_card_of_the_model(plan):
    made = plan("# Tiny\n", "card=false")
    assert "README.md" not in made.sidecars
    assert made.copies["README.md"] == 7
    assert made.digest != plan("# Tiny\n").digest


def test_the_digest_covers_the_card_and_paths_do_not_matter(plan, model, tmp_path):
    one = plan("# Tiny\n")
    assert plan("# tiny\n").digest != one.digest
    (tmp_path / "model" / "README.md").write_text("# Tiny\n")
    moved = tmp_path / "elsewhere"
    (tmp_path / "model").rename(moved)
    again = make_plan(load_recipe(tmp_path / "recipe.yaml"), open_checkpoint(moved))
    assert again.sidecars["README.md"] == one.sidecars["README.md"]
    assert again.digest == one.digest


@pytest.mark.parametrize("text", ["a\n\n> b\n", "", "```\n| x |\n", " indented\n\ttab"])
def test_a_quotation_is_taken_back(text):
    assert unquote(quote(text) + "\n\nmore") == text.strip("\n")


def test_names_cannot_leave_a_cell():
    name = "a`b``|c\n<script>"
    (_, _, row) = table(["name"], [[code(name)]]).splitlines()
    assert row == "| ``` a`b``\\|c\\n<script> ``` |"
    assert plain("<b> [x](y) *a*\n") == "\\<b\\> \\[x\\](y) \\*a\\*\\\\n"
    assert fenced("a\n````\n").startswith("`````\n")


def test_the_edge_of_front_matter_is_a_line():
    assert split("---\na: 1\n---\nb") == ({"a": 1}, "b", None)
    assert split("---\r\na: 1\r\n---  \r\nb") == ({"a": 1}, "b", None)
    assert split("---\na: 1\u2028---\nb")[2] == "it has no end"
    assert split("text\n---\n")[1] == "text\n---\n"
