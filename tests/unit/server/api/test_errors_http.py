from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.api.refusal import MAX_BODY_BYTES
from server.config import HttpConfig
from tests.unit.server.api.live import Live, serve

HI = [{"role": "user", "content": "Hi"}]


def refusal(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(response.content) <= MAX_BODY_BYTES
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return response.status_code, error["code"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "route_not_found"),
        ("POST", "/v1/nothing", 404, "route_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("POST", "/v1/chat/completions/", 404, "route_not_found"),
        ("GET", "/docs", 404, "route_not_found"),
    ],
)
def test_routes_that_are_not_there_answer_in_the_same_shape(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = http.request(method, path)
    assert refusal(response) == (status, code)
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"n": NaN}', b'{"a":' + b"[" * 50_000, b"{}"])
def test_a_malformed_body_is_400_never_422(http: httpx.Client, route: str, body: bytes) -> None:
    assert refusal(http.post(route, content=body)) == (400, "malformed_body")


def test_a_body_is_read_whatever_its_content_type_says(http: httpx.Client) -> None:
    response = http.post(
        "/v1/chat/completions", content=json.dumps({"messages": HI}), headers={"content-type": "text/plain"}
    )
    assert response.status_code == 200


def test_a_compressed_body_is_refused(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert refusal(response) == (400, "malformed_body")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"temperature": 9}, "invalid_value", "temperature"),
        ({"n": 17}, "invalid_value", "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter", "tools"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"temprature": 1}, "unknown_parameter", "temprature"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_value", "max_tokens"),
        ({"stop_token_ids": [421]}, "invalid_value", "stop_token_ids"),
        ({"logit_bias": {"421": 1}}, "invalid_value", "logit_bias"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "unsupported_parameter", None),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "invalid_value",
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported_parameter",
            "messages[0].content[0].type",
        ),
        ({"messages": HI * 2}, "invalid_value", "messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_value", "continue_final_message"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "invalid_value", "chat_template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "unsupported_parameter", "chat_template"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "context_length_exceeded", None),
        ({"messages": [{"role": "user", "content": ""}] * 257}, "context_length_exceeded", "messages"),
    ],
)
def test_a_field_that_is_wrong_is_named(
    http: httpx.Client, fields: dict[str, Any], code: str, param: str | None
) -> None:
    response = http.post("/v1/chat/completions", json={"messages": HI, **fields})
    assert refusal(response) == (400, code)
    if param is not None:
        assert response.json()["error"]["param"] == param


def test_a_huge_bad_value_gives_a_small_error(http: httpx.Client) -> None:
    for fields in ({"model": "x" * 100_000}, {"x" * 100_000: 1}, {"n": ["y"] * 10_000}, {"stop": ["z" * 100_000]}):
        assert refusal(http.post("/v1/chat/completions", json={"messages": HI, **fields}))[0] == 400


def test_a_base_without_a_chat_template_says_what_to_use_instead() -> None:
    with serve(chat=False) as live:
        response = httpx.post(live.url + "/v1/chat/completions", json={"messages": HI})
        assert refusal(response) == (400, "invalid_value")
        assert "/v1/completions" in response.json()["error"]["message"]


@pytest.fixture
def small() -> Iterator[Live]:
    with serve(HttpConfig(max_body_bytes=1000, lenient=True)) as live:
        yield live


def test_a_body_above_the_limit_is_413_however_it_is_sent(small: Live) -> None:
    url = small.url + "/v1/chat/completions"
    body = json.dumps({"messages": HI, "user": "x" * 2000}).encode()
    assert refusal(httpx.post(url, content=body)) == (413, "body_too_large")
    assert refusal(httpx.post(url, content=iter([body[:600], body[600:]]))) == (413, "body_too_large")
    assert httpx.post(url, json={"messages": HI}).status_code == 200


def test_a_lenient_server_lists_what_it_ignored(small: Live) -> None:
    body = {"messages": HI, "temprature": 1, "zip\n": 2}
    for stream in (False, True):
        response = httpx.post(small.url + "/v1/chat/completions", json={**body, "stream": stream})
        assert response.status_code == 200
        assert response.headers["x-multigraft-ignored"] == "temprature, zip%0A"


def test_a_bug_of_ours_is_a_500_that_tells_no_secrets(live: Live, http: httpx.Client) -> None:
    live.engine.bug = RuntimeError("/home/secret/path")
    response = http.post("/v1/chat/completions", json={"messages": HI}, headers={"x-request-id": "abc"})
    assert refusal(response) == (500, "engine_failed")
    assert "secret" not in response.text
    assert "abc" in response.json()["error"]["message"]
    assert live.adapters.held == 0
    assert http.get("/health").status_code == 200
