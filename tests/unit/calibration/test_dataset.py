from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import itertools
import json
import logging as python_logging
import os
import random
import shutil
import sys
import types
import warnings
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantcli.calibration.text import documents, tokenizer
from quantcli.calibration.text.dataset import (
    Dataset,
    TextSource,
    check_source,
    load_dataset,
    source_digest,
)
from quantcli.core.errors import InputError, MachineError, QuantError
from quantcli.core.untrusted import bounded
from tests.builders import make_model

transformers = pytest.importorskip("transformers")
logging = transformers.utils.logging
AutoTokenizer = transformers.AutoTokenizer
ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "tiny-qwen3"
TOKENIZER = ("config.json", "tokenizer.json", "tokenizer_config.json")
WHERE = "recipe.yaml:7"
EOS = 0  # the tiny model's end token, which is also its padding
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
PLAY = (ROOT / "examples" / "calibration.txt").read_text()[:4000]


@pytest.fixture(scope="session")
def encode() -> Callable[[str], list[int]]:
    """The tiny model's tokenizer, asked directly."""
    tokenizer = AutoTokenizer.from_pretrained(str(TINY), local_files_only=True)
    return lambda text: list(tokenizer(text, verbose=False)["input_ids"])


def source(data: Path | str, **options: Any) -> TextSource:
    defaults = TextSource(str(data), WHERE, samples=3, length=16, seed=0, pack=True, batch_tokens=32)
    return dataclasses.replace(defaults, **options)


def load(data: Path | str, model: Path = TINY, **options: Any) -> Dataset:
    return load_dataset(source(data, **options), model, positions=2048, vocab_size=4096)


def encoded(text: str, samples: int = 3, length: int = 16) -> list[int]:
    """The tokens of samples, made in this process, in which a test can replace what is used."""
    choice = tokenizer.Choice(samples, length, None, True, WHERE, "calibration.")
    ids = array("i")
    ids.frombytes(tokenizer.encode(str(TINY), False, [documents.Document(text, WHERE)], choice)[1])
    return ids.tolist()


def rows(dataset: Dataset) -> list[list[int]]:
    """Every sample without its padding."""
    found: list[list[int]] = []
    for batch in dataset.batches:
        assert batch.input_ids.dtype == torch.int64
        mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
        assert (mask.dtype, mask.shape) == (torch.bool, batch.input_ids.shape)
        found += [ids[keep].tolist() for ids, keep in zip(batch.input_ids, mask, strict=True)]
    return found


def refused(kind: type[QuantError], run: Callable[[], Any]) -> tuple[str, str | None, str]:
    with pytest.raises(kind) as caught:
        run()
    assert type(caught.value) is kind
    assert caught.value.fix
    return caught.value.what, caught.value.where, caught.value.fix


