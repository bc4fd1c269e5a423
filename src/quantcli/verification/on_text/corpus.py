"""The texts that both models run on, as one sequence of batches: all go through a layer at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantcli.calibration.text.dataset import (
    Batch,
    TextSource,
    load_dataset,
    model_limits,
)
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.recipe.recipe import name_of_data
from quantcli.verification.options import VerifyOptions

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Corpus:
    """The windows of all texts, text by text.

    names, sha256: of each text; the hash is hex.
    batches: each of one text. texts: the number of that.
    """

    names: tuple[str, ...]
    sha256: tuple[str, ...]
    batches: tuple[Batch, ...]
    texts: tuple[int, ...]


def text_sources(options: VerifyOptions, where: str = "", option: str = "--") -> list[TextSource]:
    """Which texts are run. where: what names them, for messages; option: prefix of options there."""
    return [
        TextSource(
            data=str(data),
            where=where or f"--data {data}",
            samples=options.samples,
            length=options.length,
            seed=None,
            pack=True,
            batch_tokens=_BATCH_TOKENS,
            option=option,
        )
        for data in options.data or ()
    ]


def read_texts(
    sources: Sequence[TextSource], checkpoint: Checkpoint, progress: Progress, *, trust: bool = False
) -> Corpus:
    """The windows of text to run. InputError if a text gives fewer samples than are asked for, and if
    one is given twice."""
    positions, vocabulary = model_limits(checkpoint.text_config)
    batches: list[Batch] = []
    texts: list[int] = []
    first: dict[str, TextSource] = {}
    for number, source in enumerate(sources):
        named = f"{source.samples} samples of {source.length} tokens of {source.data}"
        progress.phase(f"reading text: {named}")
        dataset = load_dataset(
            source,
            checkpoint.path,
            positions=positions,
            vocab_size=vocabulary,
            trust_remote_code=trust,
            say=progress.say,
        )
        if (other := first.setdefault(dataset.text, source)) is not source:
            what = f"the text is the same as `{other.data}`"
            raise InputError(what, where=source.where, fix="give each text once")
        batches += dataset.batches
        texts += [number] * len(dataset.batches)
    names = [name_of_data(source.data) for source in sources]
    if len({*names}) < len(names):  # files of one name in several folders
        names = [source.data for source in sources]
    return Corpus(tuple(names), tuple(first), tuple(batches), tuple(texts))
