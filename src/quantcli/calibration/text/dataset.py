"""Text as batches of token ids, from a file or from a data set of the Hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import random
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcli.calibration.text.documents import (
    PIECE,
    Document,
    check_data,
    data_digest,
    read_documents,
    sentence,
)
from quantcli.calibration.text.examples import NAME, Examples
from quantcli.checkpoint.config.table import Table
from quantcli.checkpoint.header import parse_json
from quantcli.checkpoint.remote.mounts import complete
from quantcli.core.errors import InputError, MachineError

_VOCABULARY = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
_TOKENIZER_FILES = (*_VOCABULARY, "tokeniz*", "vocab*", "merges*", "special_tokens_map.json",
                    "added_tokens.json", "chat_template*")  # fmt: skip
_PLAIN = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})  # as tokenizer.json says
_FETCH = "fetch the whole model folder, with tokenizer.json and tokenizer_config.json"


@dataclass(frozen=True)
class TextSource:
    """Which text, and how it becomes samples."""

    data: str  # a path, or datasets:ID[:CONFIG][:SPLIT]
    where: str  # file:line of the key that names it, for messages
    samples: int
    length: int  # tokens of a sample
    seed: int | None  # None: the first ones
    pack: bool  # join the documents and cut windows of `length`; else each record is a sample
    batch_tokens: int  # a batch holds max(1, batch_tokens // length) samples
    option: str = "calibration."  # prefix of `samples` and `length` in messages
    examples: Examples | None = None  # in place of `data`: each is a sample, and all are taken


@dataclass(frozen=True)
class Batch:
    """Samples of one length, or padded on the right to one."""

    input_ids: Tensor  # int64 [batch, length]
    mask: Tensor | None  # bool [batch, length], False on padding; None without padding


@dataclass(frozen=True)
class Dataset:
    """The samples in the order of the text."""

    batches: tuple[Batch, ...]
    tokens: int  # without padding
    samples: int


def check_source(source: TextSource, model: Path, fix: str = _FETCH) -> None:
    """Refuse text that `load_dataset` could not use, as far as the files show it.

    source: the data and its options. model: the model's folder. fix: of a missing tokenizer.
    Raises InputError or MachineError.
    """
    if source.examples is None:
        check_data(source.data, source.where)
    elif source.examples.ids:
        return  # which need no tokenizer
    if not _find(model, _VOCABULARY) and not _names_tokenizer(model / "tokenizer_config.json"):
        raise InputError("the model has no tokenizer", where=str(model), fix=fix)
    if importlib.util.find_spec("transformers") is None:
        what, fix = "running a model needs the package `transformers`", "pip install transformers"
        raise MachineError(what, where=source.where, fix=fix)


def model_limits(config: Table) -> tuple[int | None, int | None]:
    """Positions and vocabulary that config.json gives the language model."""
    return config.size("max_position_embeddings") or None, config.size("vocab_size") or None


def check_length(source: TextSource, positions: int | None) -> None:
    """InputError if samples are longer than the model's positions, if it names how many."""
    if positions is not None and source.length > positions:
        what = f"samples of {source.length} tokens are longer than the model's {positions} positions"
        fix = f"set {source.option}length to {positions} or less"
        if source.examples is not None and source.examples.ids:
            fix = f"give samples of {positions} tokens or less"
        raise InputError(what, where=source.where, fix=fix)


def source_digest(source: TextSource, model: Path) -> str:
    """sha256 (hex) of all that decides the samples: text, options, tokenizer files."""
    if source.examples is not None and source.examples.ids:
        return source.examples.digest
    text = data_digest(source.data, source.where) if source.examples is None else source.examples.digest
    options = (source.samples, source.length, source.seed, source.pack, source.batch_tokens)
    complete(model, _is_of_tokenizer)
    files = [(path.name, _digest(path)) for path in _find(model, _TOKENIZER_FILES)]
    return hashlib.sha256(json.dumps([text, options, files]).encode()).hexdigest()


