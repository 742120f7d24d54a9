"""Keys of a hub that is reached over the network: who may do what under which names.

A key is shown once, when it is made; what is kept is its sha256. That is enough, because the key is 256 random bits and
no word that anybody could guess. There is no default: whoever shows no key that is known, alive and not expired is
nobody.
Law: a principal may do only what one of its scopes names, under names that one of its patterns fits; admin may all of
it, under those names.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import sqlalchemy as sa
from sqlalchemy.engine import Engine, Row

from hub.errors import BadReference, NotFound
from hub.ref import SLUG, is_name, printable
from hub.schema import keys, reading, writing

Scope = Literal["read", "push", "promote", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

MAX_PATTERNS = 64
MAX_LIFE_S = 1e10  # three centuries
_KEY = re.compile(r"mgk_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_PATTERN = re.compile(r"[a-z0-9._*/-]{1,193}")


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever asks. `id` is stable and safe in a file name; `names` are patterns in which * stands for anything."""

    id: str
    name: str
    scopes: frozenset[str]
    names: tuple[str, ...] = ("*",)

    def sees(self, name: str) -> bool:
        """Whether the name exists for this principal at all."""
        return any(fits(name, pattern) for pattern in self.names)

    def holds(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes

    @property
    def unbounded(self) -> bool:
        return "*" in self.names


@dataclass(frozen=True, slots=True)
class Key:
    """What is told of a key afterwards: never the key itself."""

    key: str
    name: str
    scopes: tuple[str, ...]
    names: tuple[str, ...]
    actor: str
    at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Created:
    """A new key and its secret, which is told this once."""

    key: Key
    secret: str


class Keys:
    """The keys in a hub's catalogue. Units: the clock and lives in seconds."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock

    def create(
        self,
        name: str,
        scopes: Sequence[str],
        *,
        names: Sequence[str] = ("*",),
        life_s: float | None = None,
        actor: str,
    ) -> Created:
        """Raises: BadReference."""
        check_key(name, scopes, names)
        if life_s is not None and not 0 < life_s <= MAX_LIFE_S:  # NaN is neither, and would never expire
            raise BadReference(f"a life of {life_s:g} s: a key lives above 0 and up to {MAX_LIFE_S:g} s, or for ever")
        id_ = secrets.token_hex(6)
        secret = f"mgk_{id_}_{secrets.token_urlsafe(32)}"
        now = self._clock()
        row = {
            "key": id_,
            "name": name,
            "sha256": _hash(secret),
            "scopes": " ".join(sorted(set(scopes))),
            "names": " ".join(dict.fromkeys(names)),
            "actor": actor,
            "at": _moment(now),
            "expires_at": None if life_s is None else now + life_s,
        }
        with writing(self._engine) as connection:
            connection.execute(keys.insert().values(**row))
            made = connection.execute(sa.select(keys).where(keys.c.key == id_)).one()
        return Created(_key(made), secret)

    def listed(self) -> list[Key]:
        """All that were ever made, oldest first."""
        with reading(self._engine) as connection:
            return [_key(row) for row in connection.execute(sa.select(keys).order_by(keys.c.at, keys.c.key))]

    def revoke(self, key: str) -> Key:
        """At once, for ever. Raises: NotFound."""
        with writing(self._engine) as connection:
            alive = (keys.c.key == key) & keys.c.revoked_at.is_(None)
            if not connection.execute(keys.update().where(alive).values(revoked_at=_moment(self._clock()))).rowcount:
                raise NotFound(f"there is no key {printable(key)} that could be revoked")
            return _key(connection.execute(sa.select(keys).where(keys.c.key == key)).one())

    def authenticate(self, secret: str) -> Principal | None:
        """Who holds this secret; None when nobody does, any more."""
        match = _KEY.fullmatch(secret)
        if match is None:
            return None
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(keys).where(keys.c.key == match[1])).first()
        if row is None or not hmac.compare_digest(row.sha256, _hash(secret)):
            return None
        if self._is_over(row):
            return None
        return Principal(row.key, row.name, frozenset(row.scopes.split()), tuple(row.names.split()))

    def is_over(self, principal: Principal) -> bool:
        """Whether the key behind a principal was revoked or has expired since it was shown."""
        with reading(self._engine) as connection:
            row = connection.execute(sa.select(keys).where(keys.c.key == principal.id)).first()
        return row is not None and self._is_over(row)

    def _is_over(self, row: Row[Any]) -> bool:
        return row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= self._clock())


def check_key(name: str, scopes: Sequence[str], names: Sequence[str]) -> None:
    """Raises: BadReference."""
    if not re.fullmatch(SLUG, name):
        raise BadReference(f"the name of a key is a word like ci or alice-laptop, not {printable(name)}")
    strange = [scope for scope in scopes if scope not in SCOPES]
    if strange or not scopes:
        raise BadReference(f"scope {printable(strange[0]) if strange else '(none)'}: known are {', '.join(SCOPES)}")
    if not 1 <= len(names) <= MAX_PATTERNS:
        raise BadReference(f"{len(names)} patterns of names: a key has 1 to {MAX_PATTERNS}")
    for pattern in names:
        if not (_PATTERN.fullmatch(pattern) and is_name(pattern.replace("*", "a"))):
            raise BadReference(f"{printable(pattern)} is no pattern of names such as team/* or *")


def fits(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern in which * stands for any characters. Linear in time: no regular expression."""
    first, *rest = pattern.split("*")
    if not rest:
        return name == pattern
    if not name.startswith(first):
        return False
    position = len(first)
    for part in rest[:-1]:
        found = name.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return name.endswith(rest[-1]) and len(name) - len(rest[-1]) >= position


def same_secret(one: str, other: str) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def _key(row: Row[Any]) -> Key:
    return Key(
        key=row.key,
        name=row.name,
        scopes=tuple(row.scopes.split()),
        names=tuple(row.names.split()),
        actor=row.actor,
        at=datetime.fromisoformat(row.at),
        expires_at=None if row.expires_at is None else datetime.fromtimestamp(row.expires_at, UTC),
        revoked_at=None if row.revoked_at is None else datetime.fromisoformat(row.revoked_at),
    )
