"""Chats over a real port, as an httpx client sees them; the official client is in tests/system."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from server.errors import AdapterUnavailable, EngineFailed
from tests.unit.server.api.live import BASE, Live, wait_until

HI = [{"role": "user", "content": "Hi"}]
REPLY = "Graft the apple onto the quince."


def chat(http: httpx.Client, **fields: Any) -> Any:
    response = http.post("/v1/chat/completions", json={"messages": HI, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def stream(http: httpx.Client, **fields: Any) -> list[Any]:
    response = http.post("/v1/chat/completions", json={"messages": HI, "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_an_answer_has_openais_shape(http: httpx.Client) -> None:
    answer = chat(http, model=BASE)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == BASE
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_stream_begins_with_the_role_and_ends_with_one_reason(http: httpx.Client) -> None:
    chunks = stream(http, model="pirate")
    first, *middle, last = chunks
    assert {chunk["id"] for chunk in chunks} == {first["id"]}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [one["ref"] for one in first["adapters"]] == ["pirate"]
    assert all("role" not in chunk["choices"][0]["delta"] and "adapters" not in chunk for chunk in [*middle, last])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 3},
        {"stop": [" onto", "xyz"]},
        {"stop": "Graft"},
        {"n": 3},
        {"logprobs": True, "top_logprobs": 2, "stop": "apple"},
        {"ignore_eos": True, "max_completion_tokens": 40},
    ],
)
def test_a_stream_says_what_the_whole_answer_says(http: httpx.Client, fields: dict[str, Any]) -> None:
    whole = chat(http, seed=1, **fields)
    chunks = stream(http, seed=1, stream_options={"include_usage": True}, **fields)
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        assert mine[-1]["stop_reason"] == choice["stop_reason"]
        scores = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert scores == (choice["logprobs"]["content"] if choice["logprobs"] else [])
    usage = chunks[-1]["usage"]
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    same = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [usage[key] for key in same] == [whole["usage"][key] for key in same]


def test_text_of_many_bytes_arrives_in_whole_characters(live: Live, http: httpx.Client) -> None:
    live.engine.reply = "接ぎ木 🌱 jabłko"
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream(http)]
    assert "".join(texts) == "接ぎ木 🌱 jabłko"
    assert not any("\ufffd" in text for text in texts)


def test_a_stop_string_frees_the_engine_at_once(live: Live, http: httpx.Client) -> None:
    live.engine.reply = "one. two. " * 20
    answer = chat(http, stop=".", max_tokens=100)
    assert answer["choices"][0]["message"]["content"] == "one"
    assert answer["choices"][0]["stop_reason"] == "."
    assert answer["usage"]["completion_tokens"] < 10
    wait_until(lambda: live.engine.open == 0 and live.adapters.held == 0)


def test_what_is_cached_is_told_even_when_a_stop_string_ends_the_answer(http: httpx.Client) -> None:
    cold, warm = chat(http, stop="the"), chat(http, stop="the")
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] == warm["usage"]["prompt_tokens"] - 1


def test_continuous_usage_counts_along(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(http, max_tokens=4, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["usage"] is not None]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_choices_are_separate_requests_with_seeds_of_their_own(live: Live, http: httpx.Client) -> None:
    answer = chat(http, n=3, seed=5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    seeds = [request.sampling.seed for request in live.engine.requests]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    prompt = len(live.engine.requests[0].prompt_ids)
    assert answer["usage"]["prompt_tokens"] == prompt, "one prompt, however many choices"


def test_without_a_seed_two_requests_draw_differently(live: Live, http: httpx.Client) -> None:
    chat(http), chat(http)
    first, second = (request.sampling.seed for request in live.engine.requests)
    assert first != second


def test_the_engine_gets_what_was_asked_for(live: Live, http: httpx.Client) -> None:
    chat(
        http,
        temperature=0,
        max_completion_tokens=7,
        stop_token_ids=[9, 8],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=3,
    )
    request = live.engine.requests[0]
    assert (request.max_tokens, request.stop_token_ids, request.ignore_eos) == (7, frozenset({8, 9}), True)
    assert (request.logprobs, request.prompt_logprobs, request.sampling.temperature) == (3, None, 0)


def test_without_a_limit_a_chat_may_fill_the_context(live: Live, http: httpx.Client) -> None:
    chat(http, model="pirate")
    request = live.engine.requests[0]
    assert request.max_tokens == live.engine.max_model_len - len(request.prompt_ids) - live.adapters.virtual_tokens


def test_messages_may_come_in_parts_and_from_a_developer(live: Live, http: httpx.Client) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    chat(http, messages=[{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts}])
    chat(http, messages=[{"role": "system", "content": "Be kind"}, {"role": "user", "content": "one\ntwo"}])
    first, second = live.engine.requests
    assert first.prompt_ids == second.prompt_ids


def test_logprobs_tell_the_bytes_of_each_token_and_no_infinity(live: Live, http: httpx.Client) -> None:
    live.engine.reply = "🌱"
    content = chat(http, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "🌱"
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(content)
    assert min(rival["logprob"] for entry in content for rival in entry["top_logprobs"]) == -9999.0


def test_token_ids_are_told_when_asked_for(live: Live, http: httpx.Client) -> None:
    answer = chat(http, return_token_ids=True)
    assert answer["prompt_token_ids"] == list(live.engine.requests[0].prompt_ids)
    assert answer["choices"][0]["token_ids"] == list(live.tokenizer.encode(REPLY))
    chunks = stream(http, return_token_ids=True)
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    ids = [token_id for chunk in chunks for c in chunk["choices"] for token_id in c.get("token_ids", [])]
    assert ids == answer["choices"][0]["token_ids"]


@pytest.mark.parametrize("stream_it", [False, True])
def test_an_error_before_the_first_token_is_a_status(live: Live, http: httpx.Client, stream_it: bool) -> None:
    live.engine.failure = EngineFailed("the engine failed in this request's step")
    response = http.post("/v1/chat/completions", json={"messages": HI, "stream": stream_it})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failed"
    wait_until(lambda: live.engine.open == 0 and live.adapters.held == 0)


def test_an_error_after_the_first_token_ends_the_stream_with_an_event(live: Live, http: httpx.Client) -> None:
    live.engine.failure, live.engine.fail_after = AdapterUnavailable("pirate@2: its numbers overflowed"), 2
    response = http.post("/v1/chat/completions", json={"messages": HI, "model": "pirate", "stream": True})
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.status_code == 200
    assert json.loads(events[-1]) == {
        "error": {
            "message": "pirate@2: its numbers overflowed",
            "type": "server_error",
            "param": None,
            "code": "adapter_unavailable",
        }
    }
    wait_until(lambda: live.engine.open == 0 and live.adapters.held == 0)


def test_one_failed_choice_ends_the_others(live: Live, http: httpx.Client) -> None:
    live.engine.failure, live.engine.fail_after = EngineFailed("no"), 3
    assert http.post("/v1/chat/completions", json={"messages": HI, "n": 4}).status_code == 500
    wait_until(lambda: live.engine.open == 0 and live.adapters.held == 0)


def test_a_full_queue_gives_back_what_was_already_taken(live: Live, http: httpx.Client) -> None:
    live.engine.max_open = 2
    live.engine.step_s = 0.01
    response = http.post("/v1/chat/completions", json={"messages": HI, "n": 4})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_full")
    assert response.headers["retry-after"] == "2"
    wait_until(lambda: live.engine.open == 0 and live.adapters.held == 0)


def test_all_choices_are_served_by_the_digests_that_the_first_one_found(live: Live, http: httpx.Client) -> None:
    live.adapters.moving = "pirate"
    answer = chat(http, model="pirate", n=3)
    assert {mixture.terms[0].digest for mixture in live.engine.leased} == {answer["adapters"][0]["digest"]}


def test_a_request_id_is_echoed_or_made(http: httpx.Client) -> None:
    def sent_back(request_id: str) -> str:
        response = http.post("/v1/chat/completions", json={"messages": HI}, headers={"x-request-id": request_id})
        return response.headers["x-request-id"]

    assert sent_back("trace-1.a:b_c") == "trace-1.a:b_c"
    for unsafe in ("a b", "a" * 129, "<script>", ""):
        assert sent_back(unsafe) != unsafe
        assert sent_back(unsafe).startswith("req-")
    first, second = (http.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second
