"""`model: auto` and /v1/embeddings over HTTP, on a fake engine whose embedding is one number that a test sets."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import httpx
import openai
import pytest

from server.errors import EngineFailed
from tests.unit.server.api.live import BASE, Live, wait_until

HI = [{"role": "user", "content": "Hi"}]


def ask(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": HI, **fields})


@pytest.mark.parametrize(
    "fields",
    [{"model": "auto"}, {"model": BASE, "routing": {"mode": "semantic"}}, {"routing": {"mode": "semantic"}}],
)
def test_the_answer_says_what_the_prompt_chose_and_why(live: Live, http: httpx.Client, fields: dict[str, Any]) -> None:
    live.adapters.routed = ("pirate", "soft")
    response = ask(http, **fields)
    assert response.headers["x-multigraft-adapters"] == "pirate@2"
    assert [one["ref"] for one in response.json()["adapters"]] == ["pirate"]
    assert response.json()["routing"] == {
        "mode": "semantic",
        "chosen": "pirate",
        "score": 0.5,
        "threshold": 0.0,
        "candidates": [{"ref": "pirate", "score": 0.5}],
        "reason": "the fake says so",
    }


def test_a_prompt_that_is_for_nobody_goes_to_the_base(live: Live, http: httpx.Client) -> None:
    live.adapters.routed = ("pirate",)
    live.engine.embedding = (-0.5,)
    response = ask(http, model="auto")
    assert response.headers["x-multigraft-adapters"] == BASE
    assert response.json()["adapters"] == [] and response.json()["routing"]["chosen"] is None


def test_candidates_limit_the_choice(live: Live, http: httpx.Client) -> None:
    live.adapters.routed = ("pirate", "soft")
    response = ask(http, model="auto", routing={"mode": "semantic", "candidates": ["team/legal@1"]})
    assert response.headers["x-multigraft-adapters"] == "team/legal@1"


def test_an_answer_without_semantic_routing_has_no_such_field(http: httpx.Client) -> None:
    assert "routing" not in ask(http, model="pirate").json()


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_a_stream_says_it_on_its_first_chunk_alone(live: Live, http: httpx.Client, route: str) -> None:
    live.adapters.routed = ("pirate",)
    prompt: dict[str, Any] = {"messages": HI} if route.startswith("chat") else {"prompt": "Hi"}
    text = http.post(f"/v1/{route}", json={"model": "auto", "stream": True, **prompt}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert chunks[0]["routing"]["chosen"] == "pirate" and chunks[0]["adapters"][0]["ref"] == "pirate"
    assert all("routing" not in chunk for chunk in chunks[1:])


def test_all_choices_of_one_prompt_share_its_adapter(live: Live, http: httpx.Client) -> None:
    live.adapters.routed = ("pirate",)
    assert len(ask(http, model="auto", n=3).json()["choices"]) == 3
    embedded = [request for request in live.engine.requests if request.embed]
    assert len(embedded) == 1 and len(live.engine.requests) == 4


def test_a_list_of_prompts_is_refused(live: Live, http: httpx.Client) -> None:
    live.adapters.routed = ("pirate",)
    response = http.post("/v1/completions", json={"model": "auto", "prompt": ["one", "two"]})
    assert response.status_code == 400 and response.json()["error"]["param"] == "prompt"


def test_auto_is_listed_while_there_is_something_to_choose(live: Live, http: httpx.Client) -> None:
    def ids() -> list[str]:
        return [one["id"] for one in http.get("/v1/models").json()["data"]]

    assert "auto" not in ids() and http.get("/v1/models/auto").status_code == 404
    live.adapters.routed = ("pirate",)
    assert ids()[:2] == [BASE, "auto"] and http.get("/v1/models/auto").json()["parent"] == BASE


def test_everything_taken_is_given_back_when_the_prompt_cannot_be_embedded(live: Live, http: httpx.Client) -> None:
    live.adapters.routed = ("pirate",)
    live.engine.failure = EngineFailed("the base's numbers overflowed on this prompt")
    assert ask(http, model="auto").status_code == 500
    wait_until(lambda: live.engine.open == 0 and live.adapters.held == 0)


def test_embeddings_have_openais_shape_and_length_one(live: Live, http: httpx.Client) -> None:
    live.engine.embedding = (3.0, 4.0)
    body = http.post("/v1/embeddings", json={"model": BASE, "input": ["Hi", "yo"], "user": "u"}).json()
    assert body == {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": [0.6, 0.8]} for i in range(2)],
        "model": BASE,
        "usage": {"prompt_tokens": 4, "total_tokens": 4},
    }


@pytest.mark.parametrize("given", ["Hi", ["Hi"], [72, 105], [[72, 105]]])
def test_every_form_of_input_is_taken(http: httpx.Client, given: Any) -> None:
    response = http.post("/v1/embeddings", json={"input": given})
    assert response.status_code == 200 and len(response.json()["data"]) == 1


def test_the_openai_client_reads_them_in_base64(live: Live) -> None:
    live.engine.embedding = (3.0, -4.0)
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="none")
    found = client.embeddings.create(model=BASE, input="Hi").data[0].embedding
    assert found == pytest.approx([0.6, -0.8], abs=1e-7)
    with httpx.Client(base_url=live.url) as http:
        text = http.post("/v1/embeddings", json={"input": "Hi", "encoding_format": "base64"}).json()
    assert struct.unpack("<2f", base64.b64decode(text["data"][0]["embedding"])) == pytest.approx((0.6, -0.8))


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"input": "Hi", "dimensions": 64}, 400, "dimensions"),
        ({"input": "Hi", "model": "pirate"}, 400, "model"),
        ({"input": "Hi", "model": "auto"}, 400, "model"),
        ({"input": "Hi", "model": "nobody"}, 404, "model"),
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [1.5]}, 400, "input[0]"),
        ({"input": [10**9]}, 400, "input"),
        ({"input": "Hi", "encoding_format": "int8"}, 400, "encoding_format"),
        ({"input": "Hi", "inputs": "Hi"}, 400, "inputs"),
        ({}, 400, "input"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    http: httpx.Client, fields: dict[str, Any], status: int, param: str
) -> None:
    response = http.post("/v1/embeddings", json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_a_prompt_that_fails_ends_the_whole_request(live: Live, http: httpx.Client) -> None:
    live.engine.max_open = 0
    response = http.post("/v1/embeddings", json={"input": ["one", "two", "three"]})
    assert response.status_code == 503 and response.headers["retry-after"]
    wait_until(lambda: live.engine.open == 0 and live.adapters.held == 0)
