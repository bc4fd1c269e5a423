"""What once ended in a traceback, or did not end: `make fuzz` writes such inputs into corpus/READER.

A name says what must come of an input: `refused-` an error that says what is wrong, `read-` none,
`found-` either of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from quantcli.core.errors import QuantError
from tests.fuzz.mutate import mutate
from tests.fuzz.readers import READERS, Read, Reader
from tests.fuzz.run import CORPUS, attempt, run

IN_PROCESS = [name for name, reader in READERS.items() if reader.runs > 1000]
INPUTS = sorted(path for name in IN_PROCESS for path in (CORPUS / name).glob("*"))


@pytest.fixture(scope="module")
def reader_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Read]:
    """Readers by name, each made once."""
    return cache(lambda name: READERS[name].make(tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_inputs_that_once_failed(reader_of: Callable[[str], Read], path: Path) -> None:
    fault, _, refused = attempt(reader_of(path.parent.name), path.read_bytes())
    assert fault is None, fault.text
    outcome = path.name.partition("-")[0]
    assert {"read": not refused, "refused": refused, "found": True}[outcome]


def test_the_corpus_has_only_inputs_of_readers() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= READERS.keys()
    assert len(INPUTS) > 20


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_good_input_is_read(reader_of: Callable[[str], Read], name: str) -> None:
    """Else nothing behind the first check would ever be reached."""
    fault, _, refused = attempt(reader_of(name), READERS[name].seeds()[0])
    assert (fault, refused) == (None, False)


def test_a_mutation_is_a_function_of_its_number() -> None:
    data = READERS["config"].seeds()[0]
    made = [mutate(data, "json", number, ("x",)) for number in range(50)]
    assert made == [mutate(data, "json", number, ("x",)) for number in range(50)]
    assert len({*made}) > 45


def _careless(data: bytes) -> None:
    table = json.loads(data) if data.startswith(b'{"') else {}
    if not isinstance(table.get("a", 0), int):
        raise QuantError("`a` is not a number")
    if table.get("b", 0) is None:
        raise KeyError("b")


def test_a_careless_reader_is_found_out() -> None:
    reader = Reader("careless", lambda _: _careless, lambda: [b'{"a": 1, "b": 2}'], "json")
    outcome = run(reader, 2000, 60, seed=0)
    assert outcome.runs == 2000
    assert 0 < outcome.refused < 2000
    assert "KeyError('b')" in outcome.faults
    assert json.loads(outcome.faults["KeyError('b')"].data)["b"] is None
