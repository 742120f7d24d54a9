"""Where the server is constructed: the only file that knows every other, and the only one that starts and stops.

Order of life: the base is loaded and proved, the engine thread starts, then the port opens. SIGTERM or SIGINT refuses
new requests, lets running ones finish, and exits; a second signal does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
import uvicorn
from fastapi import FastAPI

from hub.base import describe_base, find_base
from hub.connect import open_reader
from hub.contract import HubReader
from hub.errors import HubError, HubUnavailable
from hub.http.doorkeeper import guarded
from server.adapters.lowering.target import Target
from server.adapters.source import Source
from server.adapters.store import AdapterStore
from server.api.app import create_app
from server.api.service import ServerInfo
from server.config import ServerConfig
from server.engine.loop import EngineLoop
from server.errors import StartupRefused
from server.metrics import Metrics
from server.model.load import load_network
from server.text.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.05


@dataclass(frozen=True)
class Server:
    config: ServerConfig
    base_id: str
    engine: EngineLoop
    adapters: AdapterStore
    app: FastAPI


def build(config: ServerConfig, hub: HubReader) -> Server:
    """Load everything. Raises: StartupRefused."""
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    try:
        folder = find_base(config.model.base)
        base = describe_base(folder, name=config.http.served_name or _public_name(config.model.base))
    except HubError as error:
        raise StartupRefused(str(error)) from error
    tokenizer = load_tokenizer(folder)
    network = load_network(config.model, folder, name=base.name)
    facts = network.facts
    if config.engine.graphs and facts.device.type != "cuda":
        raise StartupRefused(f"--graphs needs a CUDA device, this server computes on {facts.device}")
    engine = EngineLoop(network, config.engine)
    metrics = Metrics()
    target = Target(
        sites=facts.sites,
        layers=facts.layers,
        hidden_size=facts.hidden_size,
        dtype=facts.dtype,
        device=facts.device,
        max_rank=config.adapters.max_rank,
        max_virtual=min(config.adapters.max_virtual, engine.max_model_len // 2),
        weight=network.weight,
        max_delta_error=config.adapters.max_delta_error,
        norms=facts.norms,
        embedding=facts.embedding,
        places=facts.places,
        parameters=facts.parameters,
        decoder_layers=facts.decoder_layers,
    )
    source = Source(hub, base, default_alias=config.adapters.default_alias, allow=config.adapters.allow)
    adapters = AdapterStore(source, engine, target, config.adapters, metrics, quantized=facts.quantized)
    app = create_app(
        engine=engine,
        adapters=adapters,
        tokenizer=tokenizer,
        config=config.http,
        base_id=base.name,
        metrics=metrics,
        info=ServerInfo(
            version=version("multigraft"),
            started=int(time.time()),
            details={
                "base": base.name,
                "dtype": str(facts.dtype).removeprefix("torch."),
                "device": str(facts.device),
                "quantize": config.model.quantize,
                "weight_bytes": facts.weight_bytes,
                "max_model_len": engine.max_model_len,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        ),
        adapter_cache_bytes=config.adapters.cache_bytes,
    )
    return Server(config, base.name, engine, adapters, app)


def _public_name(base: str) -> str:
    """What the base is called in requests and answers: never a path of this machine."""
    return Path(base).resolve().name if Path(base).is_dir() else base


def run(config: ServerConfig) -> None:
    """Serve until told to stop. Raises: StartupRefused."""
    hub: HubReader | None = None
    try:
        hub = open_reader(cache_bytes=config.adapters.disk_bytes)
        hub.head()
    except HubUnavailable as error:
        if hub is None:
            raise StartupRefused(str(error)) from error
        log.warning("starting without the hub: %s", error)
    except HubError as error:  # no address, a key that it does not take: waiting would mend nothing
        raise StartupRefused(f"the hub refuses this server: {error}") from error
    server = build(config, hub)
    server.engine.start()
    try:
        asyncio.run(_serve(server))
    finally:
        server.engine.stop()


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: it would close the port before running streams are done."""

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


async def _serve(server: Server) -> None:
    http = server.config.http
    settings = uvicorn.Config(
        server.app,
        host=http.host,
        port=http.port,
        http=guarded(max_connections=http.max_connections, header_timeout_s=http.header_timeout_s),
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
    )
    try:
        listener = settings.bind_socket()
    except SystemExit:
        raise StartupRefused(f"port {http.port} on {http.host} cannot be opened") from None
    host, port = listener.getsockname()[:2]
    uvicorn_server = _Uvicorn(settings, f"Multigraft serves {server.base_id} on http://{host}:{port}")
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_ in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_, _on_signal, uvicorn_server, stopping)
    watching = asyncio.create_task(server.adapters.watch())
    draining = asyncio.create_task(_drain(server, stopping, uvicorn_server))
    await uvicorn_server.serve(sockets=[listener])
    for task in (watching, draining):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _on_signal(uvicorn_server: uvicorn.Server, stopping: asyncio.Event) -> None:
    if stopping.is_set():
        uvicorn_server.force_exit = uvicorn_server.should_exit = True
    stopping.set()


async def _drain(server: Server, stopping: asyncio.Event, uvicorn_server: uvicorn.Server) -> None:
    """After the first signal: refuse what is new, wait for what runs, then let uvicorn close."""
    await stopping.wait()
    server.app.state.draining = True
    log.info("stopping: new requests are refused, running ones finish")
    deadline = time.monotonic() + server.config.http.drain_timeout_s
    while server.engine.open_requests and time.monotonic() < deadline:
        await asyncio.sleep(DRAIN_POLL_S)
    uvicorn_server.should_exit = True
