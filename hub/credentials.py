"""Keys of remote hubs on this machine, each stored for one origin and given to no other.

The file is readable by its owner alone, and is written aside and renamed, so that it is never there half.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path
from urllib.parse import urlsplit

from hub.errors import BadReference, HubUnavailable
from hub.ref import printable

FILE = "credentials.json"
_PORTS = {"http": 80, "https": 443}


def check_url(url: str) -> str:
    """An address of a hub without a slash at its end. Raises: BadReference."""
    if "@" in url:  # first of all, so that no message shows a password
        raise BadReference("a hub's address holds no user and no password: use hub login or HUB_TOKEN")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadReference(f"{printable(url)} is no address: {error}") from error
    plain = parts.scheme in _PORTS and parts.hostname and re.fullmatch(r"[\x21-\x7e]+", url)
    if not plain or parts.query or parts.fragment or port == 0:
        raise BadReference(f"{printable(url)} is no address of a hub such as https://hub.example:8080")
    return url.rstrip("/")


def origin_of(url: str) -> str:
    """Scheme, host and port of a checked address."""
    parts = urlsplit(url)
    port = parts.port or _PORTS[parts.scheme]
    return f"{parts.scheme}://{parts.hostname}:{port}"


def stored_key(home: Path, url: str) -> str | None:
    """The key that was stored for this origin. Raises: BadReference, HubUnavailable."""
    return _read(home).get(origin_of(check_url(url)))


def store_key(home: Path, url: str, key: str) -> Path:
    """Remember a key for this origin. Raises: BadReference, HubUnavailable."""
    return _write(home, {**_read(home), origin_of(check_url(url)): key})


def forget_key(home: Path, url: str) -> bool:
    """True when there was one. Raises: BadReference, HubUnavailable."""
    keys = _read(home)
    found = keys.pop(origin_of(check_url(url)), None)
    if found is not None:
        _write(home, keys)
    return found is not None


def _read(home: Path) -> dict[str, str]:
    try:
        value = json.loads((home / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise HubUnavailable(f"{FILE} in the hub's home cannot be read: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value.values()):
        raise HubUnavailable(f"{FILE} in the hub's home is damaged: it must map addresses to keys")
    return value


def _write(home: Path, keys: dict[str, str]) -> Path:
    aside = home / f".{FILE}.{uuid.uuid4().hex[:8]}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as target:
            json.dump(keys, target, indent=2)
        aside.replace(home / FILE)
    except OSError as error:
        raise HubUnavailable(f"{FILE} in the hub's home cannot be written: {error.strerror}") from error
    finally:
        aside.unlink(missing_ok=True)
    return home / FILE
