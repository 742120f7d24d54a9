from __future__ import annotations

from contextlib import closing
from http.client import HTTPConnection

import httpx
import pytest
from fastapi.routing import APIRoute

from server.api.keys import OPEN_PATHS
from server.config import HttpConfig
from tests.unit.server.api.live import Live, serve

USER, ADMIN = "user-key", "admin-key"
ADMIN_PATHS = {
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/adapters/pin",
    "/v1/adapters/warm",
    "/v1/adapters/evict",
}


def routes(live: Live) -> list[tuple[str, str]]:
    found = []
    for route in live.app.routes:
        methods = getattr(route, "methods", None) or {"GET"}
        found += [(method, str(getattr(route, "path", "")).replace("{model:path}", "x")) for method in sorted(methods)]
    assert len(found) > 10
    return found


def status(live: Live, method: str, path: str, key: str | None = None) -> int:
    """By the standard library: httpx would resolve `//` and takes longer than the answer to be made ready."""
    connection = HTTPConnection(live.url.removeprefix("http://"), timeout=10)
    with closing(connection):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        connection.request(method, path, body=b"{}", headers=headers)
        return connection.getresponse().status


def test_with_a_key_set_every_route_but_the_probes_is_closed_without_it() -> None:
    with serve(HttpConfig(api_key=USER, admin_key=ADMIN)) as live:
        for method, path in [*routes(live), ("GET", "/nowhere"), ("GET", "//health"), ("GET", "/health/")]:
            for key in (None, "wrong", USER + "x", USER[:-1]):
                answer = status(live, method, path, key)
                assert (answer == 401) == (path not in OPEN_PATHS), f"{method} {path} with {key!r}: {answer}"


def test_the_key_and_the_admin_key_open_what_is_not_managing() -> None:
    with serve(HttpConfig(api_key=USER, admin_key=ADMIN)) as live:
        for method, path in routes(live):
            user, admin = status(live, method, path, USER), status(live, method, path, ADMIN)
            assert (user == 403) == (path in ADMIN_PATHS), f"{method} {path}: {user}"
            assert user not in (401, 500)
            assert admin not in (401, 403, 500)


def test_every_managing_route_is_known_to_this_test() -> None:
    with serve() as live:
        closed = {path for method, path in routes(live) if status(live, method, path) == 403}
        assert closed == ADMIN_PATHS


def test_without_an_admin_key_managing_is_closed_and_says_how_to_open_it() -> None:
    with serve() as live:
        for path in ADMIN_PATHS:
            response = httpx.post(live.url + path, json={"ref": "pirate"}, headers={"authorization": "Bearer anything"})
            assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_key_required")
            assert "MULTIGRAFT_ADMIN_KEY" in response.json()["error"]["message"]


def test_without_an_api_key_asking_is_open_and_managing_is_not() -> None:
    with serve(HttpConfig(admin_key=ADMIN)) as live:
        assert status(live, "GET", "/v1/models") == 200
        assert status(live, "POST", "/v1/adapters/pin") == 401
        assert status(live, "POST", "/v1/adapters/pin", ADMIN) == 400, "let in; the body has no ref"


@pytest.mark.parametrize("value", ["user-key", "Basic user-key", "Bearer", "bearer: user-key", "Bearer üser"])
def test_a_key_is_a_bearer_token(value: str) -> None:
    with serve(HttpConfig(api_key=USER)) as live:
        response = httpx.get(live.url + "/v1/models", headers=[(b"authorization", value.encode())])
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_the_scheme_may_be_written_small() -> None:
    with serve(HttpConfig(api_key=USER)) as live:
        assert httpx.get(live.url + "/v1/models", headers={"authorization": f"bearer {USER}"}).status_code == 200


def test_keys_are_not_shown_when_a_configuration_is_printed() -> None:
    assert USER not in repr(HttpConfig(api_key=USER)) and ADMIN not in repr(HttpConfig(admin_key=ADMIN))


def test_every_route_says_in_the_schema_how_it_refuses() -> None:
    with serve() as live:
        paths = httpx.get(live.url + "/openapi.json").json()["paths"]
        for route in live.app.routes:
            if isinstance(route, APIRoute):
                for method in route.methods or ():
                    declared = paths[route.path_format][method.lower()]["responses"]
                    assert {"400", "401", "404", "503"} <= set(declared)
                    assert "422" not in declared
