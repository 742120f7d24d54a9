"""What routed answers look like, and which combinations of fields are refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.unit.server.api.fakes import digest_of
from tests.unit.server.api.live import Live

ARROW = {"mode": "arrow", "candidates": ["pirate@prod", "team/legal"], "top_k": 2, "temperature": 0.5}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
ROUTES = [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "Hi"})]


def ask(http: httpx.Client, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    return http.post(path, json={**dict(ROUTES)[path], "max_tokens": 5, **fields})


def test_a_routed_answer_lists_its_experts_without_a_weight(http: httpx.Client) -> None:
    response = ask(http, routing=ARROW)
    assert response.headers["x-multigraft-adapters"] == "pirate@1,team/legal@3"
    assert response.json()["adapters"] == [
        {"ref": "pirate@prod", "version": 1, "digest": digest_of("pirate", 1), "weight": None},
        {"ref": "team/legal", "version": 3, "digest": digest_of("team/legal", 3), "weight": None},
    ]
    assert "routing" not in response.json()["choices"][0]


def test_every_choice_of_a_routed_request_has_the_first_ones_digests(live: Live, http: httpx.Client) -> None:
    live.adapters.moving = "team/legal"
    assert ask(http, routing=ARROW, n=3).status_code == 200
    assert {
        tuple(one.digest for one in mixture.routing.experts) for mixture in live.engine.leased if mixture.routing
    } == {(digest_of("pirate", 1), digest_of("team/legal", 3))}


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_who_served_which_token_stands_on_every_choice(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    answer = ask(http, path, routing=ARROW, return_routing=True, n=2).json()
    for choice in answer["choices"]:
        told = choice["routing"]
        assert (told["mode"], told["top_k"], told["temperature"]) == ("arrow", 2, 0.5)
        assert told["experts"] == ["pirate@1", "team/legal@3"]
        tokens = answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"] // 2 - 1
        assert told["tokens"] == len(told["ids"]) == len(told["weights"]) == tokens
        assert (told["ids"][0], told["weights"][0]) == ([[1, 0]], [[0.75, 0.25]])


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_stream_tells_it_on_the_last_chunk_alone(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    lines = ask(http, path, routing=ARROW, return_routing=True, stream=True).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    told = [choice for chunk in chunks for choice in chunk["choices"] if "routing" in choice]
    assert [choice["finish_reason"] for choice in told] == ["length"]
    assert told[0]["routing"]["tokens"] > 4


def test_a_stop_string_ends_what_is_told_with_the_text(live: Live, http: httpx.Client) -> None:
    live.engine.reply = "Graft the apple"
    choice = ask(http, routing=ARROW, return_routing=True, stop=["ft"], max_tokens=50).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Gra", "stop")
    assert choice["routing"]["tokens"] > 4
