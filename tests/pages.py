"""Markdown pages: their links, their anchors and their blocks of code."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*.md")),
]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.M | re.S)


def script(name: str) -> Any:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a page in this language."""
    return [code for name, code in FENCE.findall(text) if name == language]


def files(text: str) -> dict[str, str]:
    """The fenced blocks of a page that are files: their path stands behind the language."""
    return dict(re.findall(r"^```[a-z]+ (\S+)\n(.*?)^```$", text, re.M | re.S))


def links(text: str) -> Iterator[str]:
    """The targets of the links and pictures of a page, those in code left out."""
    prose = re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))
    yield from re.findall(r"\]\(([^)\s]+)\)", prose)
    yield from re.findall(r"<(?:a|img)[^>]* (?:href|src)=\"([^\"]+)\"", prose)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(target: str, page: Path) -> str | None:
    """What is wrong with a relative link of a page in this repository, if anything is."""
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.is_relative_to(ROOT) or not file.exists():
        return f"{page.name}: there is no {target}"
    if anchor and anchor not in anchors(file.read_text()):
        return f"{page.name}: {file.name} has no heading #{anchor}"
    return None
