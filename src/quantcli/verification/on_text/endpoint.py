"""Log-probabilities of text from a server that speaks the API of OpenAI: /v1/completions.

A prompt is token ids, so that no tokenizer is between. vLLM answers `prompt_logprobs`, by token id;
others, such as SGLang, echo the prompt with `logprobs`, by the text of tokens unless the server takes
`return_tokens_as_token_ids`. What the server takes is found with the first window.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from quantcli.checkpoint.remote.address import is_server, public_form
from quantcli.checkpoint.remote.origin import PassingError
from quantcli.checkpoint.remote.web import read_all, request
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import Progress
from quantcli.core.untrusted.names import printable
from quantcli.core.untrusted.tables import Table, parse_table

_KEY = "QUANTCLI_API_KEY"
_CANDIDATES = 20  # that vLLM gives at most, unless it is started with --max-logprobs
_FEWER = 5  # that OpenAI's own API gives at most
_WAIT = 300.0  # seconds for the answer to one window
_MOST = 64 * 2**20  # bytes of an answer
_AT_ONCE = 4  # windows under way
_LEAST = -1e6  # of a log-probability: vLLM writes -9999 for minus infinity
_MOST_LOG = 1e-3  # likewise: rounding may leave it above 0
_SERVE = "serve it with vLLM or SGLang, whose /v1/completions gives log-probabilities of a prompt"
_ID = "token_id:"


@dataclass(frozen=True)
class Answer:
    """What a server says of one window of n tokens.

    scores:     the log-probability of each token but the first: n - 1.
    candidates: for each of these places, token ids and log-probabilities of the likeliest tokens, most
                likely first; None if the server names tokens by text.
    """

    scores: tuple[float, ...]
    candidates: tuple[tuple[tuple[int, float], ...], ...] | None


@dataclass(frozen=True)
class Endpoint:
    """A server, and the model that it is asked for. url: with /v1."""

    url: str
    model: str
    longest: int | None  # tokens that the server takes, if it says so

    @property
    def where(self) -> str:
        """Its place, for messages."""
        return f"--served {public_form(self.url)}"

    def answers(self, windows: Sequence[Sequence[int]], progress: Progress) -> list[Answer]:
        """What the server says of windows of token ids, in their order.

        InputError if it gives no log-probabilities of the prompt, or has other tokens; MachineError if
        it does not answer.
        """
        longest = max(map(len, windows))
        if self.longest is not None and longest + 1 > self.longest:
            what = (
                f"the server takes {self.longest} tokens, and windows have {longest}, and one follows"
            )
            raise InputError(what, where=self.where, fix=f"set --length to {self.longest - 1} or less")
        first, ask = self._first(windows[0])
        found = [first]
        with ThreadPoolExecutor(_AT_ONCE, "served") as pool:
            try:
                for done, answer in enumerate(pool.map(ask, windows[1:]), 2):
                    found.append(answer)
                    progress.step(done, len(windows), noun="window", tokens=len(windows[done - 1]))
            except _NotTaken as refusal:
                what = (
                    f"the server's answer to window {len(found)} is not like the ones before: {refusal}"
                )
                raise InputError(what, where=self.where, fix=_SERVE) from None
        return found

    def _first(self, window: Sequence[int]) -> tuple[Answer, Callable[[Sequence[int]], Answer]]:
        """The answer to a window, and the way to ask that the server understands."""
        refusals = []
        for options, read in _FORMS:

            def ask(window: Sequence[int], options: Any = options, read: Any = read) -> Answer:
                body = {"model": self.model, "prompt": [*window], "max_tokens": 1, "temperature": 0}
                return self._read(self._post({**body, **options}), window, read)

            try:
                return ask(window), ask
            except _NotTaken as refusal:
                refusals.append(str(refusal))
        what = (
            f"the server gives no log-probabilities of a prompt: {'; '.join(dict.fromkeys(refusals))}"
        )
        raise InputError(what, where=self.where, fix=_SERVE)

    def _post(self, body: Mapping[str, Any]) -> Table:
        return _asked("POST", f"{self.url}/completions", self.where, json.dumps(body).encode())

    def _read(self, table: Table, window: Sequence[int], read: _Read) -> Answer:
        choices = table.value.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            raise _NotTaken("its answer has no `choices`")
        usage = table.value.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(counted, int) and counted != len(window):
            self._other_tokens(f"counts {counted} tokens of a window of {len(window)}")
        answer = read(choice, window)
        if len(answer.scores) != len(window) - 1:
            self._other_tokens(f"scores {len(answer.scores) + 1} tokens of a window of {len(window)}")
        return answer

    def _other_tokens(self, what: str) -> None:
        raise InputError(
            f"the server {what}: it has another tokenizer, or adds tokens of its own",
            where=self.where,
            fix="serve a checkpoint of the same model",
        )


def connect(address: str) -> Endpoint:
    """The server at an address, http://HOST:PORT or with /v1; `#NAME` behind it names the model.

    InputError for what is not an address, and for a name that is not served; MachineError if nothing
    answers.
    """
    base, _, name = address.partition("#")
    base = base.rstrip("/")
    where = f"--served {public_form(address)}"
    parts = urlsplit(base) if is_server(base) else None
    if parts is None or parts.query or parts.username is not None:
        what = "is not an address of a server"
        raise InputError(what, where=where, fix="give such as http://localhost:8000")
    url = base if parts.path.endswith("/v1") else f"{base}/v1"
    table = _asked("GET", f"{url}/models", where)
    listed = table.value.get("data")
    models = {
        each["id"]: each
        for each in (listed if isinstance(listed, list) else ())
        if isinstance(each, dict) and isinstance(each.get("id"), str)
    }
    if not models:
        raise InputError("the server lists no model", where=where, fix=_SERVE)
    names = ", ".join(printable(model)[:80] for model in list(models)[:5])
    if (not name and len(models) > 1) or (name and name not in models):
        what = f"the server has the models {names}"
        raise InputError(what, where=where, fix=f"name one of them: {public_form(base)}#NAME")
    model = name or next(iter(models))
    longest = models[model].get("max_model_len")
    return Endpoint(url, model, longest if type(longest) is int and longest > 0 else None)


class _NotTaken(Exception):
    """An answer that lacks what was asked for, or a request that the server does not take."""


def _asked(method: str, url: str, where: str, body: bytes | None = None) -> Table:
    """The object that a server answers. MachineError without one; _NotTaken for status 400 and 422."""
    headers = {"Accept": "application/json", "Content-Type": "application/json"}
    if key := os.environ.get(_KEY):
        headers["Authorization"] = f"Bearer {key}"
    again = "check that the server is up, then run the same command again"
    try:
        with request(method, url, headers, body, _WAIT) as response:
            content, status = read_all(response, _MOST), response.status
    except PassingError as passing:
        raise MachineError(
            f"the server cannot be asked: {passing.reason}", where=where, fix=again
        ) from None
    if content is None:
        raise InputError(f"the server's answer is over {_MOST} bytes", where=where, fix=_SERVE)
    if status in {400, 422} and body is not None:
        raise _NotTaken(f"status {status}, {_message(content)}")
    if status in {401, 403}:
        what = f"the server refuses access: status {status}"
        raise InputError(what, where=where, fix=f"set {_KEY} to a key of the server")
    if status != 200:
        what = f"the server answers with status {status}: {_message(content)}"
        kind = MachineError if status >= 500 else InputError
        raise kind(what, where=where, fix=again if status >= 500 else _SERVE)
    return parse_table(content, where, _SERVE)


def _message(content: bytes) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(printable(content[:300].decode(errors="replace")).split()) or "without a message"


_Read = Callable[[Mapping[str, Any], Sequence[int]], Answer]


def _by_id(choice: Mapping[str, Any], window: Sequence[int]) -> Answer:
    """From `prompt_logprobs` of vLLM: for each token but the first {id: {"logprob", "rank", ...}}."""
    listed = choice.get("prompt_logprobs")
    if not isinstance(listed, list) or len(listed) < 2:
        raise _NotTaken("its answer has no `prompt_logprobs`")
    scores, candidates = [], []
    for place, entry in enumerate(listed[1:], 1):
        if not isinstance(entry, dict):
            raise _NotTaken("`prompt_logprobs` are not as vLLM gives them")
        values = {_token(token): _of(value) for token, value in entry.items()}
        if place >= len(window) or window[place] not in values:
            raise _NotTaken("`prompt_logprobs` are of other tokens")
        scores.append(values[window[place]])
        candidates.append(_likeliest(values))
    return Answer(tuple(scores), tuple(candidates))


def _echoed(choice: Mapping[str, Any], window: Sequence[int]) -> Answer:
    """From `logprobs` of an echoed prompt, which may have the token that follows behind it."""
    block = choice.get("logprobs")
    listed = block.get("token_logprobs") if isinstance(block, dict) else None
    if not isinstance(block, dict) or not isinstance(listed, list) or len(listed) < 2:
        raise _NotTaken("its answer does not echo the prompt with `logprobs`")
    if len(listed) == 2 and len(window) > 2:
        raise _NotTaken("its answer has `logprobs` of what follows alone, and no echo")
    listed = listed[: len(listed) - (len(listed) == len(window) + 1)]
    scores = tuple(_number(value) for value in listed[1:])
    tops = block.get("top_logprobs")
    candidates = []
    for entry in tops[1 : len(window)] if isinstance(tops, list) else ():
        if not isinstance(entry, dict) or not all(str(token).startswith(_ID) for token in entry):
            return Answer(scores, None)
        values = {_token(token.removeprefix(_ID)): _number(value) for token, value in entry.items()}
        candidates.append(_likeliest(values))
    complete = len(candidates) == len(scores) and all(candidates)
    return Answer(scores, tuple(candidates) if complete else None)


def _likeliest(values: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(values.items(), key=lambda item: (-item[1], item[0])))


def _of(value: Any) -> float:
    return _number(value.get("logprob") if isinstance(value, dict) else value)


def _number(value: Any) -> float:
    """A log-probability. _NotTaken for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (math.isfinite(value) and _LEAST <= value <= _MOST_LOG):
        raise _NotTaken(f"{value!r:.40} is not a log-probability")
    return float(value)


def _token(text: Any) -> int:
    """A token id. _NotTaken for anything else."""
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    raise _NotTaken(f"{text!r:.40} is not a token id")


_FORMS: tuple[tuple[dict[str, Any], _Read], ...] = (
    ({"prompt_logprobs": _CANDIDATES}, _by_id),
    ({"echo": True, "logprobs": _CANDIDATES, "return_tokens_as_token_ids": True}, _echoed),
    ({"echo": True, "logprobs": _FEWER}, _echoed),
)
