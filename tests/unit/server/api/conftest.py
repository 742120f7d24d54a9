from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.unit.server.api.live import Live, serve


@pytest.fixture
def live() -> Iterator[Live]:
    with serve() as running:
        yield running


@pytest.fixture
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=10) as client:
        yield client
