"""Tokenizers and chat templates that came with a model, by transformers: text to token ids and back.

They are content that was not trusted, so everything here runs in another process, within limits
(`core/untrusted/bounded`). Torch is not imported there, unless the tokenizer is code.
"""

from __future__ import annotations

import logging
import random
import sys
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from quantcli.calibration.text.documents import PIECE, Document, sentence
from quantcli.core.errors import InputError, MachineError
from quantcli.core.memory.shortage import is_out_of_memory, machine_fault
from quantcli.core.untrusted.bounded import Subject, run_bounded, start
from quantcli.core.untrusted.names import utf8_fault
from quantcli.core.untrusted.panics import is_panic
from quantcli.core.untrusted.server import Answer, Limits, at
from quantcli.core.untrusted.tables import parse_json

FETCH = "fetch the whole model folder, with tokenizer.json and tokenizer_config.json"
_PLAIN = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})  # as tokenizer.json says
# What becomes of one character at most, and what comes on top. Unicode's largest expansion (NFKC of
# U+FDFA) is 18 characters, or 33 tokens of a byte. A template adds a prompt of the system, and marks.
_MOST_FROM_ONE, _FIXED = 64, 2**16
# Limits: for a tokenizer without a table of its own, and for each MiB of its files and of the text. The
# slowest are those of Python code, with 0.1 MiB of text in a second, and large vocabularies that are
# converted when they are loaded.
_SECONDS, _SECONDS_PER_MIB = 10, 20
_MEMORY, _MEMORY_PER_BYTE = 2**29, 48
_CODE_MEMORY = 2**32  # for a tokenizer that is code, which may import anything


@dataclass(frozen=True)
class Choice:
    """Which samples to make of documents.

    samples: how many. length: tokens of each. seed: of the choice; None takes the first ones.
    pack: join the documents and cut windows of `length`; else each document is a sample. where, option:
    the key that asks, and the prefix of other keys, for messages.
    """

    samples: int
    length: int
    seed: int | None
    pack: bool
    where: str
    option: str


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer in a model's folder. nbytes: of its files. trusted: whether its code may run."""

    model: Path
    nbytes: int
    trusted: bool

    def samples(
        self, documents: Sequence[Document], choice: Choice
    ) -> tuple[list[array[int]], int | None, int | None]:
        """Token ids of each sample, the end token, and the token for padding, if there are such.

        Raises InputError for text that gives too few samples, or that the tokenizer does not take
        within limits, and MachineError for a missing package and too little memory.
        """
        nbytes = sum(len(str(document.content)) for document in documents)
        answer = choice.samples * (choice.length * 4 + 16)
        limits = self._limits(nbytes, answer)
        work = "reading this text with the model's tokenizer"
        table, blob = self._run(limits, work, encode, list(documents), choice)
        ids = array("i")
        ids.frombytes(blob)
        samples, begin = [], 0
        for length in table["lengths"]:
            samples.append(ids[begin : begin + length])
            begin += length
        return samples, table["eos"], table["pad"]

    def ids(self, texts: Sequence[str]) -> tuple[list[array[int]], int | None]:
        """Token ids of each text, without special tokens; and the token that begins a text, or ends
        one, if there is one. Raises as `samples`."""
        nbytes = sum(map(len, texts))
        work = "reading this text with the model's tokenizer"
        limits = self._limits(nbytes, 16 * (nbytes + len(texts)))
        table, blob = self._run(limits, work, encode_texts, list(texts))
        ids = array("i")
        ids.frombytes(blob)
        ends = [*accumulate(table["lengths"], initial=0)]
        return [ids[begin:end] for begin, end in pairwise(ends)], table["first"]

    def texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence of token ids. Ids that cannot be decoded are named by numbers."""
        tokens = sum(map(len, sequences))
        limits = self._limits(tokens, 2**10 * tokens)
        work = "writing tokens as text with the model's tokenizer"
        plain = [list(sequence) for sequence in sequences]
        texts: list[str] = self._run(limits, work, decode, plain)[0]["texts"]
        return texts

    def _run(self, limits: Limits, work: str, function: Any, *arguments: Any) -> Answer:
        arguments = (str(self.model), self.trusted, *arguments)
        subject = Subject("the model's tokenizer", work, str(self.model))
        return run_bounded(function, arguments, _warm(self.trusted), limits, subject)

    def _limits(self, nbytes: int, answer: int) -> Limits:
        seconds = _SECONDS + _SECONDS_PER_MIB * (self.nbytes + nbytes) // 2**20
        memory = _MEMORY + _MEMORY_PER_BYTE * (self.nbytes + nbytes) + self.trusted * _CODE_MEMORY
        return Limits(seconds, 60.0 + 10 * seconds, memory, answer + 2**16)


def start_process(*, trust_remote_code: bool = False) -> None:
    """Start the process that runs tokenizers, so that it is there when text is."""
    start(_warm(trust_remote_code))


def _warm(trusted: bool) -> Callable[[], None]:
    return with_torch if trusted else without_torch


# -- in the other process


def without_torch() -> None:
    """Import what most tokenizers need. AutoTokenizer, for the others, takes as long again, and four
    times as long with torch, which no tokenizer of the library uses."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers import PreTrainedTokenizerFast  # noqa: F401