def text_file(folder: Path, content: str | bytes = PLAY, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines_file(folder: Path, *records: Any, name: str = "data.jsonl") -> Path:
    """Each record as one line; text as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    return text_file(folder, "\n".join(lines) + "\n", name)


def tiny_copy(folder: Path, files: tuple[str, ...] = TOKENIZER, **more: str) -> Path:
    """The tiny model's small files; `more` by name, `__` for the dot."""
    folder.mkdir()
    for name in files:
        shutil.copy(TINY / name, folder / name)
    for name, content in more.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


# --- windows of packed text


def test_text_is_cut_into_windows_in_its_order(tmp_path: Path, encode: Callable) -> None:
    ids = encode(PLAY)
    count = len(ids) // 16
    dataset = load(text_file(tmp_path), samples=count)
    assert rows(dataset) == [ids[16 * i : 16 * i + 16] for i in range(count)]
    assert (dataset.samples, dataset.tokens) == (count, 16 * count)
    sizes = [len(batch.input_ids) for batch in dataset.batches]
    assert sizes == [2] * (count // 2) + [1] * (count % 2)
    assert all(batch.mask is None for batch in dataset.batches)


def test_the_seed_chooses_windows_and_keeps_their_order(tmp_path: Path, encode: Callable) -> None:
    path, ids = text_file(tmp_path), encode(PLAY)
    for seed in (0, 1, -5):
        chosen = sorted(random.Random(seed).sample(range(len(ids) // 16), 4))
        expected = [ids[16 * i : 16 * i + 16] for i in chosen]
        assert rows(load(path, samples=4, seed=seed)) == expected
        assert rows(load(path, samples=4, seed=seed)) == expected
    assert rows(load(path, samples=4, seed=0)) != rows(load(path, samples=4, seed=1))


def test_documents_are_joined_by_the_end_token(tmp_path: Path, encode: Callable) -> None:
    texts = [
        "Speak, speak.",
        "",
        "You are all resolved",
        "<|endoftext|>",
        "to die<|endoftext|>",
        "than",
    ]
    path = lines_file(tmp_path, *({"text": text} for text in texts))
    joined = [*encode(texts[0]), EOS, *encode(texts[2]), EOS, *encode("to die"), EOS, *encode("than")]
    dataset = load(path, samples=1, length=len(joined))
    assert rows(dataset) == [joined]
    assert joined.count(EOS) == 3  # no second one where a text brings its own


def test_without_an_end_token_documents_are_only_joined(tmp_path: Path, encode: Callable) -> None:
    model = tiny_copy(tmp_path / "model", ("tokenizer.json",))
    path = lines_file(tmp_path, {"text": "First"}, {"text": "Second"})
    joined = encode("First") + encode("Second")
    assert rows(load(path, model, samples=1, length=len(joined))) == [joined]


def test_too_little_text_to_pack(tmp_path: Path, encode: Callable) -> None:
    path = text_file(tmp_path, "To be, or not to be: that is the question.")
    count = len(encode(path.read_text())) // 4
    assert load(path, samples=count, length=4).samples == count
    what, where, fix = refused(InputError, lambda: load(path, samples=count + 1, length=4))
    assert what == f"data gives {count} samples of 4 tokens; {count + 1} are asked for"
    assert where == WHERE
    assert fix == "lower calibration.samples or calibration.length, or give more text"


def test_a_batch_holds_at_least_one_sample(tmp_path: Path) -> None:
    dataset = load(text_file(tmp_path), samples=3, length=16, batch_tokens=15)
    assert [tuple(batch.input_ids.shape) for batch in dataset.batches] == [(1, 16)] * 3


def test_pieces_of_a_long_text_are_cut_at_lines(
    tmp_path: Path, encode: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "PIECE", 20)
    text = "One line.\nTwo.\nA line that is longer than any piece is\nend"
    pieces = ["One line.\nTwo.\n", "A line that is longe", "r than any piece is\n", "end"]
    assert "".join(pieces) == text
    tokens = [token for piece in pieces for token in encode(piece)]
    assert encoded(text, samples=1, length=len(tokens)) == tokens


# --- one record, one sample


def test_records_are_padded_on_the_right(tmp_path: Path, encode: Callable) -> None:
    texts = ["Speak", "We know't, we know't.", "Resolved. resolved.", "No", "No more talking on't"]
    path = lines_file(tmp_path, *({"text": text} for text in texts))
    dataset = load(path, pack=False, samples=5, length=8, batch_tokens=16)
    expected = [encode(text)[:8] for text in texts]
    assert rows(dataset) == expected
    assert dataset.tokens == sum(map(len, expected))
    for batch, pair in zip(dataset.batches, (expected[:2], expected[2:4], expected[4:]), strict=True):
        width = max(map(len, pair))
        assert batch.input_ids.tolist() == [ids + [EOS] * (width - len(ids)) for ids in pair]
        if len({len(ids) for ids in pair}) == 1:
            assert batch.mask is None
        else:
            padded = [[True] * len(ids) + [False] * (width - len(ids)) for ids in pair]
            assert batch.mask is not None
            assert batch.mask.tolist() == padded
    assert [batch.mask is None for batch in dataset.batches] == [False, False, True]


@pytest.mark.parametrize(("special", "pad"), [("pad_token", 9), ("eos_token", 9), (None, 0)])
def test_padding_is_a_token_that_the_model_has(
    tmp_path: Path, encode: Callable, special: str | None, pad: int
) -> None:
    ninth = AutoTokenizer.from_pretrained(str(TINY), local_files_only=True).convert_ids_to_tokens(9)
    config = {"tokenizer_class": "TokenizersBackend"} | ({special: ninth} if special else {})
    files = ("config.json", "tokenizer.json")
    model = tiny_copy(tmp_path / "model", files, tokenizer_config__json=json.dumps(config))
    path = lines_file(tmp_path, {"text": "No"}, {"text": "Speak, speak."})
    (batch,) = load(path, model, pack=False, samples=2).batches
    assert batch.mask is not None
    assert batch.input_ids[0].tolist() == encode("No") + [pad] * int((~batch.mask).sum())


def test_padding_added_behind_the_vocabulary_is_not_used(tmp_path: Path) -> None:
    config = {"tokenizer_class": "TokenizersBackend", "pad_token": "<|new|>"}
    files = ("config.json", "tokenizer.json")
    model = tiny_copy(tmp_path / "model", files, tokenizer_config__json=json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    assert tokenizer.pad_token_id == 4096
    path = lines_file(tmp_path, {"text": "No"}, {"text": "Speak, speak."})
    (batch,) = load(path, model, pack=False, samples=2).batches
    assert batch.mask is not None
    assert set(batch.input_ids[~batch.mask].tolist()) == {0}


def test_the_seed_chooses_records(tmp_path: Path, encode: Callable) -> None:
    path = lines_file(tmp_path, *({"text": f"number {i}"} for i in range(20)))
    chosen = sorted(random.Random(3).sample(range(20), 4))
    dataset = load(path, pack=False, samples=4, seed=3)
    assert rows(dataset) == [encode(f"number {i}") for i in chosen]


def test_too_few_records(tmp_path: Path) -> None:
    path = lines_file(tmp_path, {"text": "one"}, "", {"text": "two"})
    what, where, fix = refused(InputError, lambda: load(path, pack=False))
    assert (what, where) == ("data gives 2 records; 3 are asked for", WHERE)
    assert fix == "lower calibration.samples, or give more text"


@pytest.mark.parametrize("text", ["", "<|endoftext|>"])
def test_a_record_without_text(tmp_path: Path, text: str) -> None:
    path = lines_file(tmp_path, {"text": "one"}, "", {"text": text})
    what, where, _ = refused(InputError, lambda: load(path, pack=False, samples=2))
    assert (what, where) == ("record holds no text", f"{path}:3")


# --- formats


def test_a_text_under_either_name_is_text(tmp_path: Path) -> None:
    texts = ["Before we proceed any further,", "hear me speak."]
    one = lines_file(tmp_path, *({"text": text} for text in texts))
    other = lines_file(tmp_path, *({"inputs_pretokenized": t} for t in texts), name="other.jsonl")
    first = {"text": None, "inputs_pretokenized": texts[0]}
    second = {"inputs_pretokenized": "unused", "text": texts[1]}
    mixed = lines_file(tmp_path, first, second, name="mixed.ndjson")
    expected = rows(load(one, pack=False, samples=2))
    assert rows(load(other, pack=False, samples=2)) == expected
    assert rows(load(mixed, pack=False, samples=2)) == expected


def test_blank_lines_line_ends_and_a_byte_order_mark_are_no_text(
    tmp_path: Path, encode: Callable
) -> None:
    raw = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \t\n{"text": "two"}'
    dataset = load(text_file(tmp_path, raw, "data.JSONL"), pack=False, samples=2)
    assert rows(dataset) == [encode("one"), encode("two")]
    plain = load(text_file(tmp_path, b"\xef\xbb\xbfone two"), samples=1, length=2)
    assert rows(plain) == [encode("one two")[:2]]


def test_messages_go_through_the_chat_template(tmp_path: Path, encode: Callable) -> None:
    model = tiny_copy(tmp_path / "model", chat_template__jinja=TEMPLATE)
    chat = [{"role": "user", "content": "Speak"}, {"role": "all", "content": "We know't"}]
    path = lines_file(tmp_path, {"messages": chat})
    (ids,) = rows(load(path, model, pack=False, samples=1, length=64))
    assert ids == encode("<user>Speak\n<all>We know't\n")


def test_special_tokens_are_added_to_text_but_not_to_chats(tmp_path: Path, encode: Callable) -> None:
    table = json.loads((TINY / "tokenizer.json").read_text())
    start = {"id": "<|endoftext|>", "ids": [EOS], "tokens": ["<|endoftext|>"]}
    table["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": start["id"], "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {start["id"]: start},
    }  # fmt: skip
    model = tiny_copy(
        tmp_path / "model",
        ("tokenizer_config.json",),
        tokenizer__json=json.dumps(table),
        chat_template__jinja="<|endoftext|>" + TEMPLATE,
    )
    path = lines_file(tmp_path, {"text": "Speak"}, {"messages": [{"role": "a", "content": "No"}]})
    dataset = load(path, model, pack=False, samples=2)
    assert rows(dataset) == [[EOS, *encode("Speak")], [EOS, *encode("<a>No\n")]]
    empty = lines_file(tmp_path, {"text": ""}, name="empty.jsonl")
    what, _, _ = refused(InputError, lambda: load(empty, model, pack=False, samples=1))
    assert what == "record holds no text"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (None, "`messages` need a chat template, and the model's tokenizer has none"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the model's tokenizer refuses this text: roles must alternate",
        ),
    ],
    ids=["none", "refusing"],
)
def test_a_chat_that_no_template_takes(tmp_path: Path, template: str | None, what: str) -> None:
    more = {} if template is None else {"chat_template__jinja": template}
    model = tiny_copy(tmp_path / "model", **more)
    chat = {"messages": [{"role": "user", "content": "x"}]}
    path = lines_file(tmp_path, {"text": "good"}, chat)
    assert refused(InputError, lambda: load(path, model))[:2] == (what, f"{path}:2")


NO_KEY = "record has none of `text`, `inputs_pretokenized`, `messages`; it has "
NO_CHAT = "`messages` is not a list of messages with a `role`"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": }', "not valid JSON: Expecting value (column 10)"),
        ("[" * 100_000, "not valid JSON: maximum recursion depth exceeded"),
        ('{"text": ' + "9" * 5000 + "}", "not valid JSON: Exceeds the limit (4300 digits)"),
        ('["text"]', "record is not a JSON object"),
        ('"text"', "record is not a JSON object"),
        ('{"content": "a", "\\u001b[2J": 1}', NO_KEY + r"'content', '\x1b[2J'"),
        ("{}", NO_KEY + "nothing"),
        ('{"text": null}', NO_KEY + "'text'"),
        ('{"text": 5}', "`text` is not text"),
        ('{"text": ["a"]}', "`text` is not text"),
        ('{"inputs_pretokenized": [1, 2]}', "`inputs_pretokenized` is not text"),
        ('{"messages": "a"}', NO_CHAT),
        ('{"messages": []}', NO_CHAT),
        ('{"messages": ["a"]}', NO_CHAT),
        ('{"messages": [{"content": "a"}]}', NO_CHAT),
        ('{"text": "a\\u0000b"}', None),
        ('{"text": "\\ud800"}', "the model's tokenizer refuses this text: 'utf-8' codec can't encode"),
    ],
)  # fmt: skip
def test_bad_lines(tmp_path: Path, line: str, what: str | None) -> None:
    path = lines_file(tmp_path, {"text": "fine"}, "", line)
    if what is None:
        assert load(path, pack=False, samples=2).samples == 2
        return
    found, where, _ = refused(InputError, lambda: load(path, pack=False, samples=2))
    assert found.startswith(what)
    assert where == f"{path}:3"


def test_json_that_is_no_lines_is_not_taken_for_prose(tmp_path: Path) -> None:
    path = text_file(tmp_path, '[\n {"text": "a"}\n]\n', "data.json")
    what, where, fix = refused(InputError, lambda: load(path))
    assert (what, where) == ("not valid JSON: Expecting value (column 2)", f"{path}:1")
    assert fix.startswith("each line is one record, such as")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = text_file(tmp_path, b"caf\xc3\xa9, caf\xe9 again")
    what, where, _ = refused(InputError, lambda: load(path))
    assert (what, where) == ("the text is not UTF-8 (byte 10)", str(path))
    path = text_file(tmp_path, b'{"text": "a"}\n{"text": "caf\xe9"}\n', "data.jsonl")
    what, where, _ = refused(InputError, lambda: load(path))
    assert (what, where) == ("the text is not UTF-8 (byte 27)", f"{path}:2")
    path = text_file(tmp_path, b'{"text": "a"}\n{"te\0xt": 1}\n', "data.jsonl")
    what, where, _ = refused(InputError, lambda: load(path))
    assert (what, where) == ("the text is binary, not text (NUL at byte 18)", str(path))
    path = text_file(tmp_path, b"a" * documents.PIECE + b"\0")
    what, where, _ = refused(InputError, lambda: load(path))
    assert what == f"the text is binary, not text (NUL at byte {documents.PIECE})"


# --- what is refused before a run


@pytest.mark.parametrize("name", ["data.parquet", "x.safetensors", "x.pkl", "x.PT", "x.jsonl.gz"])
def test_files_that_hold_no_text_by_their_name(tmp_path: Path, name: str) -> None:
    data = source(text_file(tmp_path, "protocol 0", name))
    what, where, fix = refused(InputError, lambda: check_source(data, TINY))
    assert (what, where) == (f"text `{tmp_path / name}` is not a text file", WHERE)
    assert fix.startswith("give plain UTF-8 text, or JSON lines")


def test_places_that_hold_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    text_file(tmp_path, "")
    text_file(tmp_path, b"PK\3\4\0", "data.txt.old")
    monkeypatch.chdir(tmp_path)
    for name, what in {
        ".": "text `.` is a directory",
        "pipe": "text `pipe` is not a text file",
        "/dev/zero": "text `/dev/zero` is not a text file",
        "text.txt": "text `text.txt` is empty",
        "no.txt": "text `no.txt` does not exist",
        "text.txt/x": "text `text.txt/x` does not exist",
        "loop": "text `loop` does not exist",
        "~no-such-user-here/x": "text `~no-such-user-here/x` does not exist",
        "a\0b": "text `a\0b` does not exist",
        "y" * 300: f"text `{'y' * 200}` does not exist",
    }.items():
        for run in (check_source, source_digest, load_dataset):
            options = {"positions": 9, "vocab_size": 9} if run is load_dataset else {}
            call = lambda run=run, name=name, o=options: run(source(name), TINY, **o)  # noqa: E731
            assert refused(InputError, call)[:2] == (what, WHERE)
    binary = "the text is binary, not text (NUL at byte 4)"
    check = lambda: check_source(source("data.txt.old"), TINY)  # noqa: E731
    assert refused(InputError, check)[:2] == (binary, "data.txt.old")


def test_a_file_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = text_file(tmp_path)

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    what, where, _ = refused(MachineError, lambda: check_source(source(path), TINY))
    assert what == f"cannot read text `{path}`: Permission denied"
    assert where == WHERE


def test_a_path_starts_at_the_current_directory_or_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rows(load("text.txt")) == rows(load("~/text.txt")) == rows(load(tmp_path / "text.txt"))


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config.json": "{}"},
        {"tokenizer_config.json": '["tokenizer_class"]'},
        {"tokenizer_config.json": "{"},
        {"special_tokens_map.json": "{}"},
        {"tokenizer.json/inside": "a folder is no file"},
    ],
)
def test_a_model_without_tokenizer(tmp_path: Path, files: dict[str, str]) -> None:
    model = make_model(tmp_path / "model", files=files)
    data = source(text_file(tmp_path))
    problem = ("the model has no tokenizer", str(model))
    assert refused(InputError, lambda: check_source(data, model))[:2] == problem
    what, where, fix = refused(InputError, lambda: load(data.data, model))
    assert (what, where) == problem
    assert fix == "fetch the whole model folder, with tokenizer.json and tokenizer_config.json"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.model", ""),
        ("vocab.json", ""),
        ("vocab.txt", ""),
        ("spiece.model", ""),
        ("qwen.tiktoken", ""),
        ("tekken.json", ""),
        ("tokenizer_config.json", '{"tokenizer_class": "X"}'),
        ("tokenizer_config.json", '{"auto_map": {}}'),
    ],
)
def test_what_counts_as_a_tokenizer(tmp_path: Path, name: str, content: str) -> None:
    model = make_model(tmp_path / "model", files={name: content})
    check_source(source(text_file(tmp_path)), model)


