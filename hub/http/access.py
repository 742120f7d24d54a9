"""Who is asking, and what they may: default deny, on every route.

A route that is not in OPEN needs a principal, and says by `needs` which scope it takes; a test goes through all routes.
What a key does not see does not exist for it: the words are those of an unknown name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from hub.contract import Adapter, Event
from hub.errors import Forbidden, NotFound, Unauthorized
from hub.http.config import RegistryConfig
from hub.keys import Keys, Principal, Scope, same_secret
from hub.ref import check_name
from hub.registry import LocalHub

OPEN = frozenset({"/health", "/ready", "/metrics", "/version"})
_BEARER = re.compile(r"[Bb]earer +([\x21-\x7e]{1,512})")


class Access:
    """Turns the header of a request into a principal. Fails closed: whatever is not understood is nobody."""

    def __init__(self, keys: Keys, config: RegistryConfig) -> None:
        self._keys = keys
        self._fixed = [
            (secret, Principal(name, name, frozenset({scope})))
            for secret, name, scope in ((config.admin_key, "admin", "admin"), (config.read_key, "reader", "read"))
            if secret
        ]
        self._anonymous = Principal("anonymous", "anonymous", config.anonymous) if config.anonymous else None

    async def identify(self, authorization: str | None) -> Principal:
        """Raises: Unauthorized."""
        if authorization is None:
            if self._anonymous is None:
                raise Unauthorized("this hub asks for a key: hub login, HUB_TOKEN or Authorization: Bearer KEY")
            return self._anonymous
        match = _BEARER.fullmatch(authorization)
        if match is None:
            raise Unauthorized("the header must be Authorization: Bearer KEY")
        for secret, principal in self._fixed:
            if same_secret(match[1], secret):
                return principal
        found = await run_in_threadpool(self._keys.authenticate, match[1])
        if found is None:
            raise Unauthorized("this key is unknown, revoked or expired")
        return found


def needs(scope: Scope) -> Callable[[Request], Principal]:
    """A dependency: the principal, if it holds the scope."""

    def principal(request: Request) -> Principal:
        asking: Principal = request.state.principal
        if not asking.holds(scope):
            held = ", ".join(sorted(asking.scopes))
            raise Forbidden(f"this needs the scope {scope}; key {asking.name} has {held}")
        return asking

    return principal


Reader = Annotated[Principal, Depends(needs("read"))]
Pusher = Annotated[Principal, Depends(needs("push"))]
Promoter = Annotated[Principal, Depends(needs("promote"))]
Admin = Annotated[Principal, Depends(needs("admin"))]


def seen(asking: Principal, name: str) -> str:
    """The name, if it may exist for this principal. Raises: BadReference, NotFound."""
    if not asking.sees(check_name(name)):
        raise NotFound(f"there is no adapter {name}")
    return name


def own(asking: Principal, name: str) -> str:
    """The name, if this principal may write under it. Raises: BadReference, Forbidden."""
    if not asking.sees(check_name(name)):
        raise Forbidden(f"key {asking.name} is for the names {' '.join(asking.names)}, not for {name}")
    return name


def unbounded(asking: Principal) -> Principal:
    """What concerns the whole hub is for keys that see all of it. Raises: Forbidden."""
    if not asking.unbounded:
        raise Forbidden(f"this concerns the whole hub; key {asking.name} is for the names {' '.join(asking.names)}")
    return asking


def seen_digest(asking: Principal, hub: LocalHub, digest: str) -> str:
    """The digest, if a name that this principal sees has it. Raises: BadReference, NotFound."""
    if not any(asking.sees(name) for name in hub.names_of(digest)):
        raise NotFound(f"no adapter here has the digest {digest}")
    return digest


def seen_adapters(asking: Principal, adapters: Iterable[Adapter]) -> list[Adapter]:
    return [adapter for adapter in adapters if asking.sees(adapter.name)]


def seen_events(asking: Principal, events: Iterable[Event]) -> list[Event]:
    return [event for event in events if asking.sees(event.name)]
