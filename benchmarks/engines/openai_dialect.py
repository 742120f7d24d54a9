"""The completions of the OpenAI API, as vLLM and Multigraft stream them: an adapter is asked for as a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.load import Asked, Prompt


@dataclass(frozen=True)
class OpenAI:
    base: str
    names: Sequence[str]  # of the adapters
    path: str = "/v1/completions"
    count: bytes = b'"completion_tokens"'

    def body(self, prompt: Prompt, asked: Asked, new: int) -> dict[str, Any]:
        return {
            "model": self.base if asked is None else self.names[asked],
            "prompt": prompt,
            "max_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def is_piece(self, event: bytes) -> bool:
        return b'"text":"' in event and b'"text":""' not in event

    def tokens(self, event: dict[str, Any]) -> int:
        return int(event["usage"]["completion_tokens"])
