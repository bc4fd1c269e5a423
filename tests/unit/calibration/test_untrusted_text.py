"""Tokenizers and chat templates that would run for ever, take all memory, or end the process."""

import json
import shutil
from pathlib import Path

import pytest

from quantcli.calibration.text import tokenizer
from quantcli.calibration.text.dataset import tokenizer_of
from quantcli.calibration.text.documents import Document
from quantcli.core.errors import InputError

TINY = Path(__file__).parents[3] / "examples" / "tiny-qwen3"
CHAT = [{"role": "user", "content": "hi"}]
CHOICE = tokenizer.Choice(1, 8, None, pack=True, where="recipe.yaml:2", option="calibration.")
READING = "reading this text with the model's tokenizer"


def replaced(times, characters):
    """Normalisers that make so many characters of each `a`, and again of each of those."""
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * characters}
    return {"type": "Sequence", "normalizers": [one] * times}


def split_by(pattern):
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def model(folder, template=None, **table):
    """The tiny model's tokenizer with other parts of tokenizer.json."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | table))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return tokenizer_of(folder)


def refused(made, content):
    with pytest.raises(InputError) as caught:
        made.samples([Document(content, "text.txt:1")], CHOICE)
    assert caught.value.fix
    where = Path(caught.value.where)
    return caught.value.what, where.name


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch):
    monkeypatch.setattr(tokenizer, "_SECONDS_PER_MIB", 0)
    monkeypatch.setattr(tokenizer, "_MEMORY_PER_BYTE", 0)
    monkeypatch.setattr(tokenizer, "_MEMORY", 2**27)


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (
            {"pre_tokenizer": split_by("(a+)+$")},
            f"{READING} crashes the library that does it: Onig: Regex search error: "
            "retry-limit-in-match over",
        ),
        (
            {"normalizer": replaced(3, 1000)},
            f"{READING} takes more than 134.2 MB of memory, far more than its size explains",
        ),
        (
            {"normalizer": {"type": "Prepend", "prepend": "speak " * 100_000}},
            "the model's tokenizer makes 100024 tokens of 41 characters",
        ),
    ],
    ids=["backtracking", "growing", "prepending"],
)
def test_a_tokenizer_beyond_what_text_needs(tmp_path, table, what):
    found, where = refused(model(tmp_path, **table), "a" * 40 + "!")
    assert (found, where) == (what, "tokenizer.json")


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (
            "".join(f"{{% for i{n} in range(1000) %}}" for n in range(4)) + "{% endfor %}" * 4,
            f"{READING} takes more than 1 s of CPU time, far more than its size explains",
        ),
        (
            "{{ 'a' * 10**10 }}",
            f"{READING} takes more than 134.2 MB of memory, far more than its size explains",
        ),
        ("{{ 'a' * 10**6 }}", "the model's chat template makes 1000000 characters of 35 characters"),
    ],
    ids=["loops", "memory", "growing"],
)
def test_a_chat_template_beyond_what_text_needs(tmp_path, monkeypatch, template, what):
    monkeypatch.setattr(tokenizer, "_SECONDS", 1)
    assert refused(model(tmp_path, template), CHAT) == (what, "chat_template.jinja")


def test_a_template_that_calls_itself_is_refused_with_its_chat(tmp_path):
    macro = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"
    what, where = refused(model(tmp_path, macro), CHAT)
    assert what.startswith(
        f"{READING.replace('reading this text with ', '')} refuses this text: maximum"
    )
    assert where == "text.txt:1"


def test_tokens_that_cannot_be_decoded_are_numbers_and_the_others_text(tmp_path):
    made = model(tmp_path)
    samples, _, _ = made.samples([Document("Speak, speak.\n" * 3, "text.txt")], CHOICE)
    text, numbers, empty = made.texts([samples[0], [5, 2**70], []])
    assert ("Speak, speak.\n" * 3).startswith(text)
    assert (len(text) > 8, numbers, empty) == (True, f"<5><{2**70}>", "")
