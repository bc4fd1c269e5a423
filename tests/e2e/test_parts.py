"""A conversion in parts, on several machines: put together, it is what one run writes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quantcli.calibration.store import digest_of
from quantcli.checkpoint.manifest import encode_manifest
from quantcli.core.disk import file_entry, sha256_of
from quantcli.planning.parts import split
from tests.e2e.calibrating import RECIPE, Models, make_bench
from tests.e2e.conftest import Box, Faults, Killed, Result, run_cli, snapshot
from tests.signing import write_key

SHARDED = ("--workers", 1, "--set", "max_shard=1200")
SHARDS = 5


def parts(box: Box, of: int, *more: object) -> list[Path]:
    """Write every part."""
    folders = []
    for number in range(1, of + 1):
        result = box.run(*SHARDED, "--part", f"{number}/{of}", *more)
        assert result.code == 0, result.err
        folders.append(part(box, number, of))
    return folders


def part(box: Box, number: int, of: int) -> Path:
    return box.out.with_name(f"{box.out.name}.part-{number}-of-{of}")


def merge(box: Box, folders: list[Path], *more: object) -> Result:
    return run_cli("pack", "--merge", *folders, "--out", box.out, *more)


def whole(box: Box, *more: object) -> dict[str, str]:
    """What one run writes."""
    other = Box(box.root, box.model, box.recipe, box.root / "undisturbed")
    assert other.run(*SHARDED, *more).code == 0
    return snapshot(other.out)


def refused(result: Result, *words: str) -> None:
    assert result.code == 2, (result.code, result.err)
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1
    for word in words:
        assert word in result.err, (word, result.err)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_parts_make_what_one_run_writes(box: Box, of: int) -> None:
    wanted = whole(box)
    shards = {name for name in wanted if name.endswith(".safetensors")}
    assert len(shards) == SHARDS
    folders = parts(box, of)
    shutil.rmtree(box.model)  # merging needs the parts alone
    held = [{path.name for path in folder.glob("*.safetensors")} for folder in folders]
    assert sorted(name for names in held for name in names) == sorted(shards)
    assert sum(not names for names in held) == max(0, of - SHARDS)
    before = [snapshot(folder) for folder in folders]
    result = merge(box, folders[::-1], "--json")  # in any order
    assert result.code == 0, result.err
    assert snapshot(box.out) == wanted
    assert [snapshot(folder) for folder in folders] == before
    assert result.json["plan"]["linked"] is True
    assert (
        result.json["plan"]["digest"]
        == json.loads((box.out / "quantcli_manifest.json").read_text())["plan"]
    )
    assert run_cli("verify", box.out, "--full").code == 0
    for name in shards:  # no bytes were copied
        (source,) = (folder / name for folder in folders if (folder / name).exists())
        assert (box.out / name).samefile(source)
    assert not any((box.out / "config.json").samefile(f / "config.json") for f in folders[:1])


def test_no_checksum_is_the_same_too(box: Box) -> None:
    wanted = whole(box, "--no-checksum")
    folders = parts(box, 2, "--no-checksum")
    write_key(key := box.root / "key.pem")
    refused(merge(box, folders, "--sign", key), "there are no hashes to sign", str(folders[0]))
    assert merge(box, folders).code == 0
    assert snapshot(box.out) == wanted
    assert b"blake3" not in (box.out / "quantcli_manifest.json").read_bytes()


def test_split_is_even() -> None:
    sizes = [50, 10, 10, 10, 10, 30, 20, 40, 5, 15]
    plan: Any = SimpleNamespace(
        shards=[SimpleNamespace(file=str(n), nbytes=size) for n, size in enumerate(sizes)]
    )
    for of in range(1, 12):
        where = split(plan, of)
        loads = [sum(s for n, s in enumerate(sizes) if where[str(n)] == p + 1) for p in range(of)]
        assert sum(loads) == sum(sizes)
        assert max(loads) - min(loads) <= max(sizes)
        assert max(loads) <= max(max(sizes), 4 / 3 * sum(sizes) / of)


def test_plan_says_what_a_part_writes(box: Box) -> None:
    said = []
    for number in (1, 2, 3):
        plan = box.run(*SHARDED, "--part", f"{number}/3", "--plan", "--json").json["plan"]
        assert not part(box, number, 3).exists()
        said.append(plan["part"])
        assert plan["disk_needed"] == plan["part"]["bytes"]
        shown = box.run(*SHARDED, "--part", f"{number}/3", "--plan").out
        assert all(name in shown for name in plan["part"]["shards"]), shown
    written = parts(box, 3)
    for entry, folder in zip(said, written, strict=True):
        names = {path.name for path in folder.iterdir()} - {"quantcli_part.json"}
        assert names == {*entry["shards"], *entry["files"]}
        sizes = [(folder / name).stat().st_size for name in names]
        assert entry["bytes"] == sum(sizes)
    assert box.run(*SHARDED, "--plan", "--json").json["plan"]["part"] is None


def test_merge_plan_writes_nothing(box: Box) -> None:
    folders = parts(box, 2)
    before = snapshot(box.root)
    said = merge(box, folders, "--plan", "--json").json["plan"]
    shown = merge(box, folders, "--plan")
    assert snapshot(box.root) == before
    assert [entry["part"] for entry in said["parts"]] == [1, 2]
    assert "5 shards, linked" in shown.out


def test_part_stopped_goes_on(box: Box) -> None:
    wanted = whole(box)
    first, second = parts(box, 2)
    undisturbed = snapshot(first)
    shutil.rmtree(first)
    counts = set()
    for nth in range(3, 1000, 9):
        faults = Faults(box.root, nth, Killed, sticky=True)
        with faults.armed():
            try:
                result = box.run(*SHARDED, "--part", "1/2")
            except Killed:
                result = None
        if faults.fired is None:
            assert result is not None
            break
        if result is None and not first.exists():
            half = merge(box, [first, second])
            refused(half, "no such folder")
        again = box.run(*SHARDED, "--part", "1/2", "--force", "--json")
        assert again.code == 0, (faults.fired, again.err)
        counts.add(again.json["shards_reused"])
        assert snapshot(first) == undisturbed, faults.fired
        shutil.rmtree(first)
    assert len(counts) >= 3
    assert merge(box, [first, second]).code == 0
    assert snapshot(box.out) == wanted


@pytest.mark.parametrize("linked", [True, False])
def test_merge_stopped_goes_on_and_parts_stay(
    box: Box, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = whole(box)
    folders = parts(box, 2)
    if not linked:  # as on another file system

        def link(*_: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", link)
    before = [snapshot(folder) for folder in folders]
    reused = set()
    for nth in range(2, 1000, 7):
        box.out = box.root / f"out{nth}"
        faults = Faults(box.root, nth, Killed, sticky=True)
        with suppress(Killed), faults.armed():
            merge(box, folders, "--workers", 1)
        assert [snapshot(folder) for folder in folders] == before, faults.fired
        if box.out.exists():
            assert snapshot(box.out) == wanted, faults.fired
        else:
            again = merge(box, folders, "--json")
            assert again.code == 0, (faults.fired, again.err)
            reused.add(again.json["shards_reused"])
            assert snapshot(box.out) == wanted, faults.fired
            assert again.json["plan"]["linked"] is True  # it was worth a try
        if faults.fired is None:
            break
    assert faults.fired is None
    assert len(reused) >= 3


def edit_sealed(folder: Path, change: Callable[[dict], object]) -> None:
    """Change what a part says of itself, and seal it again: what a stranger could do."""
    path = folder / "quantcli_part.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_bytes(encode_manifest(table))


def test_parts_of_different_conversions(box: Box) -> None:
    first, second, third = parts(box, 3)
    kept = snapshot(second)

    def again(*more: object) -> Result:
        assert box.run(*SHARDED, "--part", "2/3", "--force", *more).code == 0
        return merge(box, [first, second, third])

    box.edit_recipe(box.recipe.read_text().replace("w8a8_dynamic", "fp8_dynamic"))
    refused(again(), str(second), "`name: fp8_dynamic` against `name: w8a8_dynamic`")
    box.edit_recipe(box.recipe.read_text().replace("fp8_dynamic", "w8a8_dynamic"))
    refused(again("--set", "max_shard=1300"), str(second), "the recipe differs", "max_shard")
    refused(again("--no-checksum"), "--checksum", str(second))
    assert box.run(*SHARDED, "--part", "2/4").code == 0
    refused(merge(box, [first, part(box, 2, 4), third]), "is one of 4 parts, that one of 3")
    config = box.model / "config.json"
    config.write_text(config.read_text().replace("llama", "qwen2"))
    refused(again(), "the model differs", str(second))
    config.write_text(config.read_text().replace("qwen2", "llama"))
    (box.model / "notes.txt").write_text("new")
    refused(again(), "or the files next to the model's weights", str(second))
    (box.model / "notes.txt").unlink()
    edit_sealed(second, lambda table: table["manifest"]["tool"].update(version="9.9"))
    refused(merge(box, [first, second, third]), str(second))
    assert again().code == 0
    assert snapshot(second) == kept


def test_parts_that_are_no_set(box: Box) -> None:
    first, second, third = parts(box, 3)
    copy = box.root / "copy"
    shutil.copytree(second, copy)
    refused(merge(box, [first, second, third, copy]), "part 2 of 3 is given twice", str(copy))
    refused(merge(box, [first, first, second, third]), "part 1 of 3 is given twice")
    refused(merge(box, [first, third]), "of 3 parts 1 is missing: 2", "--part 2/3")
    refused(merge(box, [third]), "of 3 parts 2 are missing: 1, 2")
    refused(merge(box, [first, second, box.root / "nowhere"]), "no such folder")
    refused(merge(box, [first, second, box.model]), "this is not a part of a conversion")
    refused(merge(box, [first, second, box.recipe]), "no such folder")
    assert not box.out.exists()
    assert not box.partial.exists()


def test_a_whole_checkpoint_and_an_unfinished_part_are_no_parts(box: Box) -> None:
    (first,) = parts(box, 1)
    assert box.run(*SHARDED).code == 0
    refused(run_cli("pack", "--merge", box.out, "--out", box.root / "other"), "whole checkpoint")
    shutil.rmtree(first)
    with Faults(box.root, 60, Killed, sticky=True).armed(), pytest.raises(Killed):
        box.run(*SHARDED, "--part", "1/1")
    unfinished = first.with_name(first.name + ".partial")
    refused(run_cli("pack", "--merge", unfinished, "--out", box.root / "other"), "not finished")


def test_a_part_is_no_checkpoint(box: Box) -> None:
    folder = parts(box, 2)[0]
    words = (str(folder), "this is part 1 of 2 of a conversion", "pack --merge")
    refused(run_cli("verify", folder), *words)
    refused(run_cli("inspect", folder), *words)
    refused(run_cli("pack", folder, "--target", "compressed-tensors", "--out", box.root / "x"), *words)
    (folder / "quantcli_part.json").write_text('{"part": [1], "of": null}')
    refused(run_cli("inspect", folder), "this is a part of a conversion")


def test_damaged_parts(box: Box) -> None:
    wanted = whole(box)
    first, second = parts(box, 2)
    shard = max(second.glob("*.safetensors"))
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1])
    refused(merge(box, [first, second]), str(shard), "bytes")
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    refused(merge(box, [first, second]), str(shard), "part 2 of 2 is damaged")
    assert not box.out.exists()
    shard.unlink()
    refused(merge(box, [first, second]), f"has lost `{shard.name}`")
    shard.write_bytes(sound)
    config = first / "config.json"
    text = config.read_bytes()
    config.write_bytes(text.replace(b"llama", b"lLama"))
    refused(merge(box, [first, second], "--fresh"), str(config), "damaged")
    config.write_bytes(text)
    listing = second / "quantcli_part.json"
    listing.write_text(listing.read_text().replace('"part": 2', '"part": 1'))
    refused(merge(box, [first, second]), "changed since it was written")
    edit_sealed(second, lambda table: table.update(part=2))
    result = merge(box, [first, second])  # what an earlier, refused merge left is no obstacle
    assert result.code == 0, result.err
    assert snapshot(box.out) == wanted


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop("shards"),
        lambda table: table.update(shards=["model.safetensors"]),
        lambda table: table.update(carried="config.json"),
        lambda table: table.update(carried=[{}]),
        lambda table: table.update(part="1"),
        lambda table: table.update(of=10**30),
        lambda table: table.update(manifest=None),
        lambda table: table["manifest"].update(source=3),
        lambda table: table["files"].clear(),
        lambda table: table["files"].update({"../evil": {"bytes": 1}}),
        lambda table: (
            table["carried"].append("../../evil"),
            table["files"].update({"../../evil": table["files"]["config.json"]}),
        ),
        lambda table: (
            table["carried"].append("quantcli_manifest.json"),
            table["files"].update({"quantcli_manifest.json": table["files"]["config.json"]}),
        ),
        lambda table: table["files"]["config.json"].update(bytes=-1),
        lambda table: table["files"]["config.json"].update(sha256=7),
        lambda table: table["files"]["config.json"].pop("blake3"),
        lambda table: table["files"].update({"config.json": []}),
        lambda table: table["shards"].update({"sub/model.safetensors": 1}),
        lambda table: table["shards"].update({"model.safetensors": 1.0}),
    ],
)
def test_hostile_descriptions(box: Box, change: Callable[[dict], object]) -> None:
    (folder,) = parts(box, 1)
    edit_sealed(folder, change)
    refused(merge(box, [folder]), "makes no sense")
    assert not box.partial.exists()


def test_weights_that_are_not_the_headers_of_the_index(box: Box) -> None:
    """Everything is sealed and hashed, and yet the checkpoint would not load."""
    (folder,) = parts(box, 1)
    shard = min(folder.glob("*.safetensors"))
    content = shard.read_bytes().replace(b"embed_tokens", b"embed_tokenz")
    shard.write_bytes(content)
    assert b"embed_tokenz" in content

    def rehash(table: dict) -> None:
        table["files"][shard.name] = file_entry(shard, checksum=True)

    edit_sealed(folder, rehash)
    refused(merge(box, [folder]), "no sound checkpoint")
    assert not box.out.exists()


def test_where_the_output_goes(box: Box) -> None:
    folders = parts(box, 2)
    box.out.mkdir()
    (box.out / "mine.txt").write_text("precious")
    refused(merge(box, folders), "output directory exists")
    assert merge(box, folders, "--force").code == 0
    assert (box.root / "out.replaced" / "mine.txt").read_text() == "precious"
    held = snapshot(box.out)
    assert merge(box, folders, "--force").code == 0
    assert snapshot(box.out) == held
    refused(run_cli("pack", "--merge", *folders, "--out", folders[0]), "part 1 of 2")
    inside = folders[1] / "out"
    refused(run_cli("pack", "--merge", *folders, "--out", inside), "inside the part 2 of 2")
    refused(run_cli("pack", "--merge", *folders, "--out", box.root, "--force"), "contains")


def test_unfinished_work_of_a_whole_run_is_in_the_way(box: Box) -> None:
    folders = parts(box, 2)
    with Faults(box.root, 60, Killed, sticky=True).armed(), pytest.raises(Killed):
        box.run(*SHARDED)
    assert box.partial.exists()
    refused(
        merge(box, folders), "unfinished work of another run: the set of parts has changed", "--fresh"
    )
    assert merge(box, folders, "--fresh").code == 0


@pytest.mark.parametrize(
    "text", ["0/3", "4/3", "1", "1/0", "a/b", "1/3/5", "-1/3", "1/9999999", "\u0661/\u0662"]
)
def test_bad_parts(box: Box, text: str) -> None:
    refused(box.run("--part", text), "--part " + text, "--part 2/3")
    assert not list(box.root.glob("out*"))


def test_pack_wants_folders_and_a_place(box: Box) -> None:
    refused(run_cli("pack"), "no checkpoint to pack", "fix: ")
    refused(run_cli("pack", "--merge", box.model), "--out")
    refused(run_cli("pack", "--merge", "--wrong"), "quantcli pack --help")


def test_parts_share_one_calibration(tmp_path: Path) -> None:
    """None calibrates by itself; a part with other measured values is told from the others."""
    bench = make_bench(tmp_path, Models(tmp_path / "models")("llama"), RECIPE)
    sharded = ("--set", "max_shard=20000")
    result = bench.run(*sharded, "--part", "1/2")
    refused(result, str(bench.store), "calibrate", "--calibration")
    assert not bench.store.exists()
    # the command in the message is the one that works
    said = re.search(r"run `quantcli (calibrate .*?)` once", result.err, re.DOTALL)
    assert said
    assert run_cli(*shlex.split(said[1])).code == 0
    given = ("--part", "1/2", "--calibration", bench.store)
    assert bench.run(*sharded, *given, "--plan").code == 0
    shutil.rmtree(bench.store)
    assert bench.at("one").run(*sharded).code == 0
    calibration = bench.root / "one.calibration"
    folders = []
    for number in (1, 2):
        given = ("--part", f"{number}/2", "--calibration", calibration)
        assert bench.run(*sharded, *given).code == 0
        folders.append(part(bench, number, 2))
    assert merge(bench, folders).code == 0
    assert snapshot(bench.out) == snapshot(bench.root / "one")

    # a machine whose calibration came out as something else
    other = bench.root / "other"
    shutil.copytree(calibration, other)
    changed = 0
    for path in sorted(other.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("input_max"):
                tensor *= 2
                changed += 1
        if changed:
            save_file(tensors, path)
            report = path.with_suffix(".json")
            said = json.loads(report.read_text())
            del said["sha256"]
            said["sha256"] = digest_of([sha256_of(path), said])
            report.write_text(json.dumps(said))
    assert changed
    given = ("--part", "2/2", "--calibration", other, "--force")
    assert bench.run(*sharded, *given).code == 0
    refused(merge(bench, folders, "--force"), str(folders[1]), "the calibrations differ")
