"""Every checkpoint of the zoo with every recipe, against the table of expectations.

    python -m tests.zoo.run [names] [--columns C ..] [--update] [--models FOLDER]

A checkpoint is made, converted with each recipe, verified in full against the model, and removed. The
run fails if a pair crashes, does not verify, or differs from `expected.txt`: a number there is the
percentage of the weights of all linears that are quantized, a word is a key of `pairs.REASONS`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tests.zoo.pairs import COLUMNS, Outcome, run_pair

TABLE = Path(__file__).with_name("expected.txt")
APART = 0.15  # of percentages that count as equal: they are written with one decimal


def expectations() -> dict[tuple[str, str], str]:
    """The word of the table for each pair."""
    lines = [line.split() for line in TABLE.read_text().splitlines() if line and line[0] != "#"]
    columns = lines[0][1:]
    return {(name, column): word for name, *words in lines[1:]
            for column, word in zip(columns, words, strict=True)}  # fmt: skip


def write_table(words: dict[tuple[str, str], str]) -> None:
    """The table, one line for each checkpoint in alphabetical order."""
    names = sorted({name for name, _ in words})
    rows = [["name", *COLUMNS]] + [
        [name, *(words.get((name, c), "-") for c in COLUMNS)] for name in names
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows
    ]
    head = (
        "# Written by `python -m tests.zoo.run --update`; tests/zoo/run.py says what the words mean.\n"
    )
    TABLE.write_text(head + "".join(line.rstrip() + "\n" for line in lines))


def as_expected(outcome: Outcome, word: str | None) -> bool:
    """Whether an outcome is what the table says."""
    if outcome.wrong is not None or word is None or outcome.word == "?":
        return False
    if outcome.share is None:
        return outcome.word == word
    try:
        return abs(float(word) - outcome.share) < APART
    except ValueError:
        return False


def run_model(columns: list[str], models: Path | None, name: str) -> list[Outcome]:
    """All pairs of one checkpoint."""
    import torch
    import transformers

    from tests.zoo.make import make

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        model = (models or Path(place)) / name
        if not model.is_dir():
            make(name, model)
        return [run_pair(name, model, column, Path(place)) for column in columns]


def run(names: list[str], columns: list[str], models: Path | None) -> Iterator[list[Outcome]]:
    """The outcomes of each checkpoint, in the order of names; a process for each core."""
    context = multiprocessing.get_context("spawn")
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, context) as pool:
        yield from pool.map(partial(run_model, columns, models), names)


def main() -> None:
    """Run, print a line for each checkpoint and what differs; exit code 1 if something does."""
    from tests.zoo.make import names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="checkpoints; all without")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--update", action="store_true", help="write the outcomes into the table")
    parser.add_argument("--models", type=Path, help="where the checkpoints are, or are kept")
    options = parser.parse_args()
    expected = expectations() if TABLE.is_file() else {}
    words, bad, count = dict(expected), [], 0
    for outcomes in run(options.names or names(), options.columns, options.models):
        count += len(outcomes)
        words |= {(outcome.name, outcome.column): outcome.word for outcome in outcomes}
        line = "  ".join(f"{outcome.word:>11}" for outcome in outcomes)
        print(f"{outcomes[0].name:24} {line}", flush=True)
        for outcome in outcomes:
            word = expected.get((outcome.name, outcome.column))
            if not as_expected(outcome, outcome.word if options.update else word):
                bad.append(outcome)
                print(f"  {outcome.column}: {outcome.wrong or outcome.word}; expected {word}")
                print("".join(f"    {text}\n" for text in outcome.said.splitlines()[-12:]), end="")
    if options.update:
        write_table(words)
    print(f"{count} pairs, {len(bad)} not as they should be")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
