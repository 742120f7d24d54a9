"""The outermost ring: heads and bodies under limits, an answer in our words even to our own bugs, and counts."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hub.errors import HubUnavailable, InUse
from hub.http.access import Access
from hub.http.config import RegistryConfig
from hub.http.edge import MAX_HEAD_BYTES, SMALL_BODY_BYTES, Edge
from hub.http.metrics import RegistryMetrics
from hub.http.strict import MAX_VALUES
from hub.registry import LocalHub
from hub.strict_json import MAX_DEPTH
from tests.registries import ADMIN_KEY, READ_KEY, threaded

ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
UPLOAD = "/api/v1/uploads/" + "0" * 32
SECRET = "a secret of our insides"
SOON_S = 0.2


@pytest.fixture
def hub(tmp_path: Path) -> LocalHub:
    return LocalHub(tmp_path / "home")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A whole registry."""
    hub = LocalHub(tmp_path_factory.mktemp("edge") / "home")
    with threaded(hub) as url, httpx.Client(base_url=url, headers=ADMIN, timeout=30) as client:
        yield client


def error(answer: httpx.Response) -> tuple[int, str, str]:
    told = answer.json()["error"]
    return answer.status_code, told["code"], told["message"]


def through(
    hub: LocalHub, app: Callable[[Request], Awaitable[Response]], request: httpx.Request, **limits: Any
) -> httpx.Response:
    """The answer of the ring around a small app of the test's own."""

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        answer = await app(Request(scope, receive))
        await answer(scope, receive, send)

    config = RegistryConfig(admin_key=ADMIN_KEY, **limits)
    edge = Edge(inner, Access(hub.keys, config), config, RegistryMetrics())

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(edge, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://registry", headers=ADMIN) as client:
            request.headers.update(ADMIN)
            return await client.send(request)

    return asyncio.run(ask())


async def echo(request: Request) -> Response:
    return JSONResponse({"bytes": len(await request.body()), "name": request.state.principal.name})


def get(path: str = "/x") -> httpx.Request:
    return httpx.Request("GET", f"http://registry{path}")


def post(path: str, content: Any) -> httpx.Request:
    return httpx.Request("POST", f"http://registry{path}", content=content)


def test_what_is_behind_the_ring_knows_who_asks(hub: LocalHub) -> None:
    assert through(hub, echo, post("/x", b"12345")).json() == {"bytes": 5, "name": "admin"}


def test_a_bug_of_ours_tells_the_request_and_nothing_of_our_insides(
    hub: LocalHub, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(request: Request) -> Response:
        raise ZeroDivisionError(SECRET)

    request = get()
    request.headers["x-request-id"] = "ask-7"
    answer = through(hub, broken, request)
    assert error(answer) == (500, "internal_error", "internal error; quote the request id ask-7")
    assert SECRET not in answer.text
    assert "request ask-7 failed" in caplog.text
    assert SECRET in caplog.text


def test_an_error_of_the_hub_is_told_as_it_is(hub: LocalHub) -> None:
    async def busy(request: Request) -> Response:
        raise HubUnavailable("the disk is full")

    answer = through(hub, busy, get())
    assert error(answer) == (503, "hub_unavailable", "the disk is full")
    assert answer.headers["retry-after"].isdecimal()


def test_an_error_after_the_first_byte_only_breaks_the_connection(hub: LocalHub) -> None:
    async def breaking(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"a beginning"
            raise InUse(SECRET)

        return StreamingResponse(pieces())

    answer = through(hub, breaking, get())
    assert SECRET not in answer.text


def test_a_body_that_stops_arriving_is_not_waited_for(hub: LocalHub) -> None:
    async def stopping() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    answer = through(hub, echo, post("/x", stopping()), body_timeout_s=SOON_S)
    assert error(answer) == (400, "bad_request", "nothing more of the body arrived within 0.2 s")


@pytest.mark.parametrize(("given", "kept"), [("ask-7", True), ("a" * 128, True), ("a" * 129, False), ("", False),
                                             ("a b", False), ("-x", False), ("é", False)])  # fmt: skip
def test_a_request_has_an_id_its_own_or_one_of_ours(client: httpx.Client, given: str, kept: bool) -> None:
    answer = client.get("/health", headers=[(b"x-request-id", given.encode())])
    assert (answer.headers["x-request-id"] == given) == kept
    assert kept or re.fullmatch(r"req-[0-9a-f]{32}", answer.headers["x-request-id"])


def pieces(size: int) -> Iterator[bytes]:
    """A body whose length is not told before."""
    for start in range(0, size, 1 << 16):
        yield b" " * min(1 << 16, size - start)


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/api/v1/keys", SMALL_BODY_BYTES), ("/api/v1/uploads", SMALL_BODY_BYTES), ("/nowhere", SMALL_BODY_BYTES),
     (f"{UPLOAD}/commit", 16 << 20)],
)  # fmt: skip
def test_a_body_is_no_larger_than_its_route_needs(client: httpx.Client, path: str, limit: int) -> None:
    declared = client.post(path, content=b" " * (limit + 1), headers={"content-type": "application/json"})
    assert error(declared) == (413, "too_large", f"a body of {limit + 1} bytes is above the limit of {limit}")
    if path != "/nowhere":  # where no body is read
        told = client.post(path, content=pieces(limit + 1), headers={"content-type": "application/json"})
        assert error(told) == (413, "too_large", f"the body is above the limit of {limit} bytes")
    within = client.post(path, content=b" " * limit, headers={"content-type": "application/json"})
    assert within.status_code in (400, 404)


def test_a_smaller_limit_of_the_operator_holds_everywhere(hub: LocalHub) -> None:
    for path in ("/x", f"{UPLOAD}/commit"):
        answer = through(hub, echo, post(path, b"x" * 11), max_body_bytes=10)
        assert error(answer) == (413, "too_large", "a body of 11 bytes is above the limit of 10")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "nonsense"])
