"""One word for one thing, and sentences that are read once: retired words and patterns stay away."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "src" / "quantcli").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# patterns of sentences, with what to write in their place
PATTERNS = {
    r"\b(?<!there )(is|are) no (?!longer|more|other|less)[a-z]+": "is not a ..., has no ...",
    r"\bstrangers?\b": "untrusted input; whoever wrote it",
    r"\band yet\b": "but",
    r"\bhad better\b": "should",
    r"\b(a|another) word (on|of|in|about)\b": "a note on",
    r"\b(worth|deserves?) a word\b": "worth a note",
    r"\bas good as [a-z]+": "nearly, numerically",
    r"\bbeside(s)? (the|it|its|them|this|that|weights|codes)\b": "next to",
    r"\b(is|was|are|were|be|been) (told|said)\b": "is reported, is given",
    r"\bwhat (was|is|were) (told|said|found|held|made)\b": "a noun",
    r"\bthat which\b": "what",
    r"\bin words\b": "as text",
    r"\bsee to (that|it|this)\b": "fix it",
    r"\bgo(es)? on with\b": "continue",
}


def retired() -> dict[str, str]:
    """Retired name -> the word to use, from the tables of the glossary."""
    table = {}
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 3 and cells[0] not in {"word", "---"}:
            table |= {name.strip(): cells[0] for name in cells[2].split(",") if name.strip()}
    return table


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a module defines, with its line: functions, classes, parameters, variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Comments and strings of a module, with their lines; neighbouring ones are one text."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    start, parts = 0, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            start = start if parts else token.start[0]
            parts.append(token.string.strip("#\"' "))
        elif token.type not in {tokenize.NL, tokenize.COMMENT} and parts:
            yield start, " ".join(" ".join(parts).split())
            parts = []


def found_in(text: str) -> list[str]:
    return [
        f"`{match[0]}`: write {better}"
        for pattern, better in PATTERNS.items()
        for match in re.finditer(pattern, text)
    ]


def test_the_glossary_retires_words():
    assert {"held", "said", "wishes", "merged_name"} <= retired().keys()


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_no_retired_word(module):
    source, words = module.read_text(), retired()
    bad = [
        f"{module.name}:{line} {name}: see docs/glossary.md, {words[name.strip('_')]}"
        for line, name in names(ast.parse(source))
        if name.strip("_") in words
    ]
    bad += [f"{module.name}:{line} {hit}" for line, text in texts(source) for hit in found_in(text)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_no_retired_word_in_recipes(recipe):
    bad = [hit for line in recipe.read_text().splitlines() for hit in found_in(line)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "text",
    [
        "model.bin is no file",
        "numbers are no scales",
        "as strangers wrote it",
        "which a recipe had better keep float",
        "what loads, but deserves a word",
        "where it is as good as singular",
        "files beside the weights",
        "what was told of the model",
    ],
)
def test_patterns_see_such_sentences(text):
    assert found_in(text)


@pytest.mark.parametrize("text", ["there is no lm_head", "it is no longer needed", "is not a file"])
def test_patterns_let_plain_sentences_pass(text):
    assert not found_in(text)