def load_dataset(
    source: TextSource,
    model: Path,
    *,
    positions: int | None,
    vocab_size: int | None,
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Dataset:
    """The samples of `source` through the tokenizer in `model`. Same input, same batches.

    positions and vocab_size are the model's, if it has them. `say` receives notes on slow steps and
    on text that is left out. Raises InputError or MachineError.
    """
    check_source(source, model)
    check_length(source, positions)
    eos = pad = None
    if source.examples is not None and source.examples.ids:
        samples = list(source.examples.ids)
    else:
        with quiet():
            tokenizer = _load_tokenizer(model, trust_remote_code)
            documents = _documents(source, say)
            choose = _windows if source.pack else _records
            samples = choose(tokenizer, documents, source)
            eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    limit = math.inf if vocab_size is None else vocab_size
    for number, sample in enumerate(samples, 1):
        if (largest := max(sample)) >= limit:
            what = f"token {largest} in sample {number} is beyond the model's {vocab_size} tokens"
            fix = "give the model folder the tokenizer that the model was trained with"
            raise InputError(what, where=str(model), fix=fix)
    # A padding token may have been added behind the vocabulary: no embedding has a row for it.
    pad = next(token for token in (pad, eos, 0) if token is not None and token < limit)
    size = max(1, source.batch_tokens // source.length)
    groups = [samples[begin : begin + size] for begin in range(0, len(samples), size)]
    batches = tuple(_batch(group, pad) for group in groups)
    return Dataset(batches, tokens=sum(map(len, samples)), samples=len(samples))


def _documents(source: TextSource, say: Callable[[str], None]) -> list[Document]:
    if source.examples is None:
        return read_documents(source.data, source.where, say)
    return [Document(text, f"{NAME}[{n}]") for n, text in enumerate(source.examples.texts)]


def text_of(model: Path, *, trust_remote_code: bool = False) -> Callable[[Sequence[int]], str]:
    """A function that turns token ids into text by the tokenizer in `model`.

    Ids that the tokenizer cannot decode are named by their numbers.
    """
    with quiet():
        tokenizer = _load_tokenizer(model, trust_remote_code)

    def decode(ids: Sequence[int]) -> str:
        try:
            return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        except Exception:  # whatever its files make the library stumble over
            return "".join(f"<{token}>" for token in ids)

    return decode


def _batch(samples: list[array[int]], pad: int) -> Batch:
    shape = (len(samples), max(map(len, samples)))
    ids = torch.full(shape, pad, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample.tolist(), dtype=torch.int64)
        mask[row, : len(sample)] = True
    return Batch(ids, None if mask.all() else mask)


def _windows(tokenizer: Any, documents: list[Document], source: TextSource) -> list[array[int]]:
    """Windows of `length` tokens, cut from all documents with an end token between two."""
    stream, eos = array("i"), tokenizer.eos_token_id
    for document in documents:
        tokens = _encode(tokenizer, document)
        if stream and tokens and eos is not None and stream[-1] != eos:
            stream.append(eos)
        stream.extend(tokens)
    chosen = _choose(len(stream) // source.length, f"samples of {source.length} tokens", source)
    return [stream[index * source.length : (index + 1) * source.length] for index in chosen]


def _records(tokenizer: Any, documents: list[Document], source: TextSource) -> list[array[int]]:
    """The first `length` tokens of each chosen record."""
    samples = []
    for index in _choose(len(documents), "records", source):
        samples.append(_encode(tokenizer, documents[index], source.length)[: source.length])
        if not samples[-1]:
            fix = "take the record out, or give it text"
            raise InputError("record holds no text", where=documents[index].where, fix=fix)
    return samples


def _choose(count: int, kind: str, source: TextSource) -> list[int]:
    if count < source.samples:
        what = f"data gives {count} {kind}; {source.samples} are asked for"
        shorter = f" or {source.option}length" if source.pack else ""
        fix = f"lower {source.option}samples{shorter}, or give more text"
        raise InputError(what, where=source.where, fix=fix)
    if source.seed is None:
        return list(range(source.samples))
    return sorted(random.Random(source.seed).sample(range(count), source.samples))


def _encode(tokenizer: Any, document: Document, enough: int | None = None) -> array[int]:
    """A document's tokens, at least `enough` of them; none if all of them are special."""
    text, special = document.content, True
    tokens = array("i")
    try:
        if not isinstance(text, str):
            text, special = tokenizer.apply_chat_template(text, tokenize=False), False
        text.encode()  # half a surrogate pair, which JSON can hold and the tokenizer misreports
        begin = 0
        while begin < len(text) and not (enough and len(tokens) >= enough):
            end = begin + PIECE
            end = text.rfind("\n", begin, end) + 1 if end < len(text) else end
            end = end or begin + PIECE  # a line longer than that
            piece = tokenizer(text[begin:end], add_special_tokens=special, verbose=False)
            tokens.extend(piece["input_ids"])
            begin, special = end, False
    except Exception as error:
        what = f"the model's tokenizer refuses this text: {sentence(error)}"
        fix = "correct the text or take it out"
        if not isinstance(document.content, str) and not getattr(tokenizer, "chat_template", None):
            what = "`messages` need a chat template, and the model's tokenizer has none"
            fix = "give `text`, or put the model's chat_template.jinja into its folder"
        raise InputError(what, where=document.where, fix=fix) from None
    return tokens if set(tokens) - set(tokenizer.all_special_ids) else array("i")


def _load_tokenizer(model: Path, trust_remote_code: bool) -> Any:
    import transformers

    complete(model, _is_of_tokenizer)
    try:
        # AutoTokenizer goes by the model's type before the class that the files name, and splits text
        # in another way than the tokenizer.json that came with the model
        plain = _named_class(model) in _PLAIN and (model / "tokenizer.json").is_file()
        loader: Any = transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer
        tokenizer: Any = loader.from_pretrained(
            str(model), local_files_only=True, trust_remote_code=trust_remote_code
        )
        empty = len(tokenizer) <= len(tokenizer.all_special_ids)
    except Exception as error:  # whatever its files make the library stumble over
        if not trust_remote_code and "trust_remote_code" in str(error):
            what = "the model's tokenizer is code that came with the model"
            fix = "`--trust-remote-code` runs that code: give it only if you trust its author"
            raise InputError(what, where=str(model), fix=fix) from None
        kind = MachineError if isinstance(error, ImportError) else InputError
        what = f"the model's tokenizer cannot be loaded: {sentence(error)}"
        fix = "fetch its files again; a tokenizer.model also needs `pip install sentencepiece`"
        raise kind(what, where=str(model), fix=fix) from None
    if empty:  # transformers makes one of nothing if the vocabulary is missing
        raise InputError("the model's tokenizer has no vocabulary", where=str(model), fix=_FETCH)
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


def _find(model: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of `model` whose names match, by name."""
    try:
        files = sorted(path for path in model.iterdir() if path.is_file())
    except OSError as error:
        what, fix = f"cannot read: {error.strerror}", "check the folder and its permissions"
        raise MachineError(what, where=str(model), fix=fix) from None
    return [path for path in files if any(fnmatchcase(path.name, p) for p in patterns)]


def _is_of_tokenizer(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _TOKENIZER_FILES)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        what, fix = f"cannot read: {error.strerror}", "check the file and its permissions"
        raise MachineError(what, where=str(path), fix=fix) from None


def _names_tokenizer(config: Path) -> bool:
    """Whether the file names a class that may need no vocabulary, or has files of its own."""
    try:
        table = json.loads(config.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(table, dict) and not table.keys().isdisjoint(("tokenizer_class", "auto_map"))