def test_checks_do_not_load_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it would fail
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    data = source(text_file(tmp_path))
    check_source(data, TINY)
    assert len(source_digest(data, TINY)) == 64
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    what, where, _ = refused(MachineError, lambda: check_source(data, TINY))
    assert (what, where) == ("running a model needs the package `transformers`", WHERE)


def test_samples_longer_than_the_model(tmp_path: Path) -> None:
    data = source(text_file(tmp_path), length=100, samples=2)

    def run(positions: int | None) -> Dataset:
        return load_dataset(data, TINY, positions=positions, vocab_size=None)

    assert run(100).tokens == run(None).tokens == 200
    what, where, fix = refused(InputError, lambda: run(99))
    assert what == "samples of 100 tokens are longer than the model's 99 positions"
    assert (where, fix) == (WHERE, "set calibration.length to 99 or less")


def test_a_tokenizer_with_tokens_that_the_model_has_not(tmp_path: Path, encode: Callable) -> None:
    texts = ["a", "hello", "b"]
    path = lines_file(tmp_path, *({"text": text} for text in texts))
    largest = max(encode("hello"))
    assert largest > max(encode("a") + encode("b"))
    data = source(path, pack=False)

    def run(vocab_size: int) -> Dataset:
        return load_dataset(data, TINY, positions=None, vocab_size=vocab_size)

    assert run(largest + 1).samples == 3
    what, where, _ = refused(InputError, lambda: run(largest))
    assert what == f"token {largest} in sample 2 is beyond the model's {largest} tokens"
    assert where == str(TINY)


