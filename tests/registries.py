"""A registry service for tests: in a thread of this process, or as a process of its own that can be killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import uvicorn

from hub.client import RemoteHub
from hub.http.app import create_app
from hub.http.config import RegistryConfig
from hub.http.doorkeeper import guarded
from hub.registry import LocalHub

ADMIN_KEY = "admin-key-of-the-tests"
READ_KEY = "read-key-of-the-tests"
START_S = 30.0


@contextmanager
def threaded(hub: LocalHub, config: RegistryConfig | None = None) -> Iterator[str]:
    """Serve a hub from a thread; gives the address."""
    chosen = config or RegistryConfig(admin_key=ADMIN_KEY, read_key=READ_KEY)
    settings = uvicorn.Config(
        create_app(hub, chosen),
        port=0,
        http=guarded(
            max_connections=chosen.max_connections,
            header_timeout_s=chosen.header_timeout_s,
            body_timeout_s=chosen.body_timeout_s,
        ),
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=1,
    )
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the registry did not start"
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Registry:
    """`hub registry` as a process that can be killed and started again on the same port and home."""

    home: Path
    port: int = field(default_factory=free_port)
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {
            **os.environ,
            "MULTIGRAFT_HOME": str(self.home),
            "MULTIGRAFT_REGISTRY_ADMIN_KEY": ADMIN_KEY,
            "MULTIGRAFT_REGISTRY_READ_KEY": READ_KEY,
        }
        environment.pop("HUB_URL", None)
        command = [sys.executable, "-m", "hub.cli", "registry", "--port", str(self.port), *self.options]
        with (self.home.parent / f"{self.home.name}.registry.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            assert self.process is not None and self.process.poll() is None, "the registry has ended"
            try:
                if httpx.get(f"{self.url}/ready", timeout=1).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline, "the registry did not become ready"
            time.sleep(0.02)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=START_S)

    def hub(self, key: str = ADMIN_KEY, *, patience_s: float = 20.0) -> RemoteHub:
        return RemoteHub(self.url, key=key, patience_s=patience_s)


@contextmanager
def running(home: Path, *options: str) -> Iterator[Registry]:
    registry = Registry(home, options=options)
    registry.start()
    try:
        yield registry
    finally:
        if registry.process is not None and registry.process.poll() is None:
            registry.kill()


def client_environment(registry: Registry, home: Path, key: str = ADMIN_KEY) -> Mapping[str, str]:
    """The environment of a command that talks to a registry."""
    return {**os.environ, "HUB_URL": registry.url, "HUB_TOKEN": key, "MULTIGRAFT_HOME": str(home)}
