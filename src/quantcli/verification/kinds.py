"""Files next to the weights, by what reads them: a file that nobody listed may still be loaded."""

from __future__ import annotations

import re

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.files import (
    INDEX,
    MANIFEST,
    OTHER_WEIGHTS,
    PICKLES,
    RECIPE_FILE,
    SOURCE_RECIPE,
)
from quantcli.targets.base import files_of_targets

TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "vocab.tiktoken", "qwen.tiktoken",
)  # fmt: skip
_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib")
_TEMPLATE = re.compile(r"chat_template.*|.*\.(jinja|jinja2|j2)")
_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map.*|added_tokens.*|(vocab|merges|dict).*|.*\.(model|tiktoken|bpe)"
)
# People read these, or tools that move folders: what an upload to the Hub adds, and signatures.
_UNREAD = re.compile(
    r"\..*|(readme|licen[cs]e|notice|copying|authors|use_policy|(sha|md5)[0-9]*sums?)(\.(md|rst|txt|html?|pdf))?"
    r"|.*\.(md|rst|txt|pdf|png|jpe?g|gif|svg|webp|csv|log|ya?ml)"
    r"|.*\.(sig|asc|minisig|sigstore|sigstore\.json|intoto\.jsonl|pem|sha256|sha512|md5)"
)


def written() -> set[str]:
    """Names of files without weights that quantcli writes next to copies of the source's."""
    return {CONFIG, INDEX, *files_of_targets(), MANIFEST, RECIPE_FILE, SOURCE_RECIPE}


def use_of(name: str) -> str | None:
    """What a file is to those who load the checkpoint, as a clause; None if nothing reads it.

    name: relative to the checkpoint; that of a folder ends with a slash. A file of a kind that is not
    known counts as read.
    """
    base = name.rstrip("/").rpartition("/")[2].lower()
    if base.endswith(_CODE) or base == "__pycache__":
        return "it holds code, which may run when the checkpoint is loaded"
    if base.endswith(PICKLES):
        return "it is a pickle, which can run code when it is loaded"
    if base.endswith((".safetensors", ".index.json", *OTHER_WEIGHTS)):
        return "it holds weights, which an engine may load"
    if _TEMPLATE.fullmatch(base):
        return "it holds a template, which makes the prompts"
    if name.endswith("/"):
        return (
            None if base.startswith(".") else "it is a link to a folder, whose files are not verified"
        )
    if base in TOKENIZERS or _TOKENIZER.fullmatch(base):
        return "it belongs to a tokenizer, which makes the tokens"
    if _UNREAD.fullmatch(base):
        return None
    if base.endswith(".json"):
        return "it holds settings, which a library may look for by this name"
    return "a library may look for it"
