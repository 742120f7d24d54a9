"""Every setting of the registry service, one frozen record, built once by the command line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RegistryConfig:
    """`anonymous` are the scopes of whoever shows no key. Units: bytes, seconds."""

    host: str = "127.0.0.1"
    port: int = 8080
    admin_key: str | None = field(default=None, repr=False)
    read_key: str | None = field(default=None, repr=False)
    anonymous: frozenset[str] = frozenset()
    max_body_bytes: int = 16 << 20  # of a commit, which describes a base; other bodies are small, pieces have their own
    max_connections: int = 1024
    max_watchers: int = 512
    header_timeout_s: float = 10.0  # for a request's head to arrive whole
    body_timeout_s: float = 30.0  # between two arrivals of a body's bytes
    drain_timeout_s: float = 30.0
    collect_s: float = 3600.0  # between two collections; 0 leaves them to `hub gc`
