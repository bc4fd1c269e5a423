"""Text as batches of token ids, from a file or from a data set of the Hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantcli.calibration.text.documents import (
    Document,
    check_data,
    data_digest,
    digest_of_rows,
    file_digest,
    read_documents,
)
from quantcli.calibration.text.examples import NAME, Examples
from quantcli.calibration.text.tokenizer import FETCH, Choice, Tokenizer, start_process
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.remote.mounts import complete
from quantcli.core.errors import InputError, MachineError, QuantError
from quantcli.core.untrusted.patterns import glob_matches
from quantcli.core.untrusted.tables import read_table

_VOCABULARY = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
_TOKENIZER_FILES = (*_VOCABULARY, "tokeniz*", "vocab*", "merges*", "special_tokens_map.json",
                    "added_tokens.json", "chat_template*")  # fmt: skip


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
    text: str  # sha256 (hex), see `text_digest`; of the rows of a data set


def check_source(source: TextSource, model: Path, fix: str = FETCH) -> None:
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


def model_limits(config: Settings) -> tuple[int | None, int | None]:
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
    files = [*tokenizer_files(model).items()]
    return hashlib.sha256(json.dumps([text, options, files]).encode()).hexdigest()


def tokenizer_files(model: Path) -> dict[str, str]:
    """sha256 (hex) of each file of the tokenizer in `model`, by name."""
    complete(model, _is_of_tokenizer)
    return {path.name: _digest(path) for path in _find(model, _TOKENIZER_FILES)}


def text_digest(source: TextSource) -> str | None:
    """sha256 (hex) of the text alone: of a file's bytes, or of examples; None for a data set, whose
    rows are known once they are read."""
    if source.examples is not None:
        return source.examples.digest
    return file_digest(source.data, source.where)


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
    text = text_digest(source)
    if source.examples is not None and source.examples.ids:
        samples = list(source.examples.ids)
    else:
        start_process(trust_remote_code=trust_remote_code)
        tokenizer = tokenizer_of(model, trust_remote_code=trust_remote_code)
        documents = _documents(source, say)
        text = text or digest_of_rows(documents)
        choice = Choice(
            source.samples, source.length, source.seed, source.pack, source.where, source.option
        )
        samples, eos, pad = tokenizer.samples(documents, choice)
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
    assert text is not None  # only the rows of a data set were to be read
    return Dataset(batches, tokens=sum(map(len, samples)), samples=len(samples), text=text)


def tokenizer_of(model: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer in a model's folder. MachineError if its files cannot be fetched or listed."""
    complete(model, _is_of_tokenizer)
    nbytes = sum(path.stat().st_size for path in _find(model, _TOKENIZER_FILES))
    return Tokenizer(Path(str(model)), nbytes, trust_remote_code)


def _documents(source: TextSource, say: Callable[[str], None]) -> list[Document]:
    if source.examples is None:
        return read_documents(source.data, source.where, say)
    return [Document(text, f"{NAME}[{n}]") for n, text in enumerate(source.examples.texts)]


def _batch(samples: list[array[int]], pad: int) -> Batch:
    shape = (len(samples), max(map(len, samples)))
    ids = torch.full(shape, pad, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample.tolist(), dtype=torch.int64)
        mask[row, : len(sample)] = True
    return Batch(ids, None if mask.all() else mask)


def _find(model: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of `model` whose names match, by name."""
    try:
        files = sorted(path for path in model.iterdir() if path.is_file())
    except OSError as error:
        what, fix = f"cannot read: {error.strerror}", "check the folder and its permissions"
        raise MachineError(what, where=str(model), fix=fix) from None
    return [path for path in files if any(glob_matches(p, path.name) for p in patterns)]


def _is_of_tokenizer(name: str) -> bool:
    return any(glob_matches(pattern, name) for pattern in _TOKENIZER_FILES)


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
        table = read_table(config)
    except QuantError:
        return False
    return "tokenizer_class" in table or "auto_map" in table
