"""A server on this machine that answers /v1/completions as vLLM, or as others do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import torch
from torch import Tensor

Scores = Callable[[list[int]], Tensor]  # token ids -> log-probabilities [length, vocabulary]


@dataclass
class Completions:
    """A running server.

    style:  "vllm" gives prompt_logprobs; "echo" echoes with the text of tokens, "ids" with token ids;
            "deaf" neither. models: names. edit: changes an answer. status: that of an error.
    asked:  bodies of the requests. keys: what was sent as Authorization.
    """

    scores: Scores
    style: str = "vllm"
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "tiny"}])
    edit: Callable[[dict[str, Any]], Any] = lambda answer: answer
    status: int = 200
    address: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def answer(self, body: dict[str, Any]) -> tuple[int, Any]:
        """The status and the object."""
        self.asked.append(body)
        if self.status != 200:
            return self.status, {"error": {"message": "cannot\nserve"}}
        ids = body["prompt"]
        choice: dict[str, Any] = {"index": 0, "text": "", "logprobs": None}
        if "prompt_logprobs" in body and self.style not in {"vllm", "deaf"}:
            return 400, {"error": {"message": "unknown field prompt_logprobs"}}
        if self.style == "vllm" and "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [None, *self._listed(ids, body["prompt_logprobs"])]
        elif self.style in {"echo", "ids"} and body.get("echo"):
            choice["logprobs"] = self._echoed(ids, body)
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1}
        return 200, self.edit({"choices": [choice], "usage": usage})

    def _listed(self, ids: list[int], most: int) -> Iterator[dict[str, Any]]:
        scores = self.scores(ids)
        for place, token in enumerate(ids[1:]):
            top = scores[place].topk(most)
            found = {int(i): float(v) for v, i in zip(*top, strict=True)}
            found[token] = float(scores[place, token])
            yield {
                str(i): {"logprob": value, "rank": 1, "decoded_token": f"<{i}>"}
                for i, value in found.items()
            }

    def _echoed(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        if self.style == "ids" and body.get("return_tokens_as_token_ids"):
            named = "token_id:{}".format
        else:
            named = "<{}>".format
        tops = [
            {named(token): value["logprob"] for token, value in each.items()}
            for each in self._listed(ids, body["logprobs"])
        ]
        scores = [each[named(token)] for each, token in zip(tops, ids[1:], strict=True)]
        return {  # with the token that follows
            "tokens": [*map(named, ids), named(0)],
            "token_logprobs": [None, *scores, -1.0],
            "top_logprobs": [None, *tops, {named(0): -1.0}],
        }


class _Handler(BaseHTTPRequestHandler):
    completions: Completions
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.completions.keys.append(self.headers["Authorization"])
        self._send(200, {"object": "list", "data": self.completions.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(*self.completions.answer(body))

    def _send(self, status: int, answer: Any) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def completions(scores: Scores, style: str = "vllm") -> Iterator[Completions]:
    """A server whose model has these log-probabilities."""
    made = Completions(scores, style)
    handler = type("Own", (_Handler,), {"completions": made})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def random_scores(vocabulary: int = 64, seed: int = 0) -> Scores:
    """A model whose prediction depends on the last token alone."""
    table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[torch.tensor(ids)].double().log_softmax(-1)