# --- the tokenizer


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("{", "the model's tokenizer cannot be loaded: Expecting property name enclosed"),
        ("{}", "the model's tokenizer cannot be loaded: KeyError 'added_tokens'"),
        (None, "the model's tokenizer has no vocabulary"),
    ],
    ids=["cut", "empty", "missing"],
)
def test_a_broken_tokenizer(tmp_path: Path, table: str | None, what: str) -> None:
    config = '{"tokenizer_class": "Qwen2Tokenizer"}'  # transformers makes an empty one from that
    more = {} if table is None else {"tokenizer__json": table}
    model = tiny_copy(tmp_path / "m", ("config.json",), tokenizer_config__json=config, **more)
    found, where, _ = refused(InputError, lambda: load(text_file(tmp_path), model))
    assert found.startswith(what)
    assert where == str(model)


def test_settings_of_a_tokenizer_that_are_no_json_are_named(tmp_path: Path) -> None:
    model = tiny_copy(tmp_path / "m", tokenizer_config__json='{"a":' * 5000)
    found, where, _ = refused(InputError, lambda: load(text_file(tmp_path), model))
    assert (found, where) == ("JSON is nested too deeply", str(model / "tokenizer_config.json"))


def test_a_tokenizer_that_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("\n T requires the protobuf library\n")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", missing)
    what, where, _ = refused(MachineError, lambda: encoded("text"))
    assert what == "the model's tokenizer cannot be loaded: T requires the protobuf library"
    assert where == str(TINY)


