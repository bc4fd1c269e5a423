"""A model's folder: faults of the disk, changes while it is read, and what takes long."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantcli.checkpoint.checkpoint import (
    must_be_unchanged,
    open_checkpoint,
    restamped,
    scan_checkpoint,
)
from quantcli.checkpoint.files import has_byte_order_mark, hub_blob
from quantcli.checkpoint.header import read_header
from quantcli.core.errors import InputError, MachineError
from tests.builders import make_model, tensor


def test_a_copy_with_other_times_is_taken_over(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path))
    file = tmp_path / "model.safetensors"
    os.utime(file, ns=(5, 5))
    with pytest.raises(InputError, match="the model changed while it was read") as caught:
        must_be_unchanged(checkpoint)
    assert caught.value.where == str(file)
    again = restamped(checkpoint)
    assert again.stamps["model.safetensors"] == (file.stat().st_size, 5)
    must_be_unchanged(again)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{"part": 2, "of": 3}', "this is part 2 of 3 of a conversion"),
        ('{"part": "2", "of": 3}', "this is a part of a conversion"),
        ("{}", "this is a part of a conversion"),
    ],
)
def test_a_part_is_not_a_model(tmp_path: Path, entry: str, words: str) -> None:
    make_model(tmp_path, files={"quantcli_part.json": entry})
    with pytest.raises(InputError) as caught:
        scan_checkpoint(tmp_path)
    assert caught.value.what == words
    assert caught.value.where == str(tmp_path)
    assert (
        caught.value.fix == "put the parts together first: quantcli pack --merge OUT.part-* --out OUT"
    )


def failing(
    monkeypatch: pytest.MonkeyPatch, name: str, method: str = "open", code: int = errno.EIO
) -> None:
    """Have a method of the path of one file fail."""
    usual = getattr(Path, method)

    def fail(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == name:
            raise OSError(code, os.strerror(code))
        return usual(self, *arguments, **more)

    monkeypatch.setattr(Path, method, fail)


def of_index(folder: Path) -> object:
    return make_model(folder, index=True)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("model.safetensors", make_model),
        ("model.safetensors", of_index),
        ("config.json", make_model),
        ("model.safetensors.index.json", of_index),
    ],
)
def test_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, build: Callable[[Path], object]
) -> None:
    build(tmp_path)
    failing(monkeypatch, name)
    failing(monkeypatch, name, "read_bytes")
    with pytest.raises(MachineError, match="cannot read: Input/output error") as caught:
        scan_checkpoint(tmp_path)
    assert caught.value.where == str(tmp_path / name)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.stat()
    file.write_bytes(file.read_bytes()[:20])
    monkeypatch.setattr(Path, "stat", lambda *_, **__: whole)
    with pytest.raises(InputError, match=r"^file shrank while it was read") as caught:
        read_header(file)
    assert caught.value.where == str(file)


def test_a_stored_tensor_reads_its_rows(tmp_path: Path) -> None:
    stored = open_checkpoint(make_model(tmp_path)).tensors["model.embed.weight"]
    assert stored.parts == (stored,)
    assert (stored.kind, stored.buffer_nbytes, stored.nbytes) == ("", 0, 16)
    with stored.open() as rows:
        assert rows.weight(1, 2).shape == (2, 2)


def test_config_json_without_its_mark(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path, config={"a": 1}))
    assert checkpoint.plain_config() == {}
    file = tmp_path / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert open_checkpoint(tmp_path).plain_config() == {"config.json": b'{"a": 1}'}


@pytest.mark.parametrize(
    ("content", "marked"),
    [
        (b"\xef\xbb\xbf", True),
        (b"\xef\xbb\xbf{}", True),
        (b"\xef\xbb", False),
        (b"\xee\xbb\xbf{}", False),
        (b"\xf0\xbb\xbf{}", False),
        (b"", False),
    ],
)
def test_the_mark_at_the_beginning_of_a_file(tmp_path: Path, content: bytes, marked: bool) -> None:
    (tmp_path / "a").write_bytes(content)
    assert has_byte_order_mark(tmp_path / "a") is marked


def test_a_file_that_cannot_be_read_has_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    assert not has_byte_order_mark(file)
    assert not has_byte_order_mark(tmp_path)
    file.touch()
    failing(monkeypatch, "a", code=errno.EACCES)
    assert not has_byte_order_mark(file)
    failing(monkeypatch, "a")
    with pytest.raises(MachineError) as caught:
        has_byte_order_mark(file)
    assert caught.value.what == "cannot read: Input/output error"
    assert caught.value.where == str(file)


def test_blobs_are_those_of_a_snapshot(tmp_path: Path) -> None:
    """A folder next to `blobs` is not a snapshot by that alone."""
    blob = tmp_path / "blobs" / "x"
    for name in ("snapshots", "snapshot", "snapshots2", "zoo"):
        assert hub_blob(blob, tmp_path / name / "main") == (name == "snapshots"), name
    assert not hub_blob(tmp_path / "x", tmp_path / "snapshots" / "main")


@pytest.mark.parametrize(
    ("config", "dtype", "shape", "notes"),
    [
        ({"model_type": "a"}, "BF16", (2, 3), []),
        ({"x": 1}, "BF16", (2, 3), ["config.json names no model_type"]),
        (
            {"model_type": "a", "quantization_config": {}},
            "F32",
            (2, 3),
            ["`quantization_config` in config.json is stale"],
        ),
        (
            {"model_type": "a", "text_config": {"compression_config": {}}},
            "F16",
            (2, 3),
            ["`text_config.compression_config` in config.json is stale"],
        ),
        ({"model_type": "a", "quantization_config": {}}, "I8", (2, 3), []),
        (
            {"model_type": "a"},
            "BF16",
            (2, 3, 4),
            ["experts are stored together, such as `a.experts.w`"],
        ),
    ],
)
def test_notes_on_what_is_odd(
    tmp_path: Path, config: Any, dtype: str, shape: tuple[int, ...], notes: list[str]
) -> None:
    tensors = {"a.experts.w": tensor(dtype, *shape), "b.w": tensor(dtype, 2, 3, 4)}
    found = open_checkpoint(make_model(tmp_path, {"model.safetensors": tensors}, config=config)).notes
    assert len(found) == len(notes)
    assert all(note.startswith(words) for note, words in zip(found, notes, strict=True))


def test_a_pointer_is_fetched_and_a_damaged_file_is_fetched_again(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert caught.value.what == "file is a pointer of Git LFS, not the weights themselves"
    assert caught.value.fix == "run `git lfs pull` in the model's folder"
    file.write_bytes(b"1234567")
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert caught.value.what == "file has 7 bytes; a safetensors file has at least 8"
    assert caught.value.fix == "the file is damaged or not a safetensors file: fetch it again"
