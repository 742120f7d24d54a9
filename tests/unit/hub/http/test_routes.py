"""Every route of the registry: closed to nobody and to the wrong scope, and silent about what a key may not see."""

from __future__ import annotations

import inspect
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
from fastapi.routing import APIRoute

from hub.client import RemoteHub
from hub.errors import Refused
from hub.http.access import OPEN, needs
from hub.http.app import create_app
from hub.http.config import RegistryConfig
from hub.keys import SCOPES
from hub.registry import LocalHub
from tests.registries import ADMIN_KEY, READ_KEY, threaded
from tests.unit.hub.makers import write_base, write_lora, write_router

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
# Of one length, so that also the sizes of answers must be equal. A key for team/* sees the third one only, if it were.
HIDDEN, ABSENT, UNKNOWN = "other/hidden", "other/absent", "team/unknown"
VALUES = {"name": "team/legal", "space": "team", "slug": "legal", "revision": "1", "path": "README.md",
          "upload": "0" * 32, "sha256": "0" * 64, "digest": "sha256:" + "0" * 64, "key": "0" * 12}  # fmt: skip
UNLIKE = {"x-request-id", "date"}  # headers that differ in any two answers


@dataclass(frozen=True)
class Operation:
    """One method of one route; `scope` is what its dependency asks for, None when it has none."""

    method: str
    pattern: str
    scope: str | None

    @property
    def path(self) -> str:
        return re.sub(r"{(\w+)(?::path)?}", lambda match: VALUES[match[1]], self.pattern)


def operations() -> list[Operation]:
    """Every method of every route of the app, read from the app itself."""
    with TemporaryDirectory() as home:
        app = create_app(LocalHub(Path(home)), RegistryConfig())
    found = []
    for route in plain(app.routes):
        scope = next((scope_of(one.call) for one in route.dependant.dependencies if scope_of(one.call)), None)
        found += [Operation(method, route.path, scope) for method in sorted(route.methods or ())]
    return found


def plain(routes: Iterable[object]) -> Iterator[APIRoute]:
    """Fails for what is neither a route nor a router: a mounted app, say, would not be asked for keys."""
    for route in routes:
        included = getattr(route, "original_router", None)  # newer versions of the framework keep routers whole
        if included is not None:
            yield from plain(included.routes)
        else:
            assert isinstance(route, APIRoute), route
            yield route


def scope_of(call: object) -> str | None:
    """The scope of a dependency that `needs` has made."""
    if getattr(call, "__qualname__", "") != needs("read").__qualname__:
        return None
    assert inspect.isfunction(call)
    return str(inspect.getclosurevars(call).nonlocals["scope"])


ALL = operations()
CLOSED = [operation for operation in ALL if operation.pattern not in OPEN]
SERVED = {(operation.method, operation.pattern) for operation in ALL}
NOT_SERVED = [
    Operation(method, pattern, None)
    for pattern in sorted({operation.pattern for operation in ALL})
    for method in METHODS
    if (method, pattern) not in SERVED
]


def shown(operation: Operation) -> str:
    return f"{operation.method} {operation.pattern}"


@dataclass(frozen=True)
class Service:
    """A registry with something in it: team/legal@1, and other/hidden@1 with alias prod."""

    client: httpx.Client
    hub: LocalHub
    base: Path
    digest: str
    hidden_digest: str

    def ask(self, method: str, path: str, key: str | None = None, **options: object) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return self.client.request(method, path, headers=headers, **options)  # type: ignore[arg-type]

    def key(self, *scopes: str, names: tuple[str, ...] = ("*",)) -> str:
        return self.hub.keys.create("test", scopes, names=names, actor="test").secret


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("routes")
    base = write_base(root / "base")
    hub = LocalHub(root / "home")
    digest = hub.push(write_lora(root / "one", base), "team/legal").digest
    hidden = hub.push(write_lora(root / "two", base, seed=1), HIDDEN, aliases=["prod"]).digest
    with threaded(hub) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield Service(client, hub, base, digest, hidden)


@pytest.fixture(scope="module")
def made_keys(service: Service) -> dict[str, str]:
    """A key of each scope."""
    return {scope: service.key(scope) for scope in SCOPES}


def error(answer: httpx.Response) -> tuple[int, str]:
    """The status and code of a refusal in our shape."""
    told = answer.json()["error"]
    assert isinstance(told["message"], str) and told["message"]
    return answer.status_code, told["code"]


