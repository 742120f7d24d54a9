"""Who asks: nobody, a holder of the API key, or of the admin key. Compared in constant time; default deny.

With an API key set, every path that is not in `OPEN_PATHS` needs it, known or not. The admin key opens these too.
Managing routes need the admin key always; a server without one has no managing routes.
"""

from __future__ import annotations

import hmac
from typing import Literal

from server.config import HttpConfig
from server.errors import Forbidden, Unauthorized

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
ADMIN_VARIABLE = "MULTIGRAFT_ADMIN_KEY"

Holder = Literal["nobody", "user", "admin"]


def holder_of(authorization: bytes, config: HttpConfig) -> Holder:
    """`authorization`: the header's value, empty when there is none."""
    scheme, _, key = authorization.partition(b" ")
    if scheme.lower() != b"bearer":
        return "nobody"
    key = key.strip()
    if _same(key, config.admin_key):
        return "admin"
    return "user" if _same(key, config.api_key) else "nobody"


def admit(holder: Holder, path: str, config: HttpConfig) -> None:
    """Raises: Unauthorized."""
    if config.api_key is not None and holder == "nobody" and path not in OPEN_PATHS:
        raise Unauthorized("this server needs an API key: send it as 'Authorization: Bearer <key>'")


def admit_admin(holder: Holder, config: HttpConfig) -> None:
    """Raises: Forbidden, Unauthorized."""
    if config.admin_key is None:
        raise Forbidden(f"this server has no admin key: start it with the environment variable {ADMIN_VARIABLE} set")
    if holder == "user":
        raise Forbidden("this route needs the admin key, and another key was sent")
    if holder == "nobody":
        raise Unauthorized("this route needs the admin key: send it as 'Authorization: Bearer <key>'")


def _same(given: bytes, wanted: str | None) -> bool:
    return wanted is not None and hmac.compare_digest(given, wanted.encode())
