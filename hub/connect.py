"""Which hub is meant: the one at $HUB_URL, or else the one on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hub.contract import Hub, HubReader
from hub.registry import LocalHub, default_home

if TYPE_CHECKING:
    from hub.client import RemoteHub

URL_VARIABLE = "HUB_URL"
TOKEN_VARIABLE = "HUB_TOKEN"
SERVER_PATIENCE_S = 2.0


def open_hub() -> Hub:
    """Raises: BadReference for an address that is none, HubUnavailable."""
    url = os.environ.get(URL_VARIABLE)
    return open_remote(url) if url else open_local()


def open_reader(*, cache_bytes: int) -> HubReader:
    """For a server: the hub on this machine, or a remote one through a cache on this machine's disk.

    A request waits for a remote hub that is away no longer than SERVER_PATIENCE_S.
    Raises: BadReference, HubUnavailable.
    """
    url = os.environ.get(URL_VARIABLE)
    if not url:
        return open_local()
    from hub.cache import CachedHub

    remote = open_remote(url, patience_s=SERVER_PATIENCE_S)
    return CachedHub(remote, default_home() / "cache", budget_bytes=cache_bytes)


def open_local(home: Path | None = None) -> LocalHub:
    """Raises: HubUnavailable."""
    return LocalHub(home if home is not None else default_home())


def open_remote(url: str, *, patience_s: float | None = None) -> RemoteHub:
    """The hub at an address, with $HUB_TOKEN or the key that `hub login` has stored for it. Raises: BadReference."""
    from hub.client import RemoteHub
    from hub.credentials import stored_key

    key = os.environ.get(TOKEN_VARIABLE) or stored_key(default_home(), url)
    return RemoteHub(url, key=key) if patience_s is None else RemoteHub(url, key=key, patience_s=patience_s)
