from __future__ import annotations

from typing import Any

import httpx
import pytest

from server.config import HttpConfig
from tests.unit.server.api.fakes import digest_of
from tests.unit.server.api.live import BASE, Live, serve

HI = [{"role": "user", "content": "Hi"}]


def ask(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": HI, **fields})


@pytest.mark.parametrize(
    ("fields", "header", "adapters"),
    [
        ({}, BASE, []),
        ({"model": BASE}, BASE, []),
        ({"model": "pirate"}, "pirate@2", [("pirate", 2, 1.0)]),
        ({"model": "pirate@prod"}, "pirate@1", [("pirate@prod", 1, 1.0)]),
        ({"model": f"{BASE}:team/legal"}, "team/legal@3", [("team/legal", 3, 1.0)]),
        (
            {"model": "pirate*0.5+team/legal@1*2e-3"},
            "pirate@2*0.5+team/legal@1*0.002",
            [("pirate", 2, 0.5), ("team/legal@1", 1, 0.002)],
        ),
        ({"model": BASE, "adapters": [{"ref": "soft"}]}, "soft@1", [("soft", 1, 1.0)]),
        ({"lora_path": "pirate"}, "pirate@2", [("pirate", 2, 1.0)]),
        ({"lora": [{"id": "pirate", "scale": 0.25}]}, "pirate@2*0.25", [("pirate", 2, 0.25)]),
    ],
)
def test_every_answer_says_what_served_it(
    http: httpx.Client, fields: dict[str, Any], header: str, adapters: list[tuple[str, int, float]]
) -> None:
    response = ask(http, **fields)
    assert response.headers["x-multigraft-adapters"] == header
    assert response.json()["adapters"] == [
        {"ref": ref, "version": version, "digest": digest_of(ref.partition("@")[0], version), "weight": weight}
        for ref, version, weight in adapters
    ]


def test_the_header_can_be_sent_as_model_and_gives_the_same(http: httpx.Client) -> None:
    first = ask(http, model="pirate*0.5+team/legal*-1e-7")
    again = ask(http, model=first.headers["x-multigraft-adapters"])
    assert again.headers["x-multigraft-adapters"] == first.headers["x-multigraft-adapters"]
    assert [one["digest"] for one in again.json()["adapters"]] == [one["digest"] for one in first.json()["adapters"]]


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "nobody"}, 404, "model_not_found"),
        ({"model": "pirate@9"}, 404, "model_not_found"),
        ({"model": "gpt-4o"}, 404, "model_not_found"),
        ({"model": "../pirate"}, 400, "invalid_value"),
        ({"model": "corrupt"}, 502, "adapter_unavailable"),
        ({"model": "foreign"}, 400, "adapter_incompatible"),
        ({"model": "auto", "adapters": [{"ref": "pirate"}]}, 400, "invalid_value"),
        ({"model": "auto", "routing": {"mode": "arrow", "candidates": ["pirate"]}}, 400, "invalid_value"),
        ({"model": "auto", "routing": {"mode": "semantic", "top_k": 2}}, 400, "unsupported_parameter"),
        ({"routing": {"mode": "semantic", "temperature": 0.5}}, 400, "unsupported_parameter"),
        ({"routing": {"mode": "semantic", "candidates": ["nobody"]}}, 404, "model_not_found"),
        ({"model": "pirate", "routing": {"mode": "semantic"}}, 400, "invalid_value"),
        ({"lora_path": "auto"}, 400, "invalid_value"),
        ({"routing": {"mode": "best"}}, 400, "invalid_value"),
        ({"routing": {"mode": "arrow"}}, 400, "invalid_value"),
        ({"routing": {"mode": "arrow", "candidates": ["pirate", "pirate"]}}, 400, "invalid_value"),
        ({"routing": {"mode": "arrow", "candidates": ["pirate"], "top_k": 0}}, 400, "invalid_value"),
        ({"routing": {"mode": "arrow", "candidates": ["pirate"], "temperature": 0}}, 400, "invalid_value"),
        ({"routing": {"mode": "arrow", "candidates": ["pirate"], "weights": [1]}}, 400, "unknown_parameter"),
        ({"routing": {"mode": "arrow", "candidates": ["nobody"]}}, 404, "model_not_found"),
        ({"model": "pirate", "routing": {"mode": "arrow", "candidates": ["soft"]}}, 400, "invalid_value"),
        ({"routing": {"mode": "gate"}}, 400, "invalid_value"),
        ({"model": "pirate+soft", "routing": {"mode": "gate"}}, 400, "invalid_value"),
        ({"model": "pirate", "lora_path": "soft"}, 400, "invalid_value"),
        ({"lora_path": "/etc/passwd"}, 400, "invalid_value"),
        ({"adapter_id": "pirate", "adapter_source": "s3"}, 400, "unsupported_parameter"),
        ({"merged_adapters": {"ids": ["pirate"], "weights": []}}, 400, "mixture_refused"),
        ({"lora": [{"id": 0, "scale": 1.0}]}, 400, "invalid_value"),
    ],
)
def test_a_choice_that_cannot_be_served_is_refused(
    live: Live, http: httpx.Client, fields: dict[str, Any], status: int, code: str
) -> None:
    for stream in (False, True):
        response = ask(http, stream=stream, **fields)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert live.adapters.held == 0


def test_a_name_loaded_by_hand_that_looks_like_a_mixture_is_taken_whole(live: Live, http: httpx.Client) -> None:
    live.adapters.named["pirate+soft"] = "team/legal@1"
    assert ask(http, model="pirate+soft").headers["x-multigraft-adapters"] == "team/legal@1"


def test_a_served_name_with_a_colon_is_the_base_and_a_prefix() -> None:
    name = "gpt-oss:120b"
    with serve(HttpConfig(served_name=name), base=name) as live, httpx.Client(base_url=live.url) as http:
        assert ask(http, model=name).headers["x-multigraft-adapters"] == name
        assert ask(http, model=f"{name}:pirate").headers["x-multigraft-adapters"] == "pirate@2"


def test_models_are_the_base_and_the_hubs_names(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [BASE, "pirate", "team/legal", "soft"]
    base, adapter = listed["data"][:2]
    assert (base["object"], base["parent"], base["max_model_len"]) == ("model", None, 256)
    assert (adapter["parent"], adapter["root"], adapter["version"]) == (BASE, digest_of("pirate", 2), 2)


@pytest.mark.parametrize(
    ("model", "version"), [("team/legal", 3), ("team/legal@prod", 1), ("team%2Flegal@2", 2), (f"{BASE}:pirate", 2)]
)
def test_one_model_can_be_looked_up(http: httpx.Client, model: str, version: int) -> None:
    assert http.get(f"/v1/models/{model}").json()["version"] == version


def test_the_base_can_be_looked_up_and_a_stranger_cannot(http: httpx.Client) -> None:
    assert http.get(f"/v1/models/{BASE}").json()["id"] == BASE
    for model in ("nobody", "../etc/passwd", "pirate+soft", "pirate@77"):
        response = http.get(f"/v1/models/{model}")
        assert (response.status_code, response.json()["error"]["code"]) in (
            (404, "model_not_found"),
            (404, "route_not_found"),  # httpx itself resolves the dots
        )