def test_text_is_split_as_tokenizer_json_says(tmp_path: Path) -> None:
    """AutoTokenizer takes a class of its own for some model types, which splits text another way."""
    model = Path(__file__).parents[2] / "golden" / "data" / "model_qwen2"
    text = "In 1968 he retired ( 372 km ) .\n \n = = Early career = = \n \n" * 20
    data = lines_file(tmp_path, {"text": text})
    (batch,) = load(data, model, samples=1, length=64, pack=False).batches
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(model / "tokenizer.json"))
    assert batch.input_ids[0].tolist() == plain(text)["input_ids"][:64]


def test_code_that_came_with_the_model_runs_only_when_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    names = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    code = (
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(ran)!r}).write_text('')\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    model = tiny_copy(
        tmp_path / "model",
        ("tokenizer.json",),
        config__json='{"model_type": "own"}',
        tokenizer_config__json=json.dumps(names),
        own__py=code,
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    bounded.end_all()  # the next process has that environment
    path = text_file(tmp_path)
    what, where, fix = refused(InputError, lambda: load(path, model))
    assert what == "the model's tokenizer is code that came with the model"
    assert (where, fix.partition(" runs")[0]) == (str(model), "`--trust-remote-code`")
    assert not ran.exists()
    trusted = load_dataset(source(path), model, positions=None, vocab_size=None, trust_remote_code=True)
    bounded.end_all()
    assert ran.exists()
    assert rows(trusted) == rows(load(path))


def test_transformers_says_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = transformers.PreTrainedTokenizerFast
    load_tokenizer = used.from_pretrained

    def chatty(*arguments: Any, **options: Any) -> Any:
        logging.get_logger("transformers.x").warning("a line of the log")
        warnings.warn("a warning", stacklevel=1)
        return load_tokenizer(*arguments, **options)

    monkeypatch.setattr(used, "from_pretrained", chatty)
    level = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        long = PLAY * 4  # more tokens than the tokenizer's model_max_length
        encoded(long)
        assert logging.get_verbosity() == python_logging.INFO
        refused(InputError, lambda: encoded(long, samples=10**6))
        assert logging.get_verbosity() == python_logging.INFO
    finally:
        logging.set_verbosity(level)
    assert capfd.readouterr() == ("", "")


# --- more than is read at once


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 64 MiB were 1000 bytes, and a chunk 250."""
    monkeypatch.setattr(documents, "MAX_BYTES", 1000)
    monkeypatch.setattr(documents, "PIECE", 250)


def read(data: Path | str, heard: list[str] | None = None) -> list[documents.Document]:
    return documents.read_documents(str(data), WHERE, [].append if heard is None else heard.append)


def test_a_large_text_is_read_as_evenly_spaced_chunks(tmp_path: Path, small: None) -> None:
    text = "".join(f"{number:04} " for number in range(1000))
    heard: list[str] = []
    path = text_file(tmp_path, text)
    found = read(path, heard)
    starts = [0, 1583, 3166, 4750]
    assert [document.content for document in found] == [text[at : at + 250] for at in starts]
    assert heard == [f"`{path}` is over 0 MiB: reading evenly spaced parts of it"]
    assert len(read(text_file(tmp_path, text[:1000]), heard)) == len(heard) == 1


def test_chunks_begin_and_end_between_characters(tmp_path: Path, small: None) -> None:
    found = read(text_file(tmp_path, "€" * 1001))  # three bytes each
    assert [set(str(document.content)) for document in found] == [{"€"}] * 4
    assert [len(str(document.content)) for document in found] == [83] * 4
    path = text_file(tmp_path, "€" * 1001 + "\u00e9" * 3)
    assert str(read(path)[-1].content).endswith("ééé")
    for at, wrong in ((0, b"\xff"), (3000, b"\xff")):
        raw = ("€" * 1001).encode()
        path = text_file(tmp_path, raw[:at] + wrong + raw[at + 1 :])
        expected = f"the text is not UTF-8 (byte {at})"
        assert refused(InputError, lambda path=path: read(path))[0] == expected
    stray = ("€" * 306).encode() + b"\x82" * 4 + b"x" * 2081  # where the second chunk begins
    assert (len(stray) - 250) // 3 == 917
    path = text_file(tmp_path, stray)
    assert refused(InputError, lambda: read(path))[0] == "the text is not UTF-8 (byte 920)"
    path = text_file(tmp_path, "€" * 1001 + "x" * 300)
    path.write_bytes(path.read_bytes() + b"\xe2\x82")  # cut in a character at its very end
    assert refused(InputError, lambda: read(path))[0] == "the text is not UTF-8 (byte 3303)"


def test_a_large_file_of_lines_is_read_evenly(tmp_path: Path, small: None) -> None:
    heard: list[str] = []
    path = lines_file(tmp_path, *({"text": f"{number:03}"} for number in range(400)))
    found = read(path, heard)
    numbers = [int(str(document.content)) for document in found]
    assert len(heard) == 1
    assert abs(len(numbers) * 16 - 1000) <= 32  # lines of 16 bytes
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    assert numbers[0] == 0
    assert numbers[-1] > 390
    assert steps <= {6, 7}
    assert [document.where for document in found] == [f"{path}:{number + 1}" for number in numbers]
    whole = lines_file(tmp_path, *({"text": f"{number:03}"} for number in range(62)))
    assert len(read(whole, heard)) == 62
    assert len(heard) == 1


def test_one_endless_line(tmp_path: Path, small: None) -> None:
    path = lines_file(tmp_path, {"text": "a"}, {"text": "b" * 2000})
    assert refused(InputError, lambda: read(path))[:2] == ("line is over 64 MiB", f"{path}:2")


# --- data sets of the Hub


class Hub:
    """What a stand-in for the package `datasets` was asked for, and what it gives."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.rows: Any = [{"text": text} for text in ("one", "two", "three")]
        self.fails: Exception | None = None

    def load_dataset(self, path: str, name: str | None = None, *, split: str) -> Any:
        self.asked.append((path, name, split))
        if self.fails is not None:
            raise self.fails
        return self.rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    module = types.ModuleType("datasets")
    module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    module.load_dataset = stand_in.load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return stand_in


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        ("datasets:org/name", ("org/name", None, "train")),
        ("datasets:org/name:small", ("org/name", "small", "train")),
        ("datasets:org/name:small:test", ("org/name", "small", "test")),
        ("datasets:org/name::test[:10%]", ("org/name", None, "test[:10%]")),
    ],
)
def test_a_data_set_of_the_hub(hub: Hub, encode: Callable, data: str, asked: tuple[Any, ...]) -> None:
    heard: list[str] = []
    dataset = load_dataset(
        source(data, pack=False), TINY, positions=None, vocab_size=None, say=heard.append
    )
    assert hub.asked == [asked]
    assert heard == ["fetching `org/name` through the datasets package"]
    assert rows(dataset) == [encode(text) for text in ("one", "two", "three")]


