from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.unit.server.api.live import Live

TEXT = "Graft the 🌱 <|im_end|>"


@pytest.mark.parametrize("field", ["prompt", "content", "inputs"])
def test_a_text_is_tokenized_under_whichever_name_it_comes(live: Live, http: httpx.Client, field: str) -> None:
    answer = http.post("/tokenize", json={field: TEXT}).json()
    assert answer["tokens"] == list(live.tokenizer.encode(TEXT))
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 256
    assert answer["token_strs"] is None


def test_messages_are_tokenized_as_a_chat_would_be(live: Live, http: httpx.Client) -> None:
    messages = [{"role": "user", "content": TEXT}]
    http.post("/v1/chat/completions", json={"messages": messages})
    answer = http.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
    assert tuple(answer["tokens"]) == live.engine.requests[0].prompt_ids
    assert answer["token_strs"][0] == "<|im_start|>"


def test_text_comes_back_from_its_tokens(live: Live, http: httpx.Client) -> None:
    ids = list(live.tokenizer.encode("Graft the 🌱"))
    answer = http.post("/detokenize", json={"tokens": ids}).json()
    assert answer == {"prompt": "Graft the 🌱", "content": "Graft the 🌱", "text": "Graft the 🌱"}


@pytest.mark.parametrize(
    ("route", "body", "code"),
    [
        ("/tokenize", {}, "malformed_body"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "malformed_body"),
        ("/tokenize", {"prompt": 5}, "invalid_value"),
        ("/tokenize", {"prompt": "x" * 1_000_000}, "context_length_exceeded"),
        ("/detokenize", {"tokens": [10**9]}, "invalid_value"),
        ("/detokenize", {"tokens": [-1]}, "invalid_value"),
        ("/detokenize", {"tokens": ["a"]}, "invalid_value"),
        ("/detokenize", {}, "malformed_body"),
    ],
)
def test_what_cannot_be_converted_is_refused(http: httpx.Client, route: str, body: dict[str, Any], code: str) -> None:
    response = http.post(route, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


def test_a_text_longer_than_the_context_can_still_be_counted(http: httpx.Client) -> None:
    assert http.post("/tokenize", json={"prompt": "Graft " * 500}).json()["count"] > 256
