"""The registry service as a process: constructed, served and stopped here.

SIGTERM or SIGINT ends the event streams (their watchers come back elsewhere or later), lets running requests finish,
and exits; a second signal does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from hub.errors import HubUnavailable
from hub.http.app import create_app
from hub.http.config import RegistryConfig
from hub.http.doorkeeper import guarded
from hub.http.edge import MAX_HEAD_BYTES
from hub.registry import LocalHub

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 30


def serve(hub: LocalHub, config: RegistryConfig) -> None:
    """Serve until told to stop. Raises: HubUnavailable when the port cannot be opened."""
    asyncio.run(_serve(create_app(hub, config), config))


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: event streams would keep it from ever ending."""

    def __init__(self, settings: uvicorn.Config, announcement: str) -> None:
        super().__init__(settings)
        self._announcement = announcement

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Announced only when whoever reads it will not be refused."""
        await super().startup(sockets)
        print(self._announcement, flush=True)  # noqa: T201


async def _serve(app: FastAPI, config: RegistryConfig) -> None:
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=guarded(
            max_connections=config.max_connections,
            header_timeout_s=config.header_timeout_s,
            body_timeout_s=config.body_timeout_s,
        ),
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(config.drain_timeout_s),
    )
    try:
        listener = settings.bind_socket()
    except SystemExit:
        raise HubUnavailable(f"port {config.port} on {config.host} cannot be opened") from None
    host, port = listener.getsockname()[:2]
    server = _Uvicorn(settings, f"Multigraft registry on http://{host}:{port}")
    stopping: set[asyncio.Task[None]] = set()

    async def stop() -> None:
        app.state.draining = True
        await app.state.watchers.close()
        server.should_exit = True

    def on_signal() -> None:
        if stopping:
            server.force_exit = True
        stopping.add(asyncio.get_running_loop().create_task(stop()))

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    await server.serve(sockets=[listener])