def test_rows_are_records(hub: Hub, tmp_path: Path, encode: Callable) -> None:
    model = tiny_copy(tmp_path / "model", chat_template__jinja=TEMPLATE)
    hub.rows = [
        {"inputs_pretokenized": "one", "text": None},
        {"messages": [{"role": "a", "content": "b"}]},
    ]
    dataset = load("datasets:x", model, pack=False, samples=2)
    assert rows(dataset) == [encode("one"), encode("<a>b\n")]
    hub.rows = [{"text": "one"}, {"content": "two"}]
    what, where, _ = refused(InputError, lambda: load("datasets:x", model))
    assert (what, where) == (NO_KEY + "'content'", "datasets:x, row 1")


def test_of_a_large_data_set_evenly_spread_rows_are_read(hub: Hub, small: None) -> None:
    hub.rows = [{"text": f"{number:04}"} for number in range(1000)]
    heard: list[str] = []
    found = read("datasets:x", heard)
    numbers = [int(str(document.content)) for document in found]
    assert len(numbers) == 251  # of four characters, the first to go over 1000
    assert numbers == sorted(set(numbers))
    steps = [after - before for before, after in itertools.pairwise(numbers)]
    assert max(steps) <= 8
    assert heard[1] == "`datasets:x` is over 0 MiB: reading evenly spaced parts of it"
    for count in range(60):
        hub.rows = [{"text": str(number)} for number in range(count)]
        assert [document.content for document in read("datasets:x")] == [*map(str, range(count))]


