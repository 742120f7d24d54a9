"""A network that fails when a test wants it to: a relay before a server, and a server that says what it was told.

All of it is real TCP. What breaks does so at a chosen byte or request, so that nothing depends on a clock.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

Direction = Literal["up", "down"]  # up: towards the server

READ_BYTES = 64 << 10
WAIT_S = 60.0


@dataclass
class _Break:
    """After `after` more bytes the connection breaks, or stands still; so many times."""

    after: int
    times: int
    stalls: bool
    left: int = 0
    reached: threading.Event = field(default_factory=threading.Event)


class Relay:
    """Passes bytes between whoever connects and a server. `passed` counts them, `connections` counts those."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (str(parts.hostname), int(parts.port or 80))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._breaks: dict[Direction, _Break] = {}
        self._unanswered: list[bytes] = []
        self._replaced: tuple[bytes, bytes] | None = None
        self._open: set[socket.socket] = set()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.passed: dict[Direction, int] = {"up": 0, "down": 0}
        self.connections = 0

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        _shut(self._listener)
        self.break_all()

    def break_at(self, direction: Direction, *, after: int, times: int = 1) -> None:
        """Break the connection on which so many more bytes have passed; `times` over, counted anew each time."""
        with self._lock:
            self._breaks[direction] = _Break(after, times, stalls=False, left=after)

    def stall_at(self, direction: Direction, *, after: int) -> threading.Event:
        """Pass nothing on after so many more bytes; the event says that it has come so far."""
        with self._lock:
            self._breaks[direction] = _Break(after, 1, stalls=True, left=after)
            return self._breaks[direction].reached

    def lose_answer_to(self, request: bytes, *, times: int = 1) -> None:
        """Pass a request that holds this text on to the server, and break the connection when its answer comes."""
        with self._lock:
            self._unanswered += [request] * times

    def replace(self, before: bytes, after: bytes) -> None:
        """Change what comes down. Both texts have the same length."""
        assert len(before) == len(after)
        self._replaced = (before, after)

    def break_all(self) -> None:
        """Break every connection that is open, also one that stands still."""
        with self._lock:
            self._breaks.clear()
            for one in self._open:
                _shut(one)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    _shut(client)  # nobody is there
                    continue
                lost = threading.Event()
                with self._lock:
                    self._open |= {client, server}
                pairs: tuple[tuple[socket.socket, socket.socket, Direction], ...]
                pairs = ((client, server, "up"), (server, client, "down"))
                for source, sink, direction in pairs:
                    threading.Thread(target=self._pump, args=(source, sink, direction, lost), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: Direction, lost: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(READ_BYTES):
                data = self._changed(data, direction, lost)
                if direction == "down" and lost.is_set():
                    break
                allowed, broken = self._allowed(len(data), direction)
                sink.sendall(data[:allowed])
                if allowed < len(data):
                    if broken.stalls:
                        broken.reached.set()
                        while source.recv(READ_BYTES):
                            pass  # until somebody ends it
                    break
        for one in (source, sink):
            _shut(one)
        with self._lock:
            self._open -= {source, sink}

    def _changed(self, data: bytes, direction: Direction, lost: threading.Event) -> bytes:
        if direction == "down":
            return data if self._replaced is None else data.replace(*self._replaced)
        with self._lock:
            for request in self._unanswered:
                if request in data:
                    self._unanswered.remove(request)
                    lost.set()
                    break
        return data

    def _allowed(self, count: int, direction: Direction) -> tuple[int, _Break]:
        """How many of these bytes may pass, and what happens when that is not all."""
        with self._lock:
            found = self._breaks.get(direction, _Break(0, 0, stalls=False))
            if not found.times:
                self.passed[direction] += count
                return count, found
            allowed = min(count, found.left)
            found.left -= allowed
            self.passed[direction] += allowed
            if allowed < count and not found.stalls:
                found.times -= 1
                found.left = found.after
            return allowed, found


@contextmanager
def answering(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives each request the next of these answers, the last one for ever; its address, and the requests.

    An empty answer is a connection that ends without one.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    requests: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                client.settimeout(WAIT_S)
                with client, contextlib.suppress(OSError):
                    requests.append(_request(client))
                    client.sendall(answers[min(len(requests), len(answers)) - 1])

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
    finally:
        _shut(listener)


def answer(status: str, body: str = "", *headers: str) -> bytes:
    """An HTTP answer after which the connection ends."""
    head = [f"HTTP/1.1 {status}", f"content-length: {len(body.encode())}", "connection: close", *headers]
    return "\r\n".join([*head, "", body]).encode()


def _request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and (more := client.recv(READ_BYTES)):
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line.lower() for line in head.split(b"\r\n")]
    length = next((line.split(b":")[1] for line in lines if line.startswith(b"content-length")), 0)
    while len(body) < int(length) and (more := client.recv(READ_BYTES)):
        body += more
        data += more
    return data


def _shut(one: socket.socket) -> None:
    """Also whoever waits on it in another thread learns of it."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
