"""Each value of config.json and of quantization configs, replaced by values of other types.

Only errors that say what is wrong come of it. CI takes a fixed sample, and the command
`python -m tests.fuzz.test_types` all of them.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path as Folder
from typing import Any

import pytest

from tests.fuzz.mutate import Path
from tests.fuzz.readers import READERS
from tests.fuzz.run import attempt

ODD = (None, True, -1, 10**30, 1.5, "x", "", [], ["x"], {}, {"x": 1})
NAMES = ("config", "quantization")
_SAMPLE = 150  # of each reader, a few ms each


def _places(value: Any, path: Path = ()) -> Iterator[Path]:
    """The place of every value in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from _places(inner, (*path, key))


def _inputs(name: str) -> list[tuple[Path, Any, bytes]]:
    """Every seed of a reader with one value replaced."""
    found = []
    for seed in READERS[name].seeds():
        table = json.loads(seed)
        for path in _places(table):
            for odd in ODD if path != ("of",) else ():
                changed = copy.deepcopy(table)
                inner: Any = changed
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = odd
                found.append((path, odd, json.dumps(changed).encode()))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_values_of_other_types(name: str, tmp_path: Folder) -> None:
    read = READERS[name].make(tmp_path)
    chosen = random.Random(name).sample(_inputs(name), _SAMPLE)
    refusals = 0
    for path, odd, data in chosen:
        fault, _, refused = attempt(read, data)
        assert fault is None, f"{path} is {odd!r}: {fault.text}"
        refusals += refused
    assert 0 < refusals < _SAMPLE


def test_a_wrong_type_is_named_with_its_place(tmp_path: Folder) -> None:
    """`strategy` as a list, `format` as an object, `model_type` as a list: each once ended in a bug."""
    read = READERS["quantization"].make(tmp_path)
    seeds = [json.loads(seed) for seed in READERS["quantization"].seeds()]
    (table,) = [t for t in seeds if "config_groups" in t["config"]["quantization_config"]][:1]
    block = table["config"]["quantization_config"]
    weights = next(iter(block["config_groups"].values()))["weights"]
    for place, key, odd in ((weights, "strategy", ["x"]), (block, "format", {"x": 1})):
        before = place[key]
        place[key] = odd
        assert attempt(read, json.dumps(table).encode())[0] is None
        place[key] = before
    table["config"]["model_type"] = ["qwen3"]
    fault, _, refused = attempt(read, json.dumps(table).encode())
    assert (fault, refused) == (None, True)


def main() -> None:
    """Every value; the exit code is 1 if one ends in something else than an error that says why."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            read = READERS[name].make(Folder(folder) / name)
            for path, odd, data in _inputs(name):
                fault = attempt(read, data)[0]
                if fault is not None:
                    failed += 1
                    print(f"{name}: {path} is {odd!r}\n{fault.text}", flush=True)
            print(f"{name}: {len(_inputs(name))} inputs, {failed} faults", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
