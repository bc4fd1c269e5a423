"""The model card of a conversion: written, verified, packed along, and filled with figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantcli.checkpoint.manifest import read_manifest
from quantcli.planning.card.figures import BEGIN, END
from quantcli.verification.report import card
from tests.e2e.conftest import Box, run_cli, snapshot

CARD, MANIFEST = "README.md", "quantcli_manifest.json"
TEXT = "# Tiny\n\n![figure](figures/a.png)\n"


@pytest.fixture
def converted(box: Box) -> Box:
    """A model with a card, converted."""
    (box.model / CARD).write_text(f"---\nlicense: mit\n---\n{TEXT}")
    assert box.run().code == 0
    return box


def section(folder: Path) -> str:
    return (folder / CARD).read_text().partition(BEGIN)[2].partition(END)[0]


def verify(folder: Path, *more: object) -> dict[str, object]:
    result = run_cli("verify", folder, *more, "--json")
    document: dict[str, object] = json.loads(result.out)
    assert document["ok"] == (result.code == 0), result.err
    return document


def test_the_card_is_a_planned_file_and_passes_against_the_source(converted: Box) -> None:
    plan = converted.run("--plan", "--json", "--force").json["plan"]
    assert CARD in plan["files"]
    assert plan["serve"] == [
        {
            "engine": "vLLM-Ascend",
            "command": f"vllm serve {converted.out} --quantization ascend",
            "note": None,
        }
    ]
    report = verify(converted.out, "--full", "--against", converted.model)
    assert report["ok"], report["findings"]
    assert report["serve"] == plan["serve"]
    assert report["card_written"] is None
    (converted.out / CARD).write_text("of someone else")
    findings = verify(converted.out, "--against", converted.model)["findings"]
    assert [(f["check"], f["where"]) for f in findings] == [  # type: ignore[attr-defined]
        ("manifest", CARD), ("source", CARD)
    ]  # fmt: skip


def test_packing_makes_a_new_card_around_the_same_quotation(converted: Box) -> None:
    there, back = converted.root / "there", converted.root / "back"
    for source, target, out in (
        (converted.out, "compressed-tensors", there),
        (there, "ascend", back),
    ):
        assert run_cli("pack", source, "--target", target, "--out", out, "--workers", 1).code == 0
    first, second, third = [(out / CARD).read_text() for out in (converted.out, there, back)]
    quotation = first[first.index("## The source's card") :]
    assert quotation.endswith("> # Tiny\n>\n> ![figure](figures/a.png)\n")
    for text, tag, line in (
        (second, "compressed-tensors", "vllm serve CHECKPOINT\n"),
        (third, "ascend", "vllm serve CHECKPOINT --quantization ascend\n"),
    ):
        assert text[text.index("## The source's card") :] == quotation
        assert text.startswith(
            f"---\nlibrary_name: transformers\nlicense: mit\ntags:\n- {tag}\n- quantcli\n"
        )
        assert line in text
    (converted.out / CARD).write_text(first + "\nMy own words.\n")
    assert (
        run_cli("pack", converted.out, "--target", "compressed-tensors", "--out", there, "--force").code
        == 0
    )
    assert "> My own words." in (there / CARD).read_text()


def test_figures_go_into_the_card_and_the_manifest(converted: Box) -> None:
    before = snapshot(converted.out)
    assert "No figures have been measured yet" in section(converted.out)
    options = ("--full", "--against", converted.model, "--card")
    assert verify(converted.out, *options)["card_written"] is True
    assert "SQNR of 7 weights | median " in section(converted.out)
    assert "compared with | its source" in section(converted.out)
    assert str(converted.root) not in (converted.out / CARD).read_text()
    after = snapshot(converted.out)
    assert {name for name in after if after[name] != before.get(name)} == {CARD, MANIFEST}
    assert verify(converted.out, *options)["card_written"] is True
    assert snapshot(converted.out) == after  # the same figures are the same bytes
    verify(converted.out, "--full", "--card")
    assert "SQNR" not in section(converted.out)


def test_a_failure_leaves_the_card(converted: Box) -> None:
    (converted.out / "tokenizer.json").write_text("{}")
    before = snapshot(converted.out)
    assert verify(converted.out, "--full", "--card")["card_written"] is False
    assert snapshot(converted.out) == before


def without_manifest(out: Path) -> None:
    (out / MANIFEST).unlink()


def changed(out: Path) -> None:
    (out / CARD).write_text((out / CARD).read_text() + "more\n")


def foreign(out: Path) -> None:
    (out / CARD).write_text("# Tiny\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_manifest, "there is no quantcli_manifest.json"),
        (changed, "README.md was changed since it was written"),
        (foreign, "README.md is not a card of quantcli"),
    ],
)
def test_other_cards_are_refused_before_the_work(converted: Box, damage, message) -> None:  # type: ignore[no-untyped-def]
    damage(converted.out)
    before = snapshot(converted.out)
    result = run_cli("verify", converted.out, "--full", "--card")
    assert result.code == 2
    assert f"error: {message}" in result.err
    assert "verifying" not in result.err
    assert snapshot(converted.out) == before


@pytest.mark.parametrize("done", [0, 1])
def test_a_run_that_ends_between_both_files_is_completed(converted: Box, monkeypatch, done) -> None:  # type: ignore[no-untyped-def]
    """done: how many of the two files were in their place: none, or the card without its seal."""
    with monkeypatch.context() as patch:
        real = card.write_file

        def killed(path: Path, content: bytes) -> None:
            if path.name == CARD and not done:
                raise KeyboardInterrupt
            real(path, content)

        patch.setattr(card, "write_file", killed)
        patch.setattr(card, "_seal", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            card.write_card(converted.out, "half")
    assert ("half" in section(converted.out)) == bool(done)
    card.check_card(converted.out)
    assert [path.name for path in converted.out.glob(".*")] == []
    sha256 = read_manifest(converted.out)["files"][CARD]["sha256"]
    assert sha256 == snapshot(converted.out)[CARD]
    assert verify(converted.out, "--full", "--card")["card_written"] is True