def test_the_app_has_routes_and_only_these_are_open() -> None:
    assert len(ALL) > 30
    assert {operation.pattern for operation in ALL if operation.pattern in OPEN} == OPEN
    assert {operation.pattern for operation in ALL if operation.scope is None} == OPEN


@pytest.mark.parametrize("operation", CLOSED, ids=shown)
def test_a_closed_route_needs_the_scope_that_it_should(operation: Operation) -> None:
    """A second opinion: whoever adds a route that changes anything says here, too, who may."""
    beyond = {
        "/api/v1/aliases/{name:path}": "promote",
        "/api/v1/rollbacks/{name:path}": "promote",
        "/api/v1/versions/{name:path}": "admin",
        "/api/v1/collect": "admin",
        "/api/v1/keys": "admin",
        "/api/v1/keys/{key}": "admin",
        "/api/v1/uploads": "push",
        "/api/v1/uploads/{upload}": "push",
        "/api/v1/uploads/{upload}/{sha256}": "push",
        "/api/v1/uploads/{upload}/commit": "push",
    }
    assert operation.scope == beyond.get(operation.pattern, "read")
    assert operation.scope != "read" or operation.method in ("GET", "HEAD") or "paths-info" in operation.pattern


@pytest.mark.parametrize("operation", CLOSED, ids=shown)
def test_a_closed_route_answers_nobody(service: Service, operation: Operation) -> None:
    for key in (None, "wrong", "mgk_0123456789ab_" + "A" * 43, READ_KEY + "x"):
        answer = service.ask(operation.method, operation.path, key)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert operation.method == "HEAD" or error(answer) == (401, "unauthorized")


@pytest.mark.parametrize("operation", CLOSED, ids=shown)
def test_a_closed_route_answers_its_own_scope_and_admin_alone(
    service: Service, made_keys: dict[str, str], operation: Operation
) -> None:
    for scope, key in made_keys.items():
        if scope not in (operation.scope, "admin"):
            answer = service.ask(operation.method, operation.path, key)
            assert answer.status_code == 403, scope
            assert operation.method == "HEAD" or error(answer) == (403, "forbidden")
    if not operation.path.endswith("/events"):  # which has no end
        answer = service.ask(operation.method, operation.path, made_keys[operation.scope or ""])
        assert answer.status_code not in (401, 403, 500)


@pytest.mark.parametrize("operation", NOT_SERVED, ids=shown)
def test_a_method_that_a_route_does_not_have_does_nothing(service: Service, operation: Operation) -> None:
    """HEAD too: it is no way around the key of a GET."""
    if operation.pattern not in OPEN:
        assert service.ask(operation.method, operation.path).status_code == 401
    answer = service.ask(operation.method, operation.path, ADMIN_KEY)
    assert answer.status_code in (400, 404, 405), "400: another route, whose words a path may fit"


@pytest.mark.parametrize("path", sorted(OPEN))
def test_what_is_open_tells_nothing_of_adapters_and_keys(service: Service, path: str) -> None:
    answer = service.ask("GET", path)
    assert answer.status_code == 200
    for secret in ("legal", "hidden", "team", service.digest, service.digest[7:19], ADMIN_KEY, "ci"):
        assert not re.search(rf"\b{re.escape(secret)}\b", answer.text), secret


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/api", "/api/v1", "/admin", "/health/", "/health/x",
                                  "//health", "/./health", "/%2e/health", "/metrics/../api/v1/keys", "/HEALTH",
                                  "/health%00", "/health;x", "/version/../api/v1/whoami"])  # fmt: skip
def test_a_path_that_only_looks_open_is_closed(service: Service, path: str) -> None:
    """Sent as it stands: a client would tidy it up."""
    assert raw_status(service.client.base_url, path) == (400 if "%00" in path else 401)


def raw_status(url: httpx.URL, path: str) -> int:
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            return int(answer.readline().split()[1])


