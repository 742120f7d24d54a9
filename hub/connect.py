"""Which hub is meant: the one at $HUB_URL, or else the one on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from hub.contract import Hub, HubReader
from hub.errors import BadReference
from hub.ref import printable
from hub.registry import LocalHub, default_home

if TYPE_CHECKING:
    from hub.client import Progress, RemoteHub

URL_VARIABLE = "HUB_URL"
TOKEN_VARIABLE = "HUB_TOKEN"
PATIENCE_VARIABLE = "HUB_PATIENCE"  # seconds for which a command tries again while a remote hub is away
SERVER_PATIENCE_S = 2.0
MAX_PATIENCE_S = 86400.0


def open_hub(*, progress: Progress | None = None) -> Hub:
    """`progress` is told how far the files of a push or a pull over the network have come.

    Raises: BadReference for an address that is none, HubUnavailable.
    """
    url = os.environ.get(URL_VARIABLE)
    return open_remote(url, progress=progress) if url else open_local()


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


def open_remote(
    url: str, *, key: str | None = None, patience_s: float | None = None, progress: Progress | None = None
) -> RemoteHub:
    """The hub at an address, with $HUB_TOKEN or the key that `hub login` has stored for it. Raises: BadReference."""
    from hub.client import RemoteHub
    from hub.credentials import stored_key

    if key is None:
        key = os.environ.get(TOKEN_VARIABLE) or stored_key(default_home(), url)
    patience_s = _patience_s() if patience_s is None else patience_s
    return RemoteHub(url, key=key, patience_s=patience_s, progress=progress)


def _patience_s() -> float:
    from hub.client import PATIENCE_S

    text = os.environ.get(PATIENCE_VARIABLE)
    if not text:
        return PATIENCE_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_PATIENCE_S:
        raise BadReference(f"{PATIENCE_VARIABLE} is seconds from 0 to {MAX_PATIENCE_S:g}, not {printable(text)}")
    return seconds
