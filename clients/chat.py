"""`hub chat`: a conversation in the terminal, over the same HTTP as everybody else's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx

from clients.errors import RequestRefused, ServerUnreachable

TIMEOUT_S = 300


class Conversation:
    """Messages so far with one model; each answer is streamed and then remembered."""

    def __init__(self, url: str, model: str, *, key: str | None = None, system: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)
        self._model = model
        self._messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self.served_by = ""

    def say(self, text: str) -> Iterator[str]:
        """The pieces of the answer. Raises: RequestRefused, ServerUnreachable; the question is then forgotten."""
        asked = [*self._messages, {"role": "user", "content": text}]
        answer = ""
        body = {"model": self._model, "messages": asked, "stream": True}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise RequestRefused(_message(response.text))
                for line in response.iter_lines():
                    chunk = _chunk(line)
                    if "error" in chunk:
                        raise RequestRefused(str(chunk["error"]["message"]))
                    self._note_adapters(chunk)
                    for choice in chunk.get("choices", ()):
                        piece = choice["delta"].get("content") or ""
                        answer += piece
                        yield piece
        except httpx.TransportError as error:
            raise ServerUnreachable(f"no answer from {self._http.base_url}: {error}") from error
        self._messages = [*asked, {"role": "assistant", "content": answer}]

    def _note_adapters(self, chunk: Mapping[str, Any]) -> None:
        if "adapters" in chunk:
            terms = [f"{str(one['ref']).partition('@')[0]}@{one['version']}" for one in chunk["adapters"]]
            self.served_by = " + ".join(terms) or "the bare base"


def _chunk(line: str) -> Mapping[str, Any]:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return {}
    chunk: Mapping[str, Any] = json.loads(line.removeprefix("data: "))
    return chunk


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:300]