def test_a_body_that_would_have_to_be_unpacked_is_refused_unread(client: httpx.Client, encoding: str) -> None:
    for method, path in (("POST", "/api/v1/keys"), ("PATCH", f"{UPLOAD}/{'0' * 64}"), ("GET", "/health")):
        answer = client.request(method, path, content=b"\x1f\x8b", headers={"content-encoding": encoding})
        assert error(answer)[:2] == (400, "bad_request")


@pytest.mark.parametrize(
    "head",
    [
        {"transfer-encoding": "chunked", "content-length": "5"},
        {"x-large": "x" * MAX_HEAD_BYTES},
        {f"x-{number}": "y" * 100 for number in range(MAX_HEAD_BYTES // 100)},
    ],
)
def test_a_head_that_is_not_trusted_is_refused_and_the_connection_ends(hub: LocalHub, head: dict[str, str]) -> None:
    for path in ("/x", "/health"):
        request = httpx.Request("POST", f"http://registry{path}", headers=head, content=b"")
        request.headers = httpx.Headers({"host": "x", **head})
        answer = through(hub, echo, request)
        assert error(answer)[:2] == (400, "bad_request")
        assert answer.headers["connection"] == "close"


JSON = [
    (b"", "name: Field required|body: Field required|no usable JSON"),
    (b"[]", "not a list"),
    (b'"name"', "not '.name.'"),
    (b"null", "body: "),
    (b'{"name": "x", "name": "y", "scopes": ["read"]}', "'name' stands twice in one object"),
    (b'{"name": ' + b"[" * 900 + b"]" * 900 + b"}", f"nested too deeply: more than {MAX_DEPTH} levels"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"a":' * 30_000, "nested too deeply"),
    (b'{"name": ' + b"9" * 5000 + b"}", "too many digits"),
    (b'{"name": "x", "scopes": ["read"], "life_s": 1e999}', "not finite"),
    (b'{"name": "x", "scopes": ["read"], "life_s": NaN}', "NaN is no JSON number"),
    (b'{"name": "x", "scopes": ["read"], "life_s": 1e300}', "life_s: "),
    (b'{"name": "\\ud800", "scopes": ["read"]}', "half of a surrogate pair"),
    (b'{"name": "\xff", "scopes": ["read"]}', "is not UTF-8"),
    (b"\xef\xbb\xbf{}", "no usable JSON"),
    (b'{"name": "x"', "no usable JSON"),
    (b'{"name": 7, "scopes": ["read"]}', "name: Input should be a valid string, not 7"),
    (b'{"name": "x", "scopes": "read"}', "scopes: "),
    (b'{"name": "x", "scopes": [], "extra": 1}', "extra is no field here; there are name, scopes, names, life_s"),
    (b'{"name": "x", "scopes": [], "' + b"k" * 100_000 + b'": 1}', "is no field here"),
    (b"{" + b",".join(b'"%d":1' % number for number in range(20_000)) + b"}", "'?0'? is no field here|0 is no field"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), JSON, ids=range(len(JSON)))
def test_a_body_that_two_readers_could_understand_differently_is_refused(
    client: httpx.Client, body: bytes, reason: str
) -> None:
    answer = client.post("/api/v1/keys", content=body, headers={"content-type": "application/json"})
    status, code, message = error(answer)
    assert (status, code) == (400, "bad_request")
    assert re.search(reason, message), message
    assert len(answer.content) < 1000, "a refusal is no echo"


def test_a_body_of_another_type_is_no_json(client: httpx.Client) -> None:
    body = json.dumps({"name": "x", "scopes": ["read"]})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/xml", ""):
        answer = client.post("/api/v1/keys", content=body, headers={"content-type": kind})
        assert error(answer)[2].endswith("not a body without content-type: application/json")


def test_a_body_of_too_many_values_is_refused_before_it_is_read(client: httpx.Client) -> None:
    for value in (b"1", b"[]", b"{}"):
        body = b"[" + b",".join([value] * (MAX_VALUES + 1)) + b"]"
        answer = client.post(f"{UPLOAD}/commit", content=body, headers={"content-type": "application/json"})
        assert re.search(rf"some \d+ values, above the limit of {MAX_VALUES}", error(answer)[2])


@pytest.mark.parametrize("path", ["/api/v1/history?after=-1", "/api/v1/history?after=x", "/api/v1/history?after=1e3",
                                  "/api/v1/history", "/api/v1/history?after=" + "9" * 5000,
                                  "/api/v1/resolve?ref=" + "x" * 5000, "/api/v1/resolve",
                                  "/api/v1/events?after=9007199254740992", "/api/models?limit=0"])  # fmt: skip
def test_a_parameter_that_makes_no_sense_is_named(client: httpx.Client, path: str) -> None:
    status, code, message = error(client.get(path))
    assert (status, code) == (400, "bad_request")
    assert message.split(":")[0] in ("after", "ref", "limit")
    assert len(message) < 500


def test_the_words_of_a_missing_route_are_ours(client: httpx.Client) -> None:
    assert error(client.get("/nowhere"))[:2] == (404, "not_found")
    answer = client.delete("/api/v1/adapters")
    assert error(answer)[:2] == (405, "bad_request")
    assert answer.headers["allow"] == "GET"


def test_what_is_counted_stays_few_however_many_paths_are_asked_for(client: httpx.Client) -> None:
    for number in range(50):
        client.get(f"/nowhere/{number}")
        client.get(f"/api/v1/adapters/a{number}")
        client.get(f"/api/v1/adapters/a{number}", headers={"authorization": f"Bearer {number}"})
        client.request(f"METHOD{number}", "/health")
    counted = [line for line in client.get("/metrics").text.splitlines() if "requests_total{" in line]
    assert any('route="/api/v1/adapters/{name:path}"' in line for line in counted)
    assert not any(re.search(r"nowhere|a1|METHOD", line) for line in counted)


def test_an_answer_never_says_where_the_hub_lies(client: httpx.Client) -> None:
    for path in ("/api/v1/adapters/..%2f..%2fetc", "/api/v1/files/x/y", "/api/v1/keys/..", "/api/models/x"):
        assert "/home" not in client.get(path).text


def test_a_read_key_is_not_an_admin_key(client: httpx.Client) -> None:
    answer = client.post("/api/v1/keys", json={"name": "x", "scopes": ["admin"]},
                         headers={"authorization": f"Bearer {READ_KEY}"})  # fmt: skip
    assert error(answer) == (403, "forbidden", "this needs the scope admin; key reader has read")