NAMED = [
    ("GET", "/api/v1/adapters/{}", {}),
    ("GET", "/api/v1/resolve?ref={}", {}),
    ("GET", "/api/v1/resolve?ref={}@1", {}),
    ("GET", "/api/v1/resolve?ref={}@7", {}),
    ("GET", "/api/v1/resolve?ref={}@prod", {}),
    ("GET", "/api/v1/resolve?ref={}@nowhere", {}),
    ("GET", "/api/v1/resolve?ref={}@sha256:{}", {}),
    ("GET", "/api/v1/log/{}", {}),
    ("GET", "/api/v1/adapters?pattern={}", {}),
    ("GET", "/api/v1/adapters?pattern=other*", {}),
    ("POST", "/api/v1/uploads", {"name": "{}", "files": [{"path": "README.md", "size": 1, "sha256": "0" * 64}]}),
    ("POST", "/api/v1/aliases/{}", {"alias": "prod", "version": 1}),
    ("POST", "/api/v1/aliases/{}", {"alias": "prod", "version": 7, "expect": 3}),
    ("POST", "/api/v1/rollbacks/{}", {"alias": "prod"}),
    ("DELETE", "/api/v1/versions/{}?version=1", {}),
    ("DELETE", "/api/v1/versions/{}?version=7", {}),
    ("GET", "/api/models/{}", {}),
    ("GET", "/api/models/{}/refs", {}),
    ("GET", "/api/models/{}/revision/main", {}),
    ("GET", "/api/models/{}/revision/prod", {}),
    ("GET", "/api/models/{}/revision/nowhere", {}),
    ("GET", "/api/models/{}/tree/1", {}),
    ("POST", "/api/models/{}/paths-info/1", {}),
    ("GET", "/{}/resolve/main/README.md", {}),
    ("HEAD", "/{}/resolve/main/adapter_config.json", {}),
    ("GET", "/{}/resolve/1/adapter_config.json", {}),
    ("GET", "/api/models?author=other", {}),
    ("GET", "/api/models?search={}", {}),
]  # fmt: skip


def told(answer: httpx.Response, *, name: str, digest: str) -> tuple[int, dict[str, str], str]:
    """All of an answer, with what was asked for put aside."""
    headers = {key: value for key, value in answer.headers.items() if key not in UNLIKE}
    every = {key: value.replace(name, "NAME").replace(digest, "DIGEST") for key, value in headers.items()}
    return answer.status_code, every, answer.text.replace(name, "NAME").replace(digest, "DIGEST")


@pytest.mark.parametrize(("method", "path", "body"), NAMED, ids=[f"{method} {path}" for method, path, _ in NAMED])
def test_a_name_that_a_key_does_not_see_is_answered_like_one_that_is_not_there(
    service: Service, method: str, path: str, body: dict[str, object]
) -> None:
    key = service.key(*SCOPES, names=("team/*",))
    answers = []
    for name, digest in ((HIDDEN, service.hidden_digest[7:19]), (ABSENT, "0" * 12), (UNKNOWN, "0" * 12)):
        filled = {
            field: value.replace("{}", name) if isinstance(value, str) else value for field, value in body.items()
        }
        answer = service.ask(method, path.replace("{}", name, 1).replace("{}", digest), key, json=filled or None)
        answers.append(told(answer, name=name, digest=digest))
    assert answers[0] == answers[1]
    assert answers[0] == answers[2] or method not in ("GET", "HEAD"), "under its own names a key may write"
    assert answers[0][0] in ((200, 403, 404) if "?" in path and method == "GET" else (403, 404))
    assert "hidden" not in answers[0][2]


def test_a_repository_called_refs_is_not_given_away(service: Service, tmp_path: Path) -> None:
    """/api/models/a/refs is the repository a/refs or the refs of a."""
    service.hub.push(write_lora(tmp_path / "three", write_base(tmp_path / "base"), seed=2), "secret/refs")
    key = service.key("read", names=("team/*",))
    there, absent = (service.ask("GET", f"/api/models/{space}/refs", key) for space in ("secret", "absent"))
    assert told(there, name="secret", digest="-") == told(absent, name="absent", digest="-")
    assert service.ask("GET", "/api/models/secret/refs", ADMIN_KEY).json()["id"] == "secret/refs"


@pytest.mark.parametrize("path", ["/api/v1/manifests/{}", "/api/v1/files/{}/adapter_config.json"])
def test_a_digest_that_a_key_does_not_see_is_answered_like_one_that_is_not_there(service: Service, path: str) -> None:
    key = service.key("read", names=("team/*",))
    hidden, absent = (
        told(service.ask("GET", path.replace("{}", digest), key), name="-", digest=digest)
        for digest in (service.hidden_digest, "sha256:" + "0" * 64)
    )
    assert hidden == absent
    assert hidden[0] == 404
    assert service.ask("GET", path.replace("{}", service.digest), key).status_code == 200