def with_torch() -> None:
    """Import transformers whole: code of a model may need any of it."""
    import torch
    from transformers import AutoTokenizer  # noqa: F401

    torch.set_num_threads(1)


def encode(model: str, trusted: bool, documents: list[Document], choice: Choice) -> Answer:
    """Token ids of samples, int32, one after the other; their lengths and the special tokens.

    Raises InputError and MachineError as `Tokenizer.samples`.
    """
    with quiet():
        tokenizer = _load(Path(model), trusted)
        samples = (_windows if choice.pack else _records)(tokenizer, documents, choice)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    blob = b"".join(sample.tobytes() for sample in samples)
    special = {"eos": eos, "pad": pad}
    return {"lengths": [*map(len, samples)]} | {
        name: token if isinstance(token, int) else None for name, token in special.items()
    }, blob


def encode_texts(model: str, trusted: bool, texts: list[str]) -> Answer:
    """Token ids of texts without special tokens, int32, one after the other, and their lengths."""
    with quiet():
        tokenizer = _load(Path(model), trusted)
        at(str(_table(tokenizer)))
        found = [_plain_ids(tokenizer, text) for text in texts]
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    first = next((token for token in special if isinstance(token, int)), None)
    blob = b"".join(ids.tobytes() for ids in found)
    return {"lengths": [*map(len, found)], "first": first}, blob


def _plain_ids(tokenizer: Any, text: str) -> array[int]:
    try:
        text.encode()  # half a surrogate pair
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError from None
        what = f"the model's tokenizer refuses the text {text[:40]!a}: {sentence(error)}"
        raise InputError(what, fix="correct the text or take it out") from None
    _check_growth("tokenizer", "tokens", len(ids), len(text), tokenizer)
    return array("i", ids)


def decode(model: str, trusted: bool, sequences: list[list[int]]) -> Answer:
    """The text of each sequence of token ids."""
    with quiet():
        tokenizer = _load(Path(model), trusted)
        return {"texts": [_text(tokenizer, ids) for ids in sequences]}, b""


def _text(tokenizer: Any, ids: list[int]) -> str:
    try:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    except MemoryError:
        raise
    except BaseException as error:  # whatever its files make the library stumble over
        if isinstance(error, Exception) or is_panic(error):
            return "".join(f"<{token}>" for token in ids)
        raise


