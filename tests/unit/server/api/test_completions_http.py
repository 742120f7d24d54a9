from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.unit.server.api.live import Live

REPLY = "Graft the apple onto the quince."


def complete(http: httpx.Client, prompt: Any, **fields: Any) -> Any:
    response = http.post("/v1/completions", json={"prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_the_default_is_sixteen_tokens_as_openais(live: Live, http: httpx.Client) -> None:
    answer = complete(http, "Hello")
    assert live.engine.requests[0].max_tokens == 16
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == REPLY


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_prompt_is_a_text_or_token_ids_one_or_many(live: Live, http: httpx.Client, as_ids: bool) -> None:
    texts = ["Hello there", "Graft"]
    prompts = [list(live.tokenizer.encode(text)) for text in texts] if as_ids else texts
    complete(http, prompts[0])
    answer = complete(http, prompts, n=2)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    ids = [live.tokenizer.encode(text) for text in texts]
    assert [request.prompt_ids for request in live.engine.requests] == [ids[0], ids[0], ids[0], ids[1], ids[1]]
    assert answer["usage"]["prompt_tokens"] == len(ids[0]) + len(ids[1])


def test_prompts_of_one_request_draw_as_each_would_alone(live: Live, http: httpx.Client) -> None:
    complete(http, ["Hello", "Graft"], seed=3, n=2)
    seeds = [request.sampling.seed for request in live.engine.requests]
    assert seeds[:2] == seeds[2:]
    assert seeds[0] == 3


def test_an_echo_repeats_the_prompt_as_it_was_sent(live: Live, http: httpx.Client) -> None:
    assert complete(http, "Hello  there,", echo=True)["choices"][0]["text"] == "Hello  there," + REPLY
    ids = list(live.tokenizer.encode("Hello there"))
    assert complete(http, ids, echo=True)["choices"][0]["text"] == "Hello there" + REPLY


def test_a_prompt_can_be_scored_without_a_word_of_answer(live: Live, http: httpx.Client) -> None:
    ids = list(live.tokenizer.encode("Hello there"))
    choice = complete(http, ids, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hello there", "length")
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1)
    assert logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"]) == "Hello there"
    assert live.engine.requests[0].prompt_logprobs == 1


def test_logprobs_are_parallel_lists_over_the_returned_text(http: httpx.Client) -> None:
    choice = complete(http, "Hello", logprobs=2, echo=True, max_tokens=5)["choices"][0]
    logprobs = choice["logprobs"]
    assert len({len(logprobs[key]) for key in logprobs}) == 1
    for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_offsets_count_characters_not_bytes(live: Live, http: httpx.Client) -> None:
    live.engine.reply = "🌱!"
    logprobs = complete(http, "Hello", logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["text_offset"][-1] == 1
    assert logprobs["top_logprobs"][-1] == {"!": -0.5}, "the token itself, though no rivals were asked for"


def test_a_streamed_completion_says_what_the_whole_one_says(http: httpx.Client) -> None:
    fields: dict[str, Any] = {"prompt": ["Hello", "Graft"], "echo": True, "logprobs": 1, "n": 2, "seed": 1}
    whole = http.post("/v1/completions", json=fields).json()
    text = http.post("/v1/completions", json={**fields, "stream": True}).text
    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[0]["adapters"] == []
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == [choice["finish_reason"]]
        for key in ("tokens", "text_offset", "token_logprobs"):
            assert [item for c in mine if c["logprobs"] for item in c["logprobs"][key]] == choice["logprobs"][key]


def test_token_ids_come_with_each_choice(live: Live, http: httpx.Client) -> None:
    choices = complete(http, ["Hello", "Graft"], return_token_ids=True)["choices"]
    assert [tuple(choice["prompt_token_ids"]) for choice in choices] == [
        request.prompt_ids for request in live.engine.requests
    ]


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([], "prompt"),
        (5, "prompt"),
        ("", "prompt"),
        (None, "prompt"),
        ([[]], "prompt"),
        (["a", 5], "prompt[1]"),
        ([[5], "a", [True]], "prompt[2]"),
        ([5, 10**9], "prompt"),
        ([-1], "prompt"),
        ([[5], [421]], "prompt"),
        (["a"] * 257, "prompt"),
    ],
)
def test_what_is_no_prompt_is_refused(http: httpx.Client, prompt: Any, param: str) -> None:
    response = http.post("/v1/completions", json={"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_the_texts_of_one_request_are_bounded(live: Live, http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": ["a"] * 129, "n": 2})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "n")
    assert "258" in response.json()["error"]["message"]
    assert live.engine.requests == []


def test_a_prompt_that_is_too_long_is_told_the_numbers(live: Live, http: httpx.Client) -> None:
    for prompt, asked in ((["Hello " * 300], None), ([5] * 255, 2), ([5] * 257, 0), ("x" * 100_000, 1)):
        response = http.post(
            "/v1/completions", json={"prompt": prompt, **({} if asked is None else {"max_tokens": asked})}
        )
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert str(live.engine.max_model_len) in error["message"]
    assert complete(http, [5] * 255, max_tokens=1)["choices"][0]["finish_reason"] == "length"
    assert complete(http, [5] * 256, max_tokens=0)["choices"][0]["finish_reason"] == "length"


def test_the_adapters_virtual_tokens_count(live: Live, http: httpx.Client) -> None:
    ids = [5] * (live.engine.max_model_len - live.adapters.virtual_tokens)
    response = http.post("/v1/completions", json={"prompt": ids, "model": "pirate", "max_tokens": 1})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert f"its adapters take {live.adapters.virtual_tokens}" in response.json()["error"]["message"]
    assert live.adapters.held == 0