def test_an_expert_that_a_key_does_not_see_cannot_be_pinned(service: Service, tmp_path: Path) -> None:
    team = RemoteHub(str(service.client.base_url), key=service.key("push", names=("team/*",)))
    words = []
    for number, pin in enumerate((f"{HIDDEN}@{service.hidden_digest}", f"{ABSENT}@{service.hidden_digest}")):
        pins = [f"team/legal@{service.digest}", pin]
        with pytest.raises(Refused) as refusal:
            team.push(write_router(tmp_path / str(number), service.base, pins), "team/router")
        words.append(str(refusal.value).replace(HIDDEN, "NAME").replace(ABSENT, "NAME"))
    assert words[0].partition("@")[2] == words[1].partition("@")[2]
    assert "is not in this hub (there is no adapter NAME)" in words[0]
    team.close()


def test_the_refusal_to_remove_an_expert_names_no_router_that_a_key_does_not_see(
    service: Service, tmp_path: Path
) -> None:
    pins = [f"team/legal@{service.digest}", f"{HIDDEN}@{service.hidden_digest}"]
    service.hub.push(write_router(tmp_path / "r", service.base, pins), "other/router")
    try:
        for key, words in ((ADMIN_KEY, "hub rm other/router@1"), (service.key("admin", names=("team/*",)), "not see")):
            answer = service.ask("DELETE", "/api/v1/versions/team/legal?version=1", key)
            assert error(answer) == (409, "in_use")
            message = answer.json()["error"]["message"]
            assert words in message and ("router@1" in message) == (key == ADMIN_KEY)
    finally:
        service.hub.remove("other/router", 1)


@pytest.mark.parametrize("path", ["/api/v1/adapters", "/api/v1/history?after=0", "/api/models", "/api/v1/whoami",
                                  "/api/whoami-v2", "/openapi.json", "/metrics"])  # fmt: skip
def test_no_listing_speaks_of_what_a_key_does_not_see(service: Service, path: str) -> None:
    answer = service.ask("GET", path, service.key("read", names=("team/*",)))
    assert answer.status_code == 200
    assert HIDDEN not in answer.text
    assert service.hidden_digest[7:19] not in answer.text


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/v1/keys"), ("POST", "/api/v1/keys"),
                                              ("DELETE", "/api/v1/keys/" + "0" * 12),
                                              ("POST", "/api/v1/collect")])  # fmt: skip
def test_a_key_of_some_names_never_acts_on_the_whole_hub(service: Service, method: str, path: str) -> None:
    for names in (("team/*",), ("team/*", "other/*"), ("**",)):
        body = {"name": "x", "scopes": ["admin"]} if method == "POST" and path.endswith("keys") else None
        answer = service.ask(method, path, service.key("admin", names=names), json=body)
        assert error(answer) == (403, "forbidden")


def test_a_push_moves_no_alias_but_latest_without_promote(service: Service) -> None:
    body = {
        "base": {
            "name": "x", "model_type": "llama", "hidden_size": 1, "layers": 1, "heads": 1, "kv_heads": 1,
            "head_dim": 1, "intermediate_size": 1, "vocab_size": 1, "tokenizer": None,
        },
        "modules": {"linears": {}, "others": []},
    }  # fmt: skip
    path = f"/api/v1/uploads/{'0' * 32}/commit"
    for aliases, scopes, expected in (
        (["prod"], ("push",), (403, "forbidden")),
        (["latest", "prod"], ("push", "read"), (403, "forbidden")),
        (["latest"], ("push",), (404, "upload_gone")),
        (["prod"], ("push", "promote"), (404, "upload_gone")),
    ):
        answer = service.ask("POST", path, service.key(*scopes), json={**body, "aliases": aliases})
        assert error(answer) == expected, (aliases, scopes)


def test_no_answer_but_the_first_ever_holds_a_key(service: Service) -> None:
    created = service.ask("POST", "/api/v1/keys", ADMIN_KEY, json={"name": "ci", "scopes": ["read"]})
    assert created.status_code == 201
    secret = created.json()["secret"]
    assert service.ask("GET", "/api/v1/whoami", secret).json()["name"] == "ci"
    for path in ("/api/v1/keys", "/api/v1/whoami", "/metrics"):
        assert secret[17:] not in service.ask("GET", path, ADMIN_KEY).text
    revoked = service.ask("DELETE", f"/api/v1/keys/{created.json()['key']['key']}", ADMIN_KEY)
    assert secret[17:] not in revoked.text
    assert service.ask("GET", "/api/v1/whoami", secret).status_code == 401