def _windows(tokenizer: Any, documents: list[Document], choice: Choice) -> list[array[int]]:
    """Windows of `length` tokens, cut from all documents with an end token between two."""
    stream, eos = array("i"), tokenizer.eos_token_id
    for document in documents:
        tokens = _encode(tokenizer, document)
        if stream and tokens and eos is not None and stream[-1] != eos:
            stream.append(eos)
        stream.extend(tokens)
    chosen = _choose(len(stream) // choice.length, f"samples of {choice.length} tokens", choice)
    return [stream[index * choice.length : (index + 1) * choice.length] for index in chosen]


def _records(tokenizer: Any, documents: list[Document], choice: Choice) -> list[array[int]]:
    """The first `length` tokens of each chosen record."""
    samples = []
    for index in _choose(len(documents), "records", choice):
        samples.append(_encode(tokenizer, documents[index], choice.length)[: choice.length])
        if not samples[-1]:
            fix = "take the record out, or give it text"
            raise InputError("record holds no text", where=documents[index].where, fix=fix)
    return samples


def _choose(count: int, kind: str, choice: Choice) -> list[int]:
    if count < choice.samples:
        what = f"data gives {count} {kind}; {choice.samples} are asked for"
        shorter = f" or {choice.option}length" if choice.pack else ""
        fix = f"lower {choice.option}samples{shorter}, or give more text"
        raise InputError(what, where=choice.where, fix=fix)
    if choice.seed is None:
        return list(range(choice.samples))
    return sorted(random.Random(choice.seed).sample(range(count), choice.samples))


def _encode(tokenizer: Any, document: Document, enough: int | None = None) -> array[int]:
    """A document's tokens, at least `enough` of them; none if all of them are special."""
    text, special = document.content, True
    tokens = array("i")
    try:
        if not isinstance(text, str):
            text, special = _rendered(tokenizer, text), False
        text.encode()  # half a surrogate pair, which JSON can hold and the tokenizer misreports
        begin = 0
        at(str(_table(tokenizer)))
        while begin < len(text) and not (enough and len(tokens) >= enough):
            end = begin + PIECE
            end = text.rfind("\n", begin, end) + 1 if end < len(text) else end
            end = end or begin + PIECE  # a line longer than that
            piece = text[begin:end]
            ids = tokenizer(piece, add_special_tokens=special, verbose=False)["input_ids"]
            _check_growth("tokenizer", "tokens", len(ids), len(piece), tokenizer)
            tokens.extend(ids)
            begin, special = end, False
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # whether of the machine or by the limit is decided elsewhere
            raise MemoryError from None
        what = f"the model's tokenizer refuses this text: {sentence(error)}"
        fix = "correct the text or take it out"
        if not isinstance(document.content, str) and not getattr(tokenizer, "chat_template", None):
            what = "`messages` need a chat template, and the model's tokenizer has none"
            fix = "give `text`, or put the model's chat_template.jinja into its folder"
        raise InputError(what, where=document.where, fix=fix) from None
    return tokens if set(tokens) - set(tokenizer.all_special_ids) else array("i")


def _rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """A chat as the model's template writes it."""
    at(str(_template(tokenizer)))
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    _check_growth("chat template", "characters", len(text), len(str(messages)), tokenizer)
    return text


def _check_growth(part: str, unit: str, count: int, characters: int, tokenizer: Any) -> None:
    """InputError if the tokenizer or its template makes far more of a text than any language needs."""
    if count > _FIXED + _MOST_FROM_ONE * characters:
        path = _table(tokenizer) if part == "tokenizer" else _template(tokenizer)
        what = f"the model's {part} makes {count} {unit} of {characters} characters"
        raise InputError(what, where=str(path), fix="fetch the model's files again from its author")


def _table(tokenizer: Any) -> Path:
    """The file that says how text is split; the folder if it is not tokenizer.json."""
    path = Path(tokenizer.name_or_path) / "tokenizer.json"
    return path if path.is_file() else path.parent


def _template(tokenizer: Any) -> Path:
    path = Path(tokenizer.name_or_path) / "chat_template.jinja"
    return path if path.is_file() else path.with_name("tokenizer_config.json")


def _load(model: Path, trust_remote_code: bool) -> Any:
    import transformers

    at(str(model / "tokenizer.json"))
    if (of_path := utf8_fault(str(model))) is not None:  # compiled code opens the files
        what = f"the model's tokenizer cannot be loaded: its path {of_path}"
        raise InputError(what, where=str(model), fix="give the folder another name")
    try:
        # AutoTokenizer goes by the model's type before the class that the files name, and splits text
        # in another way than the tokenizer.json that came with the model
        plain = _named_class(model) in _PLAIN and (model / "tokenizer.json").is_file()
        loader: Any = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
        tokenizer: Any = loader.from_pretrained(
            str(model), local_files_only=True, trust_remote_code=trust_remote_code
        )
        empty = len(tokenizer) <= len(tokenizer.all_special_ids)
    except InputError:  # it says more than the library would
        raise
    except Exception as error:  # whatever its files make the library stumble over
        if is_out_of_memory(error):
            raise MemoryError from None
        if fault := machine_fault(error, "the model's tokenizer", model):
            raise fault from None
        if not trust_remote_code and "trust_remote_code" in str(error):
            what = "the model's tokenizer is code that came with the model"
            fix = "`--trust-remote-code` runs that code: give it only if you trust its author"
            raise InputError(what, where=str(model), fix=fix) from None
        kind = MachineError if isinstance(error, ImportError) else InputError
        what = f"the model's tokenizer cannot be loaded: {sentence(error)}"
        fix = "fetch its files again; a tokenizer.model also needs `pip install sentencepiece`"
        raise kind(what, where=str(model), fix=fix) from None
    if empty:  # transformers makes one of nothing if the vocabulary is missing
        raise InputError("the model's tokenizer has no vocabulary", where=str(model), fix=FETCH)
    return tokenizer


def _named_class(model: Path) -> str:
    path = model / "tokenizer_config.json"
    table = parse_json(path.read_bytes(), str(path)) if path.is_file() else None
    named = table.get("tokenizer_class") if isinstance(table, dict) else None
    return named if isinstance(named, str) else ""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' log lines and warnings from the terminal."""
    from transformers.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(level)
