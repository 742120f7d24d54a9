"""Connections under a limit, on real sockets: silence makes room, speech is answered, every wait has an end."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from hub.http.config import RegistryConfig
from hub.http.doorkeeper import guarded
from hub.manifest import WEIGHTS_FILE
from hub.methods import Limits
from hub.registry import LocalHub
from tests.registries import ADMIN_KEY, threaded
from tests.unit.hub.makers import write_base, write_prompt

WAIT_S = 30.0  # for what must come; nothing here is expected to take so long
SOON_S = 0.3  # a limit of the service under test
STALL_S = 2.0  # longer than a reader on a busy machine may pause
NEVER_S = 600.0
LARGE = Limits(max_virtual_tokens=10**6)
KEY = f"authorization: Bearer {ADMIN_KEY}\r\n".encode()
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
REFUSED_WITHOUT_BODY = b"POST /api/v1/collect HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"

Serve = Callable[..., AbstractContextManager["Service"]]


class Service:
    """A registry and raw connections to it."""

    def __init__(self, url: str, hub: LocalHub, stack: ExitStack) -> None:
        self.url = url
        self.hub = hub
        self._stack = stack

    def connect(self, sent: bytes = b"") -> socket.socket:
        address = httpx.URL(self.url)
        connection = self._stack.enter_context(socket.create_connection((address.host, address.port), WAIT_S))
        connection.sendall(sent)
        return connection

    def watch(self) -> socket.socket:
        """A connection that is being answered, and goes on being."""
        watching = self.connect(b"GET /api/v1/events HTTP/1.1\r\nhost: x\r\n" + KEY + b"\r\n")
        assert b": watching" in until(watching, b": watching")
        return watching


@contextmanager
def serving(home: Path, **limits: Any) -> Iterator[Service]:
    chosen = {"header_timeout_s": NEVER_S, "body_timeout_s": NEVER_S, **limits}
    hub = LocalHub(home, limits=LARGE)
    with threaded(hub, RegistryConfig(admin_key=ADMIN_KEY, **chosen)) as url, ExitStack() as stack:
        yield Service(url, hub, stack)


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """A registry with limits that a test chooses; the others never come to act."""
    return partial(serving, tmp_path / "home")


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One whose limits never come to act."""
    with serving(tmp_path_factory.mktemp("patient") / "home") as service:
        yield service


def until(connection: socket.socket, text: bytes) -> bytes:
    """What arrives, up to a text or the end of the connection."""
    found = b""
    while text not in found and (more := receive(connection)):
        found += more
    return found


def receive(connection: socket.socket) -> bytes:
    """What arrives; nothing when the connection has ended, in whatever way."""
    try:
        return connection.recv(65536)
    except ConnectionError:
        return b""


def ended(connection: socket.socket) -> bytes:
    """All that arrives until the other side ends the connection; fails when it does not."""
    found = bytearray()
    while more := receive(connection):
        found += more
    return bytes(found)


def asked(connection: socket.socket, sent: bytes = HEALTH) -> bytes:
    connection.sendall(sent)
    return until(connection, b'{"status":"ok"}')


def is_open(connection: socket.socket) -> bool:
    return b"200 OK" in asked(connection)


