from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from server.config import HttpConfig
from tests.unit.server.api.live import BASE, Live, serve


@pytest.fixture
def live() -> Iterator[Live]:
    with serve(HttpConfig(admin_key="admin")) as running:
        yield running


@pytest.fixture
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, headers={"authorization": "Bearer admin"}) as client:
        yield client


def load(http: httpx.Client, name: str, path: str, **fields: Any) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})


def test_vllms_clients_load_ask_and_unload(live: Live, http: httpx.Client) -> None:
    loaded = load(http, "captain", "pirate@1")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'captain' added successfully.")
    chat = {"model": "captain", "messages": [{"role": "user", "content": "Hi"}]}
    assert http.post("/v1/chat/completions", json=chat).headers["x-multigraft-adapters"] == "pirate@1"
    assert "captain" in [model["id"] for model in http.get("/v1/models").json()["data"]]
    unloaded = http.post("/v1/unload_lora_adapter", json={"lora_name": "captain"})
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'captain' removed successfully.")
    assert http.post("/v1/chat/completions", json=chat).status_code == 404


def test_a_second_load_of_a_name_must_say_that_it_replaces(live: Live, http: httpx.Client) -> None:
    assert load(http, "captain", "pirate@1").status_code == 200
    again = load(http, "captain", "pirate@2")
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    assert live.adapters.named["captain"] == "pirate@1"
    assert load(http, "captain", "pirate@2", load_inplace=True).status_code == 200
    assert live.adapters.named["captain"] == "pirate@2"


def test_a_load_that_fails_takes_no_name(live: Live, http: httpx.Client) -> None:
    assert load(http, "captain", "nobody").status_code == 404
    assert load(http, "captain", "corrupt").status_code == 502
    assert load(http, "captain", "pirate").status_code == 200


@pytest.mark.parametrize(
    "path", ["/srv/adapters/x", "../x", "./x", "~/x", "a/../../x", "C:\\x", "file:///x", "https://h/x"]
)
def test_an_adapter_is_loaded_by_reference_never_by_path(live: Live, http: httpx.Client, path: str) -> None:
    response = load(http, "captain", path)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_path")
    assert live.adapters.loads == 0


@pytest.mark.parametrize("name", ["", "a,b", 'a"b', "a b", "../a", "a\nb", "x" * 129, BASE])
def test_a_name_is_safe_in_labels_and_is_not_the_bases(live: Live, http: httpx.Client, name: str) -> None:
    response = load(http, name, "pirate")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_name")
    assert live.adapters.loads == 0


def test_what_is_resident_is_listed_with_its_bytes_and_leases(http: httpx.Client) -> None:
    assert http.get("/v1/adapters").json() == {"object": "list", "data": []}
    warmed = http.post("/v1/adapters/warm", json={"ref": "pirate@1"}).json()
    assert (warmed["name"], warmed["version"], warmed["tier"], warmed["bytes"]) == ("pirate", 1, "device", 1000)
    assert http.get("/v1/adapters").json()["data"] == [warmed]
    assert http.post("/v1/adapters/pin", json={"ref": "pirate@1"}).status_code == 200
    assert http.post("/v1/adapters/evict", json={"ref": "pirate@1"}).status_code == 200
    assert http.get("/v1/adapters").json()["data"] == []


def test_fields_that_nobody_defines_are_refused_here_too(http: httpx.Client) -> None:
    response = http.post("/v1/adapters/pin", json={"ref": "pirate", "reff": 1})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unknown_parameter")
    assert "did you mean 'ref'" in response.json()["error"]["message"]