@pytest.mark.parametrize(
    ("raised", "kind", "what"),
    [
        (FileNotFoundError("no `x` on the Hub"), InputError, "cannot be loaded: no `x` on the Hub"),
        (ValueError("Unknown split\n 'tst'."), InputError, "cannot be loaded: Unknown split 'tst'."),
        (KeyError("cfg"), InputError, "cannot be loaded: KeyError 'cfg'"),
        (ConnectionError("no route"), MachineError, "cannot be fetched: no route"),
        (OSError(28, "No space left"), MachineError, "cannot be fetched: [Errno 28] No space left"),
        (RuntimeError(), MachineError, "cannot be fetched: RuntimeError"),
        (RuntimeError("x" * 400), MachineError, "cannot be fetched: " + "x" * 300),
    ],
)
def test_what_the_package_says_becomes_one_sentence(
    hub: Hub, raised: Exception, kind: type[QuantError], what: str
) -> None:
    hub.fails = raised
    found, where, _ = refused(kind, lambda: load("datasets:x:cfg"))
    assert (found, where) == (f"`datasets:x:cfg` {what}", WHERE)


def test_data_sets_need_a_name_and_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in ("datasets:", "datasets::cfg"):
        what, where, _ = refused(InputError, lambda data=data: check_source(source(data), TINY))
        assert (what, where) == (f"`{data}` names no data set", WHERE)
    present = importlib.util.find_spec
    absent = lambda name: None if name == "datasets" else present(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    what, where, fix = refused(MachineError, lambda: load("datasets:org/name"))
    assert (what, where) == ("`datasets:org/name` needs the package `datasets`", WHERE)
    assert fix == "pip install 'quantcli[datasets] @ git+https://github.com/quantcli/quantcli'"


# --- the digest


def test_the_digest_follows_what_decides_and_nothing_else(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    model = tiny_copy(tmp_path / "model")
    base = source_digest(source(path), model)
    moved = text_file(tmp_path, PLAY, "elsewhere.md")
    (model / "README.md").write_text("not the tokenizer's")
    assert source_digest(source(moved, where="other:1"), tiny_copy(tmp_path / "copy")) == base
    assert source_digest(source(path), model) == base
    changed = [
        source(path, samples=4),
        source(path, length=17),
        source(path, seed=1),
        source(path, pack=False),
        source(path, batch_tokens=64),
        source(text_file(tmp_path, PLAY + " ", "more.txt")),
        source(text_file(tmp_path, PLAY, "same-bytes.jsonl")),
        source("datasets:x"),
        source("datasets:y"),
    ]
    digests = {source_digest(other, model) for other in changed}
    assert len(digests | {base}) == len(changed) + 1


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
     "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
     "qwen.tiktoken", "tekken.json", "tokenization_own.py"],
)  # fmt: skip
def test_the_digest_follows_every_file_of_the_tokenizer(tmp_path: Path, name: str) -> None:
    data = source(text_file(tmp_path))
    model = tiny_copy(tmp_path / "model", ("config.json",))
    seen = {source_digest(data, model)}
    for content in ("{}", "{ }"):
        (model / name).write_text(content)
        seen.add(source_digest(data, model))
    assert len(seen) == 3


def test_a_model_that_cannot_be_listed(tmp_path: Path) -> None:
    data, model = source(text_file(tmp_path)), tmp_path / "none"
    what, where, _ = refused(MachineError, lambda: source_digest(data, model))
    assert (what, where) == ("cannot read: No such file or directory", str(model))


def test_the_bundled_text_is_enough_for_the_bundled_model() -> None:
    dataset = load(ROOT / "examples" / "calibration.txt", samples=128, length=512, batch_tokens=4096)
    assert (dataset.samples, dataset.tokens, len(dataset.batches)) == (128, 65536, 16)