@pytest.mark.parametrize("said", [b"", b"G", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
def test_whoever_does_not_say_a_whole_head_is_sent_away(serve: Serve, said: bytes) -> None:
    with serve(header_timeout_s=SOON_S) as service:
        assert ended(service.connect(said)) == b""


def test_a_head_that_drips_is_not_waited_for(serve: Serve) -> None:
    with serve(header_timeout_s=SOON_S) as service:
        connection = service.connect(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):
            while True:
                connection.sendall(b"x: y\r\n")
                connection.settimeout(SOON_S / 10)
                try:
                    assert connection.recv(1) == b""
                    raise ConnectionResetError
                except TimeoutError:
                    continue


def test_half_a_second_request_is_not_waited_for_either(serve: Serve) -> None:
    with serve(header_timeout_s=SOON_S) as service:
        for connection in (service.connect(HEALTH + b"GET /heal"), service.connect(HEALTH)):
            assert b"200 OK" in until(connection, b'{"status":"ok"}')
            connection.sendall(b"GET /heal")
            assert ended(connection) == b""


def test_the_oldest_of_the_silent_makes_room(serve: Serve) -> None:
    with serve(max_connections=3) as service:
        silent = [service.connect() for _ in range(3)]
        assert is_open(silent[1])
        late = service.connect()
        assert is_open(late)
        assert ended(silent[0]) == b""
        assert is_open(silent[1])
        assert is_open(silent[2])


def test_many_silent_connections_push_out_each_other_and_nobody_who_speaks(serve: Serve, adapter: Path) -> None:
    with serve(max_connections=8) as service:
        speaks, watches = service.connect(), service.watch()
        assert is_open(speaks)
        silent = [service.connect(b"GET /" if number % 2 else b"") for number in range(100)]
        assert is_open(speaks)
        while sum(map(is_still_open, silent)) > 8 - 2:
            assert is_open(speaks)
        service.hub.push(adapter, "legal")
        assert b"event: pushed" in until(watches, b"event: pushed"), "the one that is being answered is still there"


def is_still_open(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_whoever_rests_between_two_requests_makes_room_too(serve: Serve) -> None:
    """Without a key, so it must not be a way to keep others out."""
    with serve(max_connections=3) as service:
        resting = [service.connect() for _ in range(3)]
        assert all(is_open(connection) for connection in resting)
        assert is_open(service.connect())
        assert ended(resting[0]) == b""
        assert is_open(resting[1])
        assert is_open(resting[2])


def test_those_who_are_silent_make_room_before_those_who_rest(serve: Serve) -> None:
    with serve(max_connections=3) as service:
        resting = service.connect()
        assert is_open(resting)
        silent = [service.connect() for _ in range(2)]
        for _ in range(4):
            service.connect()
        assert is_open(resting)
        assert [ended(connection) for connection in silent] == [b"", b""]


def test_when_all_are_being_answered_a_new_one_is_told_so(serve: Serve, adapter: Path) -> None:
    with serve(max_connections=2) as service:
        watching = [service.watch() for _ in range(2)]
        answer = ended(service.connect())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in head
        assert f"content-length: {len(body)}".encode() in head
        assert json.loads(body) == {"error": {"code": "hub_unavailable", "message": "too many connections"}}
        service.hub.push(adapter, "legal")
        assert all(b"event: pushed" in until(connection, b"event: pushed") for connection in watching)


def test_whoever_goes_on_sending_after_the_answer_is_sent_away(serve: Serve) -> None:
    """A body without end to a route that was refused needs no key, so it must not hold a place."""
    with serve(header_timeout_s=SOON_S) as service:
        connection = service.connect(REFUSED_WITHOUT_BODY)
        assert b"401 Unauthorized" in until(connection, b"}}")
        with pytest.raises(OSError):
            while True:
                connection.sendall(b"5\r\nhello\r\n")


def test_whoever_goes_on_sending_after_the_answer_makes_room(serve: Serve) -> None:
    with serve(max_connections=2) as service:
        endless = [service.connect(REFUSED_WITHOUT_BODY) for _ in range(2)]
        for connection in endless:
            assert b"401 Unauthorized" in until(connection, b"}}")
            connection.sendall(b"5\r\nhello\r\n")
        assert is_open(service.connect())


def test_a_body_that_ends_after_the_answer_leaves_the_connection_usable(patient: Service) -> None:
    connection = patient.connect(REFUSED_WITHOUT_BODY)
    assert b"401 Unauthorized" in until(connection, b"}}")
    connection.sendall(b"5\r\nhello\r\n0\r\n\r\n")
    assert is_open(connection)


def test_whoever_does_not_take_the_answer_is_sent_away(serve: Serve, tmp_path: Path) -> None:
    """The answer is larger than what the buffers on the way hold. Whoever takes it gets it."""
    folder = write_prompt(tmp_path / "large", write_base(tmp_path / "base"), tokens=100_000)
    size = (folder / WEIGHTS_FILE).stat().st_size
    digest = LocalHub(tmp_path / "home", limits=LARGE).push(folder, "legal").digest
    asking = f"GET /api/v1/files/{digest}/{WEIGHTS_FILE} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n".encode() + KEY
    with serve(body_timeout_s=STALL_S) as service, httpx.Client(base_url=service.url) as client:
        stalled, taking = service.connect(asking + b"\r\n"), service.connect(asking + b"\r\n")
        assert len(ended(taking)) > size
        while 'route="/api/v1/files/{digest}/{path}",status="200"} 2.0' not in scrape(client):
            continue  # an answer is counted when it ends
        assert len(ended(stalled)) < size


def scrape(client: httpx.Client) -> str:
    return client.get("/metrics").text.replace('method="GET",', "")


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS, to a port that speaks none
        b"EHLO mail.example\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health HTTP/9.9\r\nhost: x\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
        b"GET /hea lth HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nna me: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: \0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: " + b"y" * (1 << 20) + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * 100_000 + b"\r\n",
        b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\0" * 100,
        b"\r\n" * 100_000,
    ],
)
def test_what_is_no_http_is_told_so_in_our_words_and_the_connection_ends(patient: Service, said: bytes) -> None:
    connection = patient.connect()
    try:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
    except ConnectionError:
        pass  # it was sent away before it had said everything
    answer = ended(connection)
    if answer:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["code"] == "bad_request"
    assert is_open(patient.connect())


def test_a_refusal_is_read_by_whoever_is_still_sending(patient: Service) -> None:
    connection = patient.connect(b"no http at all\r\n\r\n")
    connection.sendall(b"x" * 100_000)
    assert b"this is no HTTP request" in until(connection, b"}}")
    assert ended(connection) == b""


def test_nonsense_after_an_answer_ends_the_connection_without_a_second_answer(patient: Service) -> None:
    connection = patient.connect(REFUSED_WITHOUT_BODY)
    assert b"401 Unauthorized" in until(connection, b"}}")
    connection.sendall(b"no chunk\r\n")
    assert ended(connection) == b""


def test_nonsense_in_a_body_that_is_being_read_is_answered_once(patient: Service) -> None:
    head = b"POST /api/v1/keys HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + KEY
    connection = patient.connect(head + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\nno chunk\r\n")
    answer = ended(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_an_answer_leaves_at_once_and_waits_for_no_acknowledgement() -> None:
    """Nagle's algorithm off: head and body of an answer are two packets."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("nobody asks")

    async def options() -> list[int]:
        loop, state = asyncio.get_running_loop(), ServerState()
        config = uvicorn.Config(app, lifespan="off")
        config.load()
        kind: Any = guarded(max_connections=9, header_timeout_s=NEVER_S)
        listening = config_socket()
        server = await loop.create_server(lambda: kind(config=config, server_state=state, app_state={}), sock=listening)
        async with server:
            _, writer = await asyncio.open_connection(*listening.getsockname())
            while not state.connections:
                await asyncio.sleep(0)
            found = [
                one.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                for one in state.connections
            ]
            writer.close()
            return found

    assert asyncio.run(options()) == [1]


def config_socket() -> socket.socket:
    """A listening socket as uvicorn makes it: of no named protocol."""
    listening = socket.socket(family=socket.AF_INET)
    listening.bind(("127.0.0.1", 0))
    return listening
