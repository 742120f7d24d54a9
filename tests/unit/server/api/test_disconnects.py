"""A client that goes away, at every stage: the engine, the leases and the outcome show it."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest

from tests.unit.server.api.live import Live, wait_until

HI = [{"role": "user", "content": "Hi"}]
STEP_S = 0.02


def leave_after(live: Live, seconds: float, **fields: Any) -> None:
    """Send a chat and close the connection, heard or not."""
    body = json.dumps({"messages": HI, "ignore_eos": True, "max_tokens": 200, **fields}).encode()
    address = urlparse(live.url)
    with contextlib.closing(socket.create_connection((str(address.hostname), int(address.port or 0)))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        time.sleep(seconds)


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"stream": True, "n": 3}, {"n": 3}])
def test_a_client_that_leaves_frees_the_engine_and_the_leases(live: Live, fields: dict[str, Any]) -> None:
    live.engine.step_s = STEP_S
    leave_after(live, 0.2, model="pirate", **fields)
    wait_until(lambda: live.engine.open == 0 and live.adapters.held == 0, within_s=1.0)
    assert len(live.engine.requests) == fields.get("n", 1), "it had begun"
    wait_until(lambda: 'multigraft_requests_total{adapter="pirate@2",outcome="cancelled"} 1.0' in scrape(live))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_adapter_loads_is_let_go(live: Live, stream: bool) -> None:
    live.adapters.load_s = 0.3
    leave_after(live, 0.1, model="pirate", stream=stream)
    time.sleep(0.4)
    assert (live.engine.requests, live.adapters.held) == ([], 0)
    assert 'multigraft_requests_total{adapter="unresolved",outcome="cancelled"} 1.0' in scrape(live)


def test_a_client_that_leaves_before_its_first_token_frees_the_engine(live: Live) -> None:
    live.engine.step_s = 5.0
    leave_after(live, 0.1, stream=True)
    wait_until(lambda: live.engine.open == 0 and live.adapters.held == 0, within_s=1.0)


def test_a_client_that_leaves_in_the_middle_of_its_body_harms_nobody(live: Live, http: httpx.Client) -> None:
    address = urlparse(live.url)
    with contextlib.closing(socket.create_connection((str(address.hostname), int(address.port or 0)))) as connection:
        connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"mess')
        time.sleep(0.05)
    assert http.post("/v1/chat/completions", json={"messages": HI}).status_code == 200


def test_others_go_on_when_one_leaves(live: Live, http: httpx.Client) -> None:
    live.engine.step_s = STEP_S
    with http.stream("POST", "/v1/chat/completions", json={"messages": HI, "stream": True, "max_tokens": 8}) as staying:
        leave_after(live, 0.05, stream=True)
        assert staying.read().endswith(b"data: [DONE]\n\n")


def scrape(live: Live) -> str:
    return httpx.get(live.url + "/metrics").text
