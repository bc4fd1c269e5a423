"""Stored calibrations whose seals are right and whose content is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantcli.calibration.report import LayerReport, ModuleReport
from quantcli.calibration.sets.identity import Key
from quantcli.calibration.store import HEAD, Store, load_measured, read_head, save_layer
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import InputError
from quantcli.planning.measured import Basis, Edit, Measured
from tests.e2e.calibrating import seal_again

KEY = Key("model", "data", {"a": 1}, {}, {}, {"m": "digest"}, {"digest": {"ranges": 1}})


def write(folder: Path, value: float = 1.0) -> Path:
    """A calibration of one layer."""
    store = Store(folder, KEY, 1, Basis(None, {}, "tool 1"))
    store.close()
    report = LayerReport(
        "layers.0",
        {"m": ModuleReport(4, {"input_scale": 0.5}, {"rounded_to_nearest": "why"}, 3)},
        {"m.weight": {"rows": "00000"}},
        ["n"],
        {"taken_from": {"n": "m"}, "smoothed": [{"producer": "p"}]},
    )
    tensors = {"stats.m.input_scale": torch.tensor([value]), "vector.00000": torch.ones(3)}
    save_layer(folder, 0, tensors, report)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "store")


def test_what_was_written_is_read(folder: Path) -> None:
    measured = load_measured(folder, 1)
    assert measured.stats["m"]["input_scale"].spec == TensorSpec("stats.m.input_scale", "F32", (1,))
    rows = measured.edits["m.weight"].rows
    assert rows is not None
    assert rows.spec.name == "vector.00000"
    assert (measured.edited["smoothed"], measured.taken_from) == (1, {"n": "m"})
    assert read_head(folder) == (KEY, 1)


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda report: report.update(values)


def put_in(key: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda report: report[key].update(values)


LONG = "m" * 600
REPORTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "edit is text": (put(edits={"x": "y"}), "`edits.x` should be an object, not text"),
    "edit of a number": (put(edits={"x": {"rows": 1}}), "`edits.x.rows` should be text"),
    "unknown edit": (put(edits={"x": {"self": "00000"}}), "`edits.x.self` is not an edit"),
    "edit of no vector": (put(edits={"x": {"rows": "7"}}), "edit of `x` names `vector.7`"),
    "edits are null": (put(edits=None), "`edits` should be an object, not null"),
    "hidden name": (put(edits={"a\x9b": {}}), "tensor name `a\\x9b` has control characters"),
    "long name": (put(modules={LONG: {"tokens": 1}}), "is over 512 bytes"),
    "modules are a list": (put(modules=[]), "`modules` should be an object, not a list"),
    "module is a list": (put(modules={"m": []}), "`modules.m` should be an object, not a list"),
    "tokens are a truth value": (
        put(modules={"m": {"tokens": True}}),
        "`modules.m.tokens` should be a whole number, not true or false",
    ),
    "negative tokens": (put(modules={"m": {"tokens": -1}}), "tokens` should be at least 0, not -1"),
    "huge tokens": (put(modules={"m": {"tokens": 2**63}}), "tokens` should be at most"),
    "routed is text": (put(modules={"m": {"tokens": 1, "routed": "x"}}), "routed` should be a whole"),
    "scale is text": (
        put(modules={"m": {"tokens": 1, "input_scale": "x"}}),
        "`modules.m.input_scale` should be a number, not text",
    ),
    "number is a list": (put(modules={"m": {"tokens": 1, "x": [1]}}), "x` should be a number or text"),
    "names are numbers": (put(uncalibrated=[1]), "`uncalibrated[0]` should be text"),
    "donor is an object": (put_in("taken_from", n={}), "`taken_from.n` should be text, not an object"),
    "donors are a list": (put(taken_from=[]), "`taken_from` should be an object, not a list"),
    "groups are a number": (put(smoothed=4), "`smoothed` should be a list, not the number 4"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "what"), REPORTS.values(), ids=[*REPORTS])
def test_a_sealed_report_is_read_by_types(
    folder: Path, change: Callable[[dict[str, Any]], None], what: str
) -> None:
    seal_again(folder, 0, change)
    with pytest.raises(InputError) as caught:
        load_measured(folder, 1)
    error = caught.value
    assert what in error.what
    assert error.where == str(folder / "layer-00000.json")
    assert error.fix == f"delete {folder} to make it anew"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite(tmp_path: Path, value: float) -> None:
    with pytest.raises(InputError, match="input_scale` holds a value that is not finite"):
        load_measured(write(tmp_path / "store", value), 1)


HEADS = {
    "model is a list": ('"model": "model"', '"model": []', "`model` should be text, not a list"),
    "layers are text": ('"layers": 1', '"layers": "1"', "`layers` should be a whole number, not text"),
    "version is true": ('"version": 2', '"version": true', "has version True"),
    "modules hold numbers": ('"m": "digest"', '"m": 1', "`modules.m` should be text"),
    "measured is text": ('"measured": {', '"measured": "x", "more": {', "`measured` should be"),
    "inputs are null": ('"inputs": {', '"inputs": null, "more": {', "`inputs` should be an object"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "after", "what"), HEADS.values(), ids=[*HEADS])
def test_a_head_is_read_by_types(folder: Path, before: str, after: str, what: str) -> None:
    text = (folder / HEAD).read_text()
    assert before in text
    (folder / HEAD).write_text(text.replace(before, after))
    with pytest.raises(InputError) as caught:
        read_head(folder)
    assert what in caught.value.what
    assert (caught.value.where or "").startswith(str(folder))


BASES = {
    "text": ({"text": "a" * 63 + "\x9b"}, "`text` should be a hash of 64 hexadecimal digits, not 'a"),
    "tokenizer": ({"tokenizer": {"a": "b"}}, "`tokenizer.a` should be a hash of 64 hexadecimal"),
    "file": ({"tokenizer": {"\x9b": "a" * 64}}, "file name `\\x9b` has control characters"),
    "tool": ({"tool": "\u202e"}, "`tool` has control characters"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "what"), BASES.values(), ids=[*BASES])
def test_what_manifests_take_of_a_head_is_checked(
    folder: Path, change: dict[str, Any], what: str
) -> None:
    head = json.loads((folder / HEAD).read_text())
    (folder / HEAD).write_text(json.dumps(head | change))
    with pytest.raises(InputError) as caught:
        load_measured(folder, 1)
    assert what in caught.value.what
    assert caught.value.where == str(folder / HEAD)
    assert caught.value.fix == f"delete {folder} to make it anew"


def stored(dtype: str, *shape: int) -> StoredTensor:
    return StoredTensor(TensorSpec("x.weight", dtype, shape), Path("layer"), 0)


@pytest.mark.parametrize(
    ("kind", "dtype", "shape", "asked"),
    [
        ("rows", "F32", (4,), "F32 [3]"),
        ("rows", "BF16", (3,), "F32 [3]"),
        ("columns", "F32", (3,), "F32 [4]"),
        ("columns", "F32", (4, 1), "F32 [4]"),
        ("value", "F16", (3, 4), "BF16 or F32 [3, 4]"),
        ("value", "BF16", (12,), "BF16 or F32 [3, 4]"),
    ],
)
def test_an_edit_fits_its_tensor(kind: str, dtype: str, shape: tuple[int, ...], asked: str) -> None:
    weight = stored("BF16", 3, 4)
    good = Edit(stored("F32", 3), stored("F32", 4), stored("BF16", 3, 4))
    assert Measured(edits={"x.weight": good}).edit_of(weight) is good
    bad = Measured(edits={"x.weight": Edit(**{kind: stored(dtype, *shape)})})
    with pytest.raises(InputError) as caught:
        bad.edit_of(weight)
    assert caught.value.what.endswith(f"here, and {asked} is asked for")
    assert caught.value.where == f"`x.weight`, {kind} of its edit, in layer"


def test_statistics_fit_their_scheme() -> None:
    asked = {"codes": TensorSpec("codes", "I8", (3, 4))}
    good = {"codes": stored("I8", 3, 4), "more": stored("F32", 1)}
    assert Measured({"x": good}).stats_of("x", asked, "r:1") == {"codes": good["codes"]}
    assert Measured().stats_of("x", asked, "r:1") == {}
    for bad in (stored("I8", 4, 4), stored("U8", 3, 4), stored("I8", 12)):
        with pytest.raises(InputError, match=r"I8 \[3, 4\] is asked for"):
            Measured({"x": {"codes": bad}}).stats_of("x", asked, "r:1")
    with pytest.raises(InputError, match="lack codes"):
        Measured({"x": {"other": good["codes"]}}).stats_of("x", asked, "r:1")
