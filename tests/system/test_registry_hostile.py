"""`hub registry` as a process, under everything that a hostile or careless client can say to it.

After each attack: every answer was a 4xx in our words (or the connection ended, for what is no HTTP), the home holds
what it held before, a steady client beside it was served without one failure, and the process's memory stayed bounded.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import itertools
import json
import re
import resource
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest

from hub.digest import sha256_of
from hub.http.pieces import BUFFER_BYTES
from hub.manifest import CONFIG_FILE, METRICS_FILE, README_FILE, WEIGHTS_FILE
from hub.registry import LocalHub
from hub.validate import config_bytes, describe, validate
from hub.wire import commit_body
from tests.registries import ADMIN_KEY, Registry, running
from tests.unit.hub.makers import raw_safetensors, write_base, write_lora

WAIT_S = 60.0
PAUSE_S = 0.1  # of the steady client between two rounds, unless somebody waits for one
BODY_TIMEOUT_S = 1.0
HEADER_TIMEOUT_S = 2.0
PIPELINED = 100
CONNECTIONS = 10_000
SPARE_FILES = 500  # that this process needs beside its connections
FEWEST_CONNECTIONS = 2000  # more than the registry allows at once
BOMB_BYTES = 16 << 20  # the largest body that a route takes
HEADER_BYTES = 99_000_000
LONGEST_MESSAGE = 4096
# What the process may need beyond what it had before any attack. A body of 16 MB may become ten times as much while it
# is read, and not all of that is given back.
GROWTH_BYTES = 512 << 20
SENDERS = 64  # whose bodies together are twice that

TEXT = b"a readme\n" * 100
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
JSON = {"content-type": "application/json"}
KEY = f"authorization: Bearer {ADMIN_KEY}\r\n".encode()
UPLOAD = "/api/v1/uploads/" + "0" * 32


class Steady(threading.Thread):
    """A client that asks and fetches all the while, on one connection, and tries nothing twice."""

    def __init__(self, url: str, digest: str, weights: bytes) -> None:
        super().__init__(daemon=True)
        self._url, self._digest, self._weights = url, digest, weights
        self._stopping = threading.Event()
        self._hurried = threading.Event()
        self._moved = threading.Condition()
        self.served = 0
        self.failures: list[str] = []

    def run(self) -> None:
        path = f"/api/v1/files/{self._digest}/{WEIGHTS_FILE}"
        with httpx.Client(base_url=self._url, headers=ADMIN, timeout=WAIT_S, verify=False) as client:
            while not self._stopping.is_set():
                self._hurried.wait(PAUSE_S)
                try:
                    found = client.get("/api/v1/resolve", params={"ref": "team/legal@prod"})
                    if (found.status_code, found.json().get("digest")) != (200, self._digest):
                        self.failures.append(found.text)
                    if client.get(path).content != self._weights:
                        self.failures.append("other bytes")
                except (httpx.HTTPError, ValueError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                with self._moved:
                    self.served += 1
                    self._moved.notify_all()

    def is_served_again(self) -> None:
        """Wait until a round that begins now has ended."""
        self._hurried.set()
        with self._moved:
            wanted = self.served + 2
            assert self._moved.wait_for(lambda: self.served >= wanted, WAIT_S), "the steady client is not served"
        self._hurried.clear()

    def stop(self) -> None:
        self._stopping.set()
        self.join(WAIT_S)


@dataclass
class Target:
    """The registry under attack."""

    registry: Registry
    steady: Steady
    folder: Path
    keys: dict[str, str] = field(default_factory=dict)
    had: int = 0  # memory, before any attack

    @property
    def home(self) -> Path:
        return self.registry.home

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.registry.port

    def client(self, key: str = ADMIN_KEY) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.registry.url, headers=headers, timeout=WAIT_S, verify=False)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.request(method, path, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, WAIT_S)

    def say(self, said: bytes) -> bytes:
        """Everything that is answered until the registry ends the connection."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(said)
            return heard(connection)

    def say_and_ask(self, said: bytes) -> bytes:
        """What is answered before a last request on the same connection, which is answered too."""
        answered = self.say(said + b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        before, last, _ = answered.rpartition(b"HTTP/1.1 200 OK")
        assert last, answered
        return before

    def stored(self) -> tuple[dict[str, int], dict[str, list[Any]]]:
        """Every file but the database's own, with its size, and every row but those that expire by themselves."""
        files = {
            str(path.relative_to(self.home)): path.stat().st_size
            for path in self.home.rglob("*")
            if path.is_file() and not path.name.startswith("catalogue.sqlite")
        }
        with contextlib.closing(sqlite3.connect(f"file:{self.home}/catalogue.sqlite?mode=ro", uri=True)) as database:
            tables = ("manifests", "files", "versions", "aliases", "events", "keys")
            rows = {table: database.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in tables}
        return files, rows

    def log(self) -> str:
        return (self.home.parent / f"{self.home.name}.registry.log").read_text()

    def peak(self) -> int:
        """The most memory that the process has had since `forget_peak`. Units: bytes."""
        assert self.registry.process is not None
        status = Path(f"/proc/{self.registry.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) << 10

    def forget_peak(self) -> None:
        assert self.registry.process is not None
        Path(f"/proc/{self.registry.process.pid}/clear_refs").write_text("5")

    def memory(self) -> int:
        assert self.registry.process is not None
        return int(psutil.Process(self.registry.process.pid).memory_info().rss)


def heard(connection: socket.socket) -> bytes:
    found = bytearray()
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(1 << 16):
            found += more
    return bytes(found)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    root = tmp_path_factory.mktemp("hostile")
    base = write_base(root / "base")
    folder = write_lora(root / "adapter", base)
    hub = LocalHub(root / "home")
    digest = hub.push(folder, "team/legal", aliases=["prod"]).digest
    hub.push(write_lora(root / "other", base, seed=1), "other/secret", aliases=["prod"])
    keys = {
        "team": hub.keys.create("team", ["read", "push", "promote"], names=["team/*"], actor="test").secret,
        "pusher": hub.keys.create("pusher", ["push"], actor="test").secret,
        "reader": hub.keys.create("reader", ["read"], actor="test").secret,
    }
    options = ("--body-timeout", str(BODY_TIMEOUT_S), "--header-timeout", str(HEADER_TIMEOUT_S), "--collect", "0")
    with running(hub.home, *options) as registry:
        steady = Steady(registry.url, digest, (folder / WEIGHTS_FILE).read_bytes())
        steady.start()
        target = Target(registry, steady, folder, keys)
        steady.is_served_again()
        target.had = target.memory()
        yield target
        steady.stop()


@pytest.fixture(autouse=True)
def unharmed(target: Target) -> Iterator[None]:
    """What holds after every test of this file."""
    before, logged = target.stored(), len(target.log())
    target.steady.is_served_again()
    target.forget_peak()
    yield
    target.steady.is_served_again()
    assert target.steady.failures == []
    grown = target.peak() - target.had
    assert grown < GROWTH_BYTES, f"grown by {grown >> 20} MB"
    target.ask("POST", "/api/v1/collect").raise_for_status()
    assert target.stored() == before
    assert "Traceback" not in target.log()[logged:]


def refused(status: int, body: bytes, what: object = "") -> str:
    """The message of a 4xx in our shape."""
    assert 400 <= status < 500, (what, status, body[:500])
    told = json.loads(body)["error"]
    assert set(told) >= {"code", "message"}, what
    assert 0 < len(told["message"]) <= LONGEST_MESSAGE, what
    for inside in ("Traceback", "site-packages", ".py", "sqlite", "/home"):
        assert inside not in told["message"].replace("/home/x", ""), (what, told["message"])
    return str(told["message"])


def refusal(answer: httpx.Response) -> str:
    return refused(answer.status_code, answer.content, answer.request.url)


def first_refusal(said: bytes) -> str:
    """The message of the one refusal that a raw conversation consists of."""
    assert said.count(b"HTTP/1.1 ") == 1, said
    head, _, body = said.partition(b"\r\n\r\n")
    return refused(int(head.split()[1]), body, said)


# Nothing of this is a name, a version, an alias, a digest, a file, a key or an upload.
PATHS = [
    "..", "../..", "../../../../etc/passwd", "/etc/passwd", "//etc/passwd", "team/../other/secret", "./team/legal",
    "team/./legal", "team//legal", "~root", "..\\..\\windows", "C:\\x", "file:///etc/passwd", "http://evil.example/x",
    "a\0b", "\0", "team/legal\0", "team/legal\n", " team/legal", "team\tlegal", "\u202e", "\u00e9", "\ud83d\ude00",
    "%2e%2e%2f", "%252e%252e", "x" * 5000, ".hidden", "-rf", "$(id)", "`id`", "{{7*7}}", "' OR '1'='1", "<script>",
    "team/legal@prod@prod", "sha256:..", "NUL\\", "a/b/c/d",
]  # fmt: skip


def quoted(value: str) -> list[str]:
    """A value in a path: percent-encoded; what climbs or stands for itself also twice so, and as it is."""
    once = quote(value, safe="", errors="surrogatepass")
    return [once, quote(once, safe=""), value] if value.startswith(("..", "/", "./")) else [once]


ROUTES = [
    ("GET", "/api/v1/adapters/{}"),
    ("GET", "/api/v1/log/{}"),
    ("POST", "/api/v1/aliases/{}"),
    ("POST", "/api/v1/rollbacks/{}"),
    ("DELETE", "/api/v1/versions/{}?version=1"),
    ("GET", "/api/v1/manifests/{}"),
    ("GET", "/api/v1/files/{}/README.md"),
    ("GET", "/api/v1/files/DIGEST/{}"),
    ("DELETE", "/api/v1/keys/{}"),
    ("GET", "/api/v1/uploads/{}"),
    ("POST", "/api/v1/uploads/{}/commit"),
    ("PATCH", "/api/v1/uploads/{}/" + "0" * 64),
    ("PATCH", UPLOAD + "/{}"),
    ("GET", "/api/models/{}/legal"),
    ("GET", "/api/models/team/{}"),
    ("GET", "/api/models/{}/revision/main"),
    ("GET", "/api/models/team/legal/revision/{}"),
    ("GET", "/api/models/team/legal/tree/{}"),
    ("POST", "/api/models/team/legal/paths-info/{}"),
    ("GET", "/{}/legal/resolve/main/README.md"),
    ("GET", "/team/{}/resolve/main/README.md"),
    ("GET", "/team/legal/resolve/{}/adapter_config.json"),
    ("GET", "/team/legal/resolve/main/{}"),
    ("GET", "/{}"),
    ("GET", "/api/v1/{}"),
]


def test_what_is_no_name_in_a_path_is_refused(target: Target) -> None:
    digest = target.ask("GET", "/api/v1/resolve?ref=team/legal").json()["digest"]
    connection = http.client.HTTPConnection(*target.address, timeout=WAIT_S)  # which sends a path as it stands
    for method, route in ROUTES:
        for form in itertools.chain.from_iterable(map(quoted, PATHS)):
            path = route.replace("{}", form).replace("DIGEST", digest)
            headers = {**ADMIN, **JSON, "upload-offset": "0"}
            connection.request(method, path, b"{}" if method == "POST" else None, headers)
            answer = connection.getresponse()
            refused(answer.status, answer.read(), (method, path[:200]))
    connection.close()


def test_what_is_no_name_in_a_query_is_refused_or_fits_nothing(target: Target) -> None:
    with target.client() as client:
        for value in PATHS:
            text = value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
            for ref in (text, f"team/legal@{text}", f"team/legal@sha256:{text}"):
                refusal(client.get("/api/v1/resolve", params={"ref": ref}))
            refusal(client.get("/api/v1/resolve", params={"ref": "team/legal", "default_alias": text}))
            refusal(client.get("/api/v1/history", params={"after": text}))
            refusal(client.get("/api/v1/events", params={"after": text}))
            refusal(client.delete("/api/v1/versions/team/legal", params={"version": text}))
            for path, name in (("/api/v1/adapters", "pattern"), ("/api/models", "search"), ("/api/models", "author")):
                answer = client.get(path, params={name: text[:128]})
                assert answer.json() == [] if answer.status_code == 200 else refusal(answer)


BEGIN = {"name": "team/x", "files": [{"path": README_FILE, "size": len(TEXT), "sha256": sha256_of(TEXT)}]}
BODIES: list[tuple[str, Any, Sequence[str | int]]] = [
    ("/api/v1/uploads", BEGIN, ["name"]),
    ("/api/v1/uploads", BEGIN, ["files", 0, "path"]),
    ("/api/v1/uploads", BEGIN, ["files", 0, "sha256"]),
    ("/api/v1/uploads", BEGIN, ["files", 0, "size"]),
    ("/api/v1/aliases/team/legal", {"alias": "x", "version": 1}, ["alias"]),
    ("/api/v1/aliases/team/legal", {"alias": "x", "version": 1}, ["version"]),
    ("/api/v1/aliases/team/legal", {"alias": "x", "version": 1, "expect": 0}, ["expect"]),
    ("/api/v1/rollbacks/team/legal", {"alias": "x"}, ["alias"]),
    ("/api/v1/keys", {"name": "x", "scopes": ["read"], "names": ["x"]}, ["name"]),
    ("/api/v1/keys", {"name": "x", "scopes": ["read"], "names": ["x"]}, ["scopes", 0]),
    ("/api/v1/keys", {"name": "x", "scopes": ["read"], "names": ["x"]}, ["names", 0]),
    ("/api/v1/keys", {"name": "x", "scopes": ["read"], "names": ["x"], "life_s": 1}, ["life_s"]),
]


def test_what_is_no_name_in_a_body_is_refused(target: Target) -> None:
    strange = [[], {}, True, -1, 2**63, 10**400, ["../x"], {"../x": 1}]
    with target.client() as client:
        for (path, body, where), value in itertools.product(BODIES, [*PATHS, *strange]):
            changed = json.loads(json.dumps(body))
            place = changed
            for step in where[:-1]:
                place = place[step]
            place[where[-1]] = value
            content = json.dumps(changed)
            refusal(client.post(path, content=content, headers=JSON))


def test_no_header_is_taken_for_a_path(target: Target) -> None:
    connection = http.client.HTTPConnection(*target.address, timeout=WAIT_S)
    for name, method, path in (
        ("upload-offset", "PATCH", f"{UPLOAD}/{'0' * 64}"),
        ("last-event-id", "GET", "/api/v1/events"),
        *(
            (name, "GET", "/api/v1/head")
            for name in ("range", "x-request-id", "host", "cookie", "x-forwarded-for", "content-type", "if-none-match")
        ),
    ):
        for value in ("../../etc/passwd", "/etc/passwd", "..%2f..%2f", "\u00e9", "x" * 5000, "{{7*7}}"):
            connection.request(method, path, b"" if method == "PATCH" else None, {**ADMIN, name: value})
            answer = connection.getresponse()
            body = answer.read()
            if path == "/api/v1/head":
                assert (answer.status, body) == (200, b"6")
            else:
                refused(answer.status, body, (name, value))
            assert value not in answer.headers.values()
    connection.close()


def test_a_key_does_nothing_under_names_that_are_not_its_own(target: Target) -> None:
    with target.client(target.keys["team"]) as client:
        for method, path, body in (
            ("GET", "/api/v1/adapters/other/secret", None),
            ("GET", "/api/v1/resolve?ref=other/secret@prod", None),
            ("GET", "/api/v1/log/other/secret", None),
            ("GET", "/other/secret/resolve/main/adapter_config.json", None),
            ("POST", "/api/v1/uploads", {**BEGIN, "name": "other/secret"}),
            ("POST", "/api/v1/uploads", {**BEGIN, "name": "team"}),
            ("POST", "/api/v1/aliases/other/secret", {"alias": "prod", "version": 1}),
            ("POST", "/api/v1/rollbacks/other/secret", {"alias": "prod"}),
            ("DELETE", "/api/v1/versions/other/secret?version=1", None),
            ("DELETE", "/api/v1/versions/team/legal?version=1", None),
            ("POST", "/api/v1/collect", None),
            ("GET", "/api/v1/keys", None),
            ("POST", "/api/v1/keys", {"name": "x", "scopes": ["admin"]}),
        ):
            answer = client.request(method, path, json=body) if body else client.request(method, path)
            assert answer.status_code in (403, 404)
            refusal(answer)


def test_another_keys_upload_is_out_of_reach(target: Target) -> None:
    begun = target.ask("POST", "/api/v1/uploads", json=BEGIN).json()["upload"]
    piece = f"/api/v1/uploads/{begun}/{sha256_of(TEXT)}"
    for key in ("team", "pusher"):
        with target.client(target.keys[key]) as client:
            for answer in (
                client.get(f"/api/v1/uploads/{begun}"),
                client.patch(piece, content=TEXT, headers={"upload-offset": "0"}),
                client.post(f"/api/v1/uploads/{begun}/commit", json=committed(target)),
            ):
                assert answer.status_code == 404
                assert "there is no upload" in refusal(answer)


def committed(target: Target) -> dict[str, Any]:
    """A good commit's body."""
    return commit_body(*describe(target.folder, base=None), aliases=[], note="")


def begin(client: httpx.Client, *files: tuple[str, int, str]) -> str:
    listed = [{"path": path, "size": size, "sha256": sha256} for path, size, sha256 in files]
    answer = client.post("/api/v1/uploads", json={"name": "team/x", "files": listed})
    answer.raise_for_status()
    return f"/api/v1/uploads/{answer.json()['upload']}"


def test_bytes_that_are_not_what_was_announced_leave_nothing(target: Target) -> None:
    right = sha256_of(TEXT)
    with target.client() as client:
        upload = begin(client, (README_FILE, len(TEXT), right))
        for content, offset, status in (
            (TEXT[:-1] + b"!", 0, 400),  # another digest
            (TEXT + b"!", 0, 400),  # more
            (iter([TEXT, TEXT]), 0, 400),  # more, without a length
            (TEXT * 5000, 0, 400),  # very much more
            (TEXT, 1, 409),  # elsewhere
            (TEXT, 10**15, 409),
            (TEXT, 2**63, 400),
        ):
            headers = {"upload-offset": str(offset)}
            answer = client.patch(f"{upload}/{right}", content=content, headers=headers)
            assert answer.status_code == status
            refusal(answer)
        answer = client.patch(f"{upload}/{'0' * 64}", content=TEXT, headers={"upload-offset": "0"})
        assert "holds no file" in refusal(answer)
        answer = client.post(f"{upload}/commit", json=committed(target))
        assert "not whole yet" in refusal(answer)
        assert client.get(upload).json()["missing"] == [{"sha256": right, "size": len(TEXT), "offset": 0}]


def test_a_size_that_nothing_could_have_is_refused(target: Target) -> None:
    with target.client() as client:
        for size, status in ((99 << 40, 413), (2**53 - 1, 413), (2**63, 400), (-1, 400)):
            file = {"path": WEIGHTS_FILE, "size": size, "sha256": "0" * 64}
            answer = client.post("/api/v1/uploads", json={"name": "team/x", "files": [file]})
            assert answer.status_code == status
            refusal(answer)


def test_a_body_that_breaks_off_leaves_what_came_and_can_be_gone_on_with(target: Target) -> None:
    size, sent = 3 * BUFFER_BYTES, 2 * BUFFER_BYTES + 1000
    with target.client() as client:
        upload = begin(client, (WEIGHTS_FILE, size, "0" * 64))
        piece = f"{upload}/{'0' * 64}"
        head = f"PATCH {piece} HTTP/1.1\r\nhost: x\r\nupload-offset: 0\r\ncontent-length: {size}\r\n"
        with target.connect() as connection:
            connection.sendall(head.encode() + KEY + b"\r\n" + b"!" * sent)
            come = 0
            while come < BUFFER_BYTES:
                come = client.get(upload).json()["missing"][0]["offset"]
        while (answer := client.patch(piece, content=b"", headers={"upload-offset": str(come)})).status_code == 409:
            come = answer.json()["error"]["offset"]  # where it stands when the broken connection has let it go
        assert BUFFER_BYTES <= come <= sent
        answer = client.patch(piece, content=b"!" * (size - come), headers={"upload-offset": str(come)})
        assert "hash to" in refusal(answer)


def test_a_body_that_stops_arriving_is_not_waited_for(target: Target) -> None:
    one, other = "0" * 64, "1" * 64
    with target.client() as client, contextlib.ExitStack() as stack:
        upload = begin(client, (README_FILE, len(TEXT), one), (METRICS_FILE, len(TEXT), other))
        connections = []
        for framing, piece in (
            (f"content-length: {len(TEXT)}\r\n\r\n{{", one),
            ("transfer-encoding: chunked\r\n\r\n1\r\n{\r\n", other),
        ):
            for line in (
                f"PATCH {upload}/{piece} HTTP/1.1\r\nupload-offset: 0",
                f"POST {upload}/commit HTTP/1.1\r\ncontent-type: application/json",
                "POST /api/v1/keys HTTP/1.1\r\ncontent-type: application/json",
                "POST /api/models/team/legal/paths-info/1 HTTP/1.1",
            ):
                connection = stack.enter_context(target.connect())
                connection.sendall(f"{line}\r\nhost: x\r\n".encode() + KEY + framing.encode())
                connections.append(connection)
        for connection in connections:
            assert "nothing more of the body arrived" in first_refusal(until(connection, b"}}"))
        for piece in (one, other):
            content = b"!" * (len(TEXT) - 1)
            refusal(client.patch(f"{upload}/{piece}", content=content, headers={"upload-offset": "1"}))


def until(connection: socket.socket, text: bytes) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError):
        while text not in found and (more := connection.recv(1 << 16)):
            found += more
    return found


def test_a_body_without_end_is_cut(target: Target) -> None:
    """It is refused, and what comes after the refusal is not taken for ever."""
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    heads = [
        "POST /api/v1/keys HTTP/1.1\r\ncontent-type: application/json\r\n",
        "POST /api/v1/uploads HTTP/1.1\r\ncontent-type: application/json\r\n",
        f"POST {UPLOAD}/commit HTTP/1.1\r\ncontent-type: application/json\r\n",
        f"PATCH {UPLOAD}/{'0' * 64} HTTP/1.1\r\nupload-offset: 0\r\n",
        "POST /api/v1/aliases/team/legal HTTP/1.1\r\ncontent-type: application/json\r\n",
        "POST /api/models/team/legal/paths-info/1 HTTP/1.1\r\n",
        "POST /nowhere HTTP/1.1\r\n",
        "POST /health HTTP/1.1\r\n",
    ]
    with contextlib.ExitStack() as stack:
        sending = [stack.enter_context(target.connect()) for _ in heads]
        for connection, head in zip(sending, heads, strict=True):
            connection.sendall(head.encode() + b"host: x\r\n" + KEY + b"transfer-encoding: chunked\r\n\r\n")
        while sending:
            for connection in list(sending):
                try:
                    connection.sendall(chunk)
                except ConnectionError:
                    sending.remove(connection)


def test_whatever_an_upload_brings_that_is_no_adapter_is_freed(target: Target) -> None:
    with target.client() as client:
        for weights, reason in (
            (raw_safetensors(b"{}", length=HEADER_BYTES), f"declares {HEADER_BYTES} bytes, above the limit"),
            (
                raw_safetensors(b"{" + b" " * (HEADER_BYTES - 2) + b"}"),
                f"declares {HEADER_BYTES} bytes, above the limit",
            ),
            (raw_safetensors(b"{}", length=2**64 - 1), "above the limit"),
            (raw_safetensors(b"[" * 1_000_000), "does not start with"),
            (raw_safetensors(b'{"a":' * 1_000_000), "nested too deeply"),
            (raw_safetensors({f"x.{number}": {} for number in range(100_000)}), "more problems; 99000 are not told"),
            (raw_safetensors({"__metadata__": {"x": "y" * 7_000_000}}), "is missing"),
            (b"PK\x03\x04" + b"\0" * 100, "above the limit"),
            (b"", "has 0 bytes"),
        ):
            manifest = validate(target.folder)
            contents = {CONFIG_FILE: config_bytes(manifest), WEIGHTS_FILE: weights}
            upload = begin(client, *((name, len(data), sha256_of(data)) for name, data in contents.items()))
            for missing in client.get(upload).json()["missing"]:
                data = next(data for data in contents.values() if sha256_of(data) == missing["sha256"])
                sent = client.patch(f"{upload}/{missing['sha256']}", content=data, headers={"upload-offset": "0"})
                sent.raise_for_status()
            answer = client.post(f"{upload}/commit", json=committed(target))
            assert answer.status_code == 400
            told = answer.json()["error"]
            assert any(reason in problem["reason"] for problem in told["problems"]), (reason, told["message"])
            assert client.get(upload).status_code == 404


BASE = {"name": "x", "model_type": "x", "hidden_size": 1, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 1,
        "intermediate_size": 1, "vocab_size": 1, "tokenizer": None}  # fmt: skip


def commit_of(linears: bytes) -> bytes:
    return b'{"base": ' + json.dumps(BASE).encode() + b', "modules": {"others": [], "linears": ' + linears + b"}}"


def filled(opening: bytes, item: bytes, closing: bytes, size: int) -> bytes:
    """As many items as the size holds."""
    count = (size - len(opening) - len(closing)) // (len(item) + 1)
    return opening + b",".join([item] * count) + closing


BOMBS: dict[str, Callable[[int], bytes]] = {
    "lists in lists": lambda size: b"[" * (size // 2) + b"]" * (size // 2),
    "objects in objects": lambda size: b'{"a":' * (size // 5),
    "deep where a name belongs": lambda size: b'{"name": ' + b"[" * 500 + b"]" * 500 + b"}",
    "numbers": lambda size: filled(b"[", b"1", b"]", size),
    "empty lists": lambda size: filled(b"[", b"[]", b"]", size),
    "empty objects": lambda size: filled(b"[", b"{}", b"]", size),
    "nothings": lambda size: filled(b'{"name": [', b"null", b"]}", size),
    "many keys": lambda size: b"{" + b",".join(b'"%07d":1' % number for number in range(size // 12)) + b"}",
    "one key twice": lambda size: filled(b"{", b'"a":1', b"}", size),
    "a long key": lambda size: b'{"' + b"k" * (size - 10) + b'": 1}',
    "a long text": lambda size: b'{"name": "' + b"x" * (size - 20) + b'"}',
    "escapes": lambda size: b'{"name": "' + rb"\ud83d\ude00" * ((size - 20) // 12) + b'"}',
    "a long number": lambda size: b'{"name": ' + b"9" * (size - 20) + b"}",
    "a long fraction": lambda size: b'{"name": 0.' + b"9" * (size - 20) + b"}",
    "a large exponent": lambda size: b'{"name": 1e999999999}',
    "not a number": lambda size: b'{"name": NaN}',
    "half a pair": lambda size: rb'{"name": "\ud800"}',
    "no text": lambda size: b"\xff" * size,
    "wide text": lambda size: '{"name": "x"}'.encode("utf-16"),
    "spaces": lambda size: b" " * size,
    "modules that are none": lambda size: commit_of(filled(b"{", b'"x":1', b"}", size - 300)),
    "as many modules": lambda size: commit_of(
        b"{" + b",".join(b'"%07d":1' % number for number in range((size - 300) // 12)) + b"}"
    ),
    "too many modules": lambda size: commit_of(
        b"{" + b",".join(b'"%07d":[1,1]' % number for number in range((size - 300) // 16)) + b"}"
    ),
    "modules that nothing adapts": lambda size: commit_of(
        b"{" + b",".join(b'"%07d":[1,1]' % number for number in range(90_000)) + b"}"
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_json_bomb_is_refused(target: Target, bomb: str) -> None:
    with target.client() as client:
        for path, size in (("/api/v1/keys", 200_000), (f"{UPLOAD}/commit", BOMB_BYTES)):
            refusal(client.post(path, content=BOMBS[bomb](size), headers=JSON))


def test_a_body_of_too_many_bytes_is_refused(target: Target) -> None:
    with target.client() as client:
        for path, size in (("/api/v1/uploads", BOMB_BYTES), (f"{UPLOAD}/commit", BOMB_BYTES + 1)):
            for content in (b" " * size, iter([b" " * (size // 2), b" " * size])):
                answer = client.post(path, content=content, headers=JSON)
                assert answer.status_code == 413
                refusal(answer)


def test_many_large_bodies_at_once_are_held_to_a_budget(target: Target) -> None:
    """Each stops just before its end and is dripped on; those that are too much are told to come again."""
    body = b" " * (BOMB_BYTES - 1000)
    head = f"POST {UPLOAD}/commit HTTP/1.1\r\nhost: x\r\ncontent-length: {BOMB_BYTES}\r\n"
    answers: list[bytes] = []

    def send() -> None:
        with target.connect() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(head.encode() + KEY + b"\r\n")
            connection.sendall(body)
            answers.append(until(connection, b"}}"))

    senders = [threading.Thread(target=send, daemon=True) for _ in range(SENDERS)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(WAIT_S)
    statuses = {answer.split()[1] for answer in answers if answer}
    assert b"503" in statuses
    assert statuses <= {b"503", b"400"}, "the others were not waited for without end"


def test_a_large_body_is_only_read_from_those_who_may_push(target: Target) -> None:
    for key, status in ((target.keys["reader"], 413), (target.keys["pusher"], 400)):
        with target.client(key) as client:
            answer = client.post(f"{UPLOAD}/commit", content=b" " * (1 << 20), headers=JSON)
            assert answer.status_code == status
            refusal(answer)


def test_a_packed_body_is_never_unpacked(target: Target) -> None:
    packed = gzip.compress(b"\0" * (1 << 26), compresslevel=6)
    with target.client() as client:
        for path, method in (("/api/v1/keys", "POST"), (f"{UPLOAD}/commit", "POST"), (f"{UPLOAD}/{'0' * 64}", "PATCH")):
            plain = {**JSON, "upload-offset": "0"}
            refusal(client.request(method, path, content=packed, headers=plain))
            for encoding in ("gzip", "x-gzip", "deflate", "br", "zstd", "gzip, gzip"):
                headers = {**plain, "content-encoding": encoding}
                assert "content-encoding" in refusal(client.request(method, path, content=packed, headers=headers))


def test_floods_of_headers_are_refused(target: Target) -> None:
    for flood in (
        b"x: y\r\n" * 10_000,
        b"x: y\r\n" * 1_000_000,
        b"".join(b"x-%d: y\r\n" % number for number in range(20_000)),
        b"x: " + b"y" * 50_000 + b"\r\n",
        b"x: " + b"y" * 10_000_000 + b"\r\n",
        b"y" * 50_000 + b": x\r\n",
        b"cookie: " + b"a=b; " * 20_000 + b"\r\n",
        b"authorization: Bearer " + b"x" * 50_000 + b"\r\n",
    ):
        answer = target.say(b"GET /api/v1/head HTTP/1.1\r\nhost: x\r\n" + flood + b"\r\n")
        if answer:  # else it was sent away while it was still talking
            assert is_about_the_head(first_refusal(answer))
    answer = target.say(b"GET /" + b"x" * 50_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
    assert not answer or is_about_the_head(first_refusal(answer))


def is_about_the_head(message: str) -> bool:
    return "its head is too large" in message or "a head of" in message


CANARY = b'{"name": "smuggled", "scopes": ["admin"]}'
SMUGGLED = (
    b"POST /api/v1/keys HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + KEY
    + b"content-length: %d\r\n\r\n" % len(CANARY) + CANARY
)  # fmt: skip
POST = b"POST /api/v1/aliases/team/legal HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + KEY


CUT_IN_TWO_WAYS = [
    POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"content-length: %d\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(SMUGGLED)) + SMUGGLED,
    POST + b"content-length: 0\r\ncontent-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    POST + b"content-length: 0, %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    POST + b"content-length: +0\r\n\r\n" + SMUGGLED,
    POST + b"content-length: -1\r\n\r\n" + SMUGGLED,
    POST + b"content-length: 0x0\r\n\r\n" + SMUGGLED,
    POST + b"content-length: 1e0\r\n\r\n{" + SMUGGLED,
    POST + b"content-length : 0\r\n\r\n" + SMUGGLED,
    POST + b"content-length: " + b"9" * 40 + b"\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding: identity\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"x: y\rtransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding: chunked\r\n\r\n5;\n\r\nhello\r\n0\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding: chunked\r\n\r\n-1\r\n" + SMUGGLED,
    POST + b"transfer-encoding: chunked\r\n\r\n0x0\r\n\r\n" + SMUGGLED,
    POST + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n" + SMUGGLED,
    b"GET /api/v1/head HTTP/1.1\r\nhost: x\r\n" + KEY + b" transfer-encoding: chunked\r\n\x00\r\n\r\n" + SMUGGLED,
    b"GET /api/v1/head HTTP/1.1\r\n" + KEY + b"\r\n" + SMUGGLED,
    b"GET /api/v1/head HTTP/1.1\r\nhost: x\r\nhost: y\r\n" + KEY + b"\r\n" + SMUGGLED,
    b"GET /api/v1/head HTTP/2.0\r\nhost: x\r\n" + KEY + b"\r\n" + SMUGGLED,
    b"GET /api/v1/head\r\n\r\n" + SMUGGLED,
]


def test_a_request_that_two_servers_could_cut_in_two_ways_is_refused_and_nothing_after_it_is_heard(
    target: Target,
) -> None:
    """The request that would be smuggled makes a key; the fixture sees that there is no new one."""
    for said in CUT_IN_TWO_WAYS:
        first_refusal(target.say(said))


IN_A_BODY = [
    b"content-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    b"content-length: %d, %d\r\n\r\n" % (len(SMUGGLED), len(SMUGGLED)) + SMUGGLED,
    b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\n\r\n",
    b"Transfer-Encoding: CHUNKED\r\n\r\n%x;x=y\r\n" % len(SMUGGLED) + SMUGGLED + b"\r\n0\r\nx: y\r\n\r\n",
    b"upgrade: h2c\r\nconnection: upgrade\r\ncontent-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
]


def test_a_request_in_a_body_is_a_body(target: Target) -> None:
    for body in IN_A_BODY:
        answer = target.say_and_ask(POST + body)
        first_refusal(answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n"))


def test_a_method_that_nobody_serves_is_refused(target: Target) -> None:
    for method in ("CONNECT", "TRACE", "PUT", "OPTIONS", "PROPFIND", "get", "X" * 1000):
        for path in ("/api/v1/keys", "*", "http://evil.example/api/v1/keys", "evil.example:80"):
            said = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n".encode()
            first_refusal(target.say(said + KEY + b"\r\n"))


def test_a_websocket_is_not_opened(target: Target) -> None:
    """It would not pass the ring that asks for keys."""
    head = (
        "GET /api/v1/keys HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
    )
    assert "this hub asks for a key" in first_refusal(target.say_and_ask(head.encode()))


def test_what_is_no_http_ends_its_connection(target: Target) -> None:
    strange = [
        b"", b"GET", b"GET / HTTP/1.1\r\nhost: x", b"\r\n" * 1000, b"\0" * 1000, b"\xff" * 100_000,
        b"\x16\x03\x01\x02\x00\x01", b"SSH-2.0-x\r\n", b"EHLO x\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"*1\r\n$4\r\nPING\r\n",
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(target.connect()) for _ in strange]
        for connection, said in zip(connections, strange, strict=True):
            with contextlib.suppress(ConnectionError):
                connection.sendall(said)
        for answer in map(heard, connections):
            assert not answer or first_refusal(answer)


def test_thousands_of_connections_that_say_nothing_keep_nobody_out(
    target: Target, record_property: Callable[[str, object], None]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(CONNECTIONS, hard - SPARE_FILES)
    assert count >= FEWEST_CONNECTIONS, f"the limit of {hard} open files is too low for this test"
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    record_property("idle connections", count)
    silent: list[socket.socket] = []
    try:
        for number in range(count):
            connection = target.connect()
            silent.append(connection)
            if number % 3:  # a third says nothing at all, a third half a head, a third asks once
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"\r\n" * (number % 3 - 1))
            if number % 1000 == 0:
                assert target.ask("GET", "/api/v1/head").status_code == 200
        assert target.ask("GET", "/ready").status_code == 200
        target.steady.is_served_again()
        assert target.registry.process is not None
        open_files = psutil.Process(target.registry.process.pid).num_fds()
        assert open_files < 2 * FEWEST_CONNECTIONS, f"{open_files} files are open for {count} connections"
    finally:
        for connection in silent:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_thousands_of_wrong_keys_are_all_refused(target: Target) -> None:
    with target.client("x") as client:
        for number in range(200):
            key = f"mgk_{number:012x}_" + "A" * 43 if number % 2 else f"guess-{number}"
            answer = client.get("/api/v1/whoami", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == 401


def test_pipelined_requests_are_answered_in_their_order(target: Target) -> None:
    ask = b"GET /api/v1/adapters/x%d HTTP/1.1\r\nhost: x\r\n" + KEY + b"\r\n"
    answers = target.say_and_ask(b"".join(ask % number for number in range(PIPELINED)))
    found = [int(number) for number in re.findall(rb'no adapter x(\d+)"', answers)]
    assert found == list(range(PIPELINED))
