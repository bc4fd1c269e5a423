"""Commands that serve a checkpoint, by engine.

Engines read from config.json how weights are quantized; the flags here are what it does not say.

Sources: vllm 0.32.0: config/model.py:1405-1460 (quantization from config.json),
transformers_utils/config.py:405-416 (remote code), config/speculative.py:387-480,1325-1345,1503-1506
(drafts; the number of tokens must be given). vllm-ascend 182b75ea84,
docs/source/developer_guide/Design_Documents/quantization.md:13 (ascend). sglang 0f4513c2f4,
docs/advanced_features/quantization.md (modelopt needs a flag, others must have none). TensorRT-LLM
00209af149, tensorrt_llm/commands/serve.py. Object storage: vllm 0.32.0, config/vllm.py:2669-2686,
transformers_utils/runai_utils.py:13; sglang, srt/server_args.py (_handle_load_format).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import Draft
from quantcli.core.numerics import Cache

TARGET_MODEL = "TARGET_MODEL"  # stands for the model that a draft is for
_METHODS = {"EAGLE": "eagle", "EAGLE3": "eagle3", "P-EAGLE": "eagle3", "DFlash": "dflash"}
_GUESSES = 3  # tokens that a draft guesses at once: a number to begin with
_STORES = ("s3://", "gs://", "az://")
_STREAMED = "the engine reads object storage with the package runai-model-streamer"
_COPIED = "this engine reads folders: copy the checkpoint to a disk first, and give that folder"
_OWN_CODE = "the checkpoint comes with Python code of its own, which the last option lets run"


@dataclass(frozen=True)
class Served:
    """What a serve command depends on.

    labels: of the quantized modules. config: config.json, untrusted.
    """

    labels: frozenset[str]
    config: Settings
    cache: Cache | None = None
    draft: Draft | None = None

    @property
    def has_code(self) -> bool:
        """Whether config.json names Python code in the checkpoint."""
        return bool(self.config.value("auto_map"))


@dataclass(frozen=True)
class ServeCommand:
    """A command line that serves a checkpoint. note: what to know before it is run."""

    engine: str
    words: tuple[str, ...]
    note: str | None = None

    @property
    def text(self) -> str:
        """The line as it is pasted into a shell."""
        return shlex.join(self.words)

    def to_json(self) -> dict[str, str | None]:
        """The line with its engine and its note, as JSON-able data."""
        return {"engine": self.engine, "command": self.text, "note": self.note}


def vllm(served: Served, model: str, flags: Iterable[str] = (), engine: str = "vLLM") -> ServeCommand:
    """`vllm serve` for a folder or a Hub id; a draft is served next to the model that it is for."""
    trust = ["--trust-remote-code"] if served.has_code else []
    note = _note(served, model, _STREAMED)
    if served.draft is None:
        return ServeCommand(engine, ("vllm", "serve", model, *flags, *trust), note)
    speculation: dict[str, Any] = {"model": model, "num_speculative_tokens": _GUESSES}
    if method := _METHODS.get(served.draft.kind):
        speculation["method"] = method
    words = ("vllm", "serve", TARGET_MODEL, "--speculative-config", json.dumps(speculation), *trust)
    draft = (
        f"this is a draft ({served.draft.kind}): {TARGET_MODEL} is the model that it is for, and "
        "num_speculative_tokens is yours to choose"
    )
    return ServeCommand(engine, words, f"{draft}; {note}" if note else draft)


def sglang(served: Served, model: str, flags: Iterable[str] = ()) -> ServeCommand:
    """SGLang's server."""
    trust = ["--trust-remote-code"] if served.has_code else []
    words = ("python3", "-m", "sglang.launch_server", "--model-path", model, *flags, *trust)
    return ServeCommand("SGLang", words, _note(served, model, _STREAMED))


def tensorrt_llm(served: Served, model: str) -> ServeCommand:
    """TensorRT-LLM's server."""
    trust = ["--trust_remote_code"] if served.has_code else []
    words = ("trtllm-serve", model, *trust)
    return ServeCommand("TensorRT-LLM", words, _note(served, model, _COPIED))


def _note(served: Served, model: str, in_store: str) -> str | None:
    """What to know of the model's code, and of a checkpoint in object storage."""
    notes = [_OWN_CODE] if served.has_code else []
    if model.startswith(_STORES):
        notes.append(in_store)
    return "; ".join(notes) or None
