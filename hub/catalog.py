"""Names, versions, aliases and their log: what every write to the catalogue means.

Every write is one transaction that takes the write lock first, so what it reads cannot change before it commits, and a
kill at any instant leaves the state before it or the state after it. Nothing here touches a blob.
Laws: versions are dense per name; one live version per name and digest; an alias always points to a live version; event
numbers only grow; what a live version pins is live itself and cannot be removed; a blob that a live version, what it
pins or an unexpired lease names is never given to be freed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from hub.contract import LATEST, Adapter, Event, EventKind, Pushed, Resolved, Version, places
from hub.errors import AliasMoved, BadReference, InUse, NotFound
from hub.ref import Reference, printable
from hub.schema import aliases, events, files, leases, manifests, pins, reading, versions, writing
from hub.strict_json import canonical

if TYPE_CHECKING:
    from hub.manifest import Manifest
    from hub.pins import Pin

_LIVE = versions.c.removed_at.is_(None)
_SHOWN_ROUTERS = 5


class LeaseLost(Exception):
    """A push was so slow that its lease ran out, and its blobs may be gone: it must put them again."""


class OtherBase(Exception):
    """The same bytes were pushed against a base of another shape or tokenizer; the message tells both."""


class PinLost(Exception):
    """What a push pins was removed while it ran; the message tells what."""


class By(NamedTuple):
    """Who did something, and why: what every event records."""

    actor: str
    note: str = ""


class Catalogue:
    """The database of one hub. Threads may share it; processes each open their own. Units: the clock in seconds."""

    def __init__(self, engine: Engine, *, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock

    def lease(self, lease: str, blobs: Collection[str], *, lease_s: float) -> None:
        """Keep blobs from being freed, whether they exist yet or not, until they are committed or the time is up."""
        expires_at = self._clock() + lease_s
        rows = [{"lease": lease, "sha256": sha256, "expires_at": expires_at} for sha256 in sorted(blobs)]
        with writing(self._engine) as connection:
            connection.execute(leases.insert(), rows)

    def release(self, lease: str) -> None:
        """Give a lease back."""
        with writing(self._engine) as connection:
            connection.execute(leases.delete().where(leases.c.lease == lease))

    def commit(
        self, lease: str, manifest: Manifest, *, name: str, moved: Sequence[str], pinned: Sequence[Pin], by: By
    ) -> Pushed:
        """Manifest, version and aliases in one step, and the lease is over.

        Raises: LeaseLost; OtherBase; PinLost.
        """
        blobs = {entry.sha256 for entry in manifest.files}
        with writing(self._engine) as connection:
            held = sa.select(sa.func.count()).select_from(leases).where(leases.c.lease == lease)
            if connection.scalar(held) != len(blobs):
                raise LeaseLost
            connection.execute(leases.delete().where(leases.c.lease == lease))
            self._check_live(connection, pinned)
            self._record(connection, manifest, pinned)
            live = sa.select(versions.c.version).where(
                versions.c.name == name, versions.c.digest == manifest.digest, _LIVE
            )
            found = connection.scalar(live)
            version = self._add_version(connection, name, digest=manifest.digest, by=by) if found is None else found
            for alias in dict.fromkeys((LATEST, *moved)):
                self._move(connection, name, alias, version=version, by=by)
            return Pushed(name, version, manifest.digest, created=found is None)

    def collect(self, stored: Iterable[tuple[str, int]], free: Callable[[str], None]) -> tuple[int, int]:
        """Free what nothing needs, under the write lock, so that no push can come to need it meanwhile.

        Gives the number of blobs freed and their bytes.
        """
        count = total = 0
        with writing(self._engine) as connection:
            connection.execute(leases.delete().where(leases.c.expires_at < self._clock()))
            live = sa.select(versions.c.digest).where(_LIVE)
            alive = live.union(sa.select(pins.c.pinned).where(pins.c.digest.in_(live)))
            connection.execute(pins.delete().where(pins.c.digest.not_in(alive)))
            connection.execute(files.delete().where(files.c.digest.not_in(alive)))
            connection.execute(manifests.delete().where(manifests.c.digest.not_in(alive)))
            needed = set(connection.scalars(sa.select(files.c.sha256).union(sa.select(leases.c.sha256))))
            for sha256, size in stored:
                if sha256 not in needed:
                    free(sha256)
                    count, total = count + 1, total + size
        return count, total

    def move_alias(self, name: str, alias: str, *, version: int, expect: int | None, by: By) -> Event | None:
        """Raises: AliasMoved when `expect` (0: nowhere) is given and wrong; NotFound for a version that is not live."""
        with writing(self._engine) as connection:
            self._live_digest(connection, name, version)
            current = self._alias(connection, name, alias)
            if expect is not None and expect != (current or 0):
                raise AliasMoved(
                    f"alias {alias} of {name} points to {_place(current)}, not to {_place(expect or None)} as "
                    "expected; nothing was moved"
                )
            return self._move(connection, name, alias, version=version, by=by)

    def rollback(self, name: str, alias: str, *, by: By) -> Event:
        """Raises: NotFound when there is no earlier place or the version there was removed."""
        with writing(self._engine) as connection:
            if self._alias(connection, name, alias) is None:
                raise NotFound(f"{name} has no alias {alias}")
            been = places(self._events(connection, events.c.name == name), alias)
            if len(been) < 2:
                raise NotFound(f"alias {alias} of {name} has been nowhere before {name}@{been[-1]}")
            before = been[-2]
            try:
                self._live_digest(connection, name, before)
            except NotFound as error:
                raise NotFound(
                    f"alias {alias} of {name} was at {name}@{before} before, which was removed; choose another: "
                    f"hub alias {name}@VERSION {alias}"
                ) from error
            event = self._move(connection, name, alias, version=before, by=by, rollback=True)
            assert event is not None, "two neighbouring places of an alias are never the same"
            return event

    def remove(self, name: str, version: int, *, by: By, sees: Callable[[str], bool]) -> Event:
        """A refusal names only adapters that `sees` allows. Raises: NotFound, InUse."""
        with writing(self._engine) as connection:
            digest = self._live_digest(connection, name, version)
            pointing = connection.scalars(
                sa.select(aliases.c.alias).where(aliases.c.name == name, aliases.c.version == version)
            ).all()
            live = sa.select(sa.func.count()).select_from(versions).where(versions.c.name == name, _LIVE)
            alone = connection.scalar(live) == 1
            holding = sorted(alias for alias in pointing if not (alone and alias == LATEST))
            if holding:
                raise InUse(
                    f"{name}@{version} is in use: {', '.join(holding)} {'points' if len(holding) == 1 else 'point'} "
                    f"there; move it first: hub alias {name}@VERSION {holding[0]}"
                )
            self._refuse_pinned(connection, name, version=version, digest=digest, sees=sees)
            connection.execute(aliases.delete().where(aliases.c.name == name, aliases.c.version == version))
            connection.execute(
                versions.update()
                .where(versions.c.name == name, versions.c.version == version)
                .values(removed_at=self._now())
            )
            return self._log(connection, "removed", name, version=version, digest=digest, by=by)

    def resolve(self, reference: Reference, *, default_alias: str) -> Resolved:
        """Raises: NotFound; BadReference for a short digest that fits two versions."""
        name = reference.name
        with reading(self._engine) as connection:
            if reference.digest is not None:
                return self._by_digest(connection, reference)
            alias = None if reference.version is not None else reference.alias or default_alias
            version = reference.version if alias is None else self._alias(connection, name, alias)
            if version is None:
                raise NotFound(self._why_no_alias(connection, name, str(alias)))
            return Resolved(name, version, self._live_digest(connection, name, version), alias)

    def manifest_text(self, digest: str) -> str:
        """Raises: NotFound, also for a manifest that only removed versions had."""
        live = sa.select(sa.literal(1)).where(versions.c.digest == manifests.c.digest, _LIVE).exists()
        with reading(self._engine) as connection:
            body = connection.scalar(sa.select(manifests.c.body).where(manifests.c.digest == digest, live))
        if body is None:
            raise NotFound(f"no adapter here has the digest {digest}")
        return body

    def adapters(self, pattern: str | None) -> list[Adapter]:
        """Every name with a live version that fits the pattern, in order."""
        described = manifests.c.kind, manifests.c.bytes, manifests.c.base, manifests.c.fingerprint
        listed = (
            sa.select(versions, *described)
            .join(manifests, manifests.c.digest == versions.c.digest)
            .where(_LIVE, _fits(versions.c.name, pattern))
            .order_by(versions.c.name, versions.c.version)
        )
        pointing = sa.select(aliases).where(_fits(aliases.c.name, pattern)).order_by(aliases.c.alias)
        with reading(self._engine) as connection:
            pointers = connection.execute(pointing).all()
            rows = connection.execute(listed).all()
        found: dict[str, list[Version]] = {}
        for row in rows:
            found.setdefault(row.name, []).append(_version(row))
        targets: dict[str, dict[str, int]] = {name: {} for name in found}
        for pointer in pointers:
            targets[pointer.name][pointer.alias] = pointer.version
        return [Adapter(name, tuple(listing), targets[name]) for name, listing in found.items()]

    def names_of(self, digest: str) -> list[str]:
        """Every name that has a live version with this digest."""
        with reading(self._engine) as connection:
            named = sa.select(versions.c.name).where(versions.c.digest == digest, _LIVE).order_by(versions.c.name)
            return list(connection.scalars(named))

    def counts(self) -> tuple[int, int]:
        """How many names, and how many versions, are live."""
        with reading(self._engine) as connection:
            counted = sa.select(sa.func.count(versions.c.name.distinct()), sa.func.count()).where(_LIVE)
            names, total = connection.execute(counted).one()
            return names, total

    def log(self, name: str) -> list[Event]:
        """Raises: NotFound when nothing ever happened to the name."""
        with reading(self._engine) as connection:
            found = self._events(connection, events.c.name == name)
        if not found:
            raise NotFound(f"there is no adapter {name}")
        return found

    def events(self, after: int, *, limit: int | None) -> list[Event]:
        with reading(self._engine) as connection:
            return self._events(connection, events.c.seq > after, limit=limit)

    def head(self) -> int:
        with reading(self._engine) as connection:
            return connection.scalar(sa.select(sa.func.max(events.c.seq))) or 0

    def _check_live(self, connection: Connection, pinned: Sequence[Pin]) -> None:
        for pin in pinned:
            here = versions.c.name == pin.name, versions.c.digest == pin.digest
            if connection.scalar(sa.select(versions.c.version).where(*here, _LIVE)) is None:
                raise PinLost(f"{pin} is no live version here")

    def _refuse_pinned(
        self, connection: Connection, name: str, *, version: int, digest: str, sees: Callable[[str], bool]
    ) -> None:
        """Raises: InUse while a live version pins this one."""
        pinning = (
            sa.select(versions.c.name, versions.c.version)
            .join(pins, pins.c.digest == versions.c.digest)
            .where(pins.c.name == name, pins.c.pinned == digest, _LIVE)
            .order_by(versions.c.name, versions.c.version)
        )
        holders = connection.execute(pinning).all()
        if holders:
            raise InUse(
                f"{name}@{version} is in use: {_held([f'{h.name}@{h.version}' for h in holders if sees(h.name)])}"
            )

    def _record(self, connection: Connection, manifest: Manifest, pinned: Sequence[Pin]) -> None:
        digest, base = manifest.digest, manifest.base
        known = connection.execute(sa.select(manifests).where(manifests.c.digest == digest)).first()
        if known is not None:
            if known.fingerprint != base.fingerprint:
                raise OtherBase(
                    f"these bytes were pushed against base {known.base} (fingerprint {known.fingerprint[:12]}) before, "
                    f"and {base.name} (fingerprint {base.fingerprint[:12]}) has another shape or tokenizer"
                )
            return
        body = canonical(manifest.model_dump(mode="json")).decode()
        row = {"digest": digest, "kind": manifest.kind, "bytes": manifest.bytes, "body": body}
        connection.execute(manifests.insert().values(**row, base=base.name, fingerprint=base.fingerprint))
        rows = [{"digest": digest, "path": entry.path, "sha256": entry.sha256} for entry in manifest.files]
        connection.execute(files.insert(), rows)
        for pin in pinned:
            connection.execute(pins.insert().values(digest=digest, name=pin.name, pinned=pin.digest))

    def _add_version(self, connection: Connection, name: str, *, digest: str, by: By) -> int:
        """Removed versions keep their row, so the largest number ever given is still there."""
        version = (self._last_version(connection, name) or 0) + 1
        row = {"name": name, "version": version, "digest": digest, "actor": by.actor, "note": by.note}
        connection.execute(versions.insert().values(**row, at=self._now()))
        self._log(connection, "pushed", name, version=version, digest=digest, by=by)
        return version

    def _move(
        self, connection: Connection, name: str, alias: str, *, version: int, by: By, rollback: bool = False
    ) -> Event | None:
        current = self._alias(connection, name, alias)
        if current == version:
            return None
        if current is None:
            connection.execute(aliases.insert().values(name=name, alias=alias, version=version))
        else:
            here = (aliases.c.name == name) & (aliases.c.alias == alias)
            connection.execute(aliases.update().where(here).values(version=version))
        return self._log(
            connection,
            "alias_moved",
            name,
            version=version,
            alias=alias,
            digest=self._live_digest(connection, name, version),
            previous=current,
            by=by,
            rollback=rollback,
        )

    def _log(self, connection: Connection, kind: EventKind, name: str, *, by: By, **facts: Any) -> Event:
        row = {"kind": kind, "name": name, "alias": None, "previous": None, "rollback": False, **facts}
        row |= {"actor": by.actor, "note": by.note, "at": self._now()}
        (seq,) = connection.execute(events.insert().values(**row)).inserted_primary_key or (0,)
        return _event(connection.execute(sa.select(events).where(events.c.seq == seq)).one())

    def _alias(self, connection: Connection, name: str, alias: str) -> int | None:
        return connection.scalar(sa.select(aliases.c.version).where(aliases.c.name == name, aliases.c.alias == alias))

    def _live_digest(self, connection: Connection, name: str, version: int) -> str:
        row = connection.execute(
            sa.select(versions).where(versions.c.name == name, versions.c.version == version)
        ).first()
        if row is None:
            raise NotFound(self._why_no_version(connection, name, version))
        if row.removed_at is not None:
            raise NotFound(f"{name}@{version} was removed on {row.removed_at[:10]}")
        return row.digest

    def _by_digest(self, connection: Connection, reference: Reference) -> Resolved:
        name, digest = reference.name, str(reference.digest)
        fits = sa.select(versions).where(versions.c.name == name, versions.c.digest.startswith(digest))
        found = connection.execute(fits.order_by(versions.c.version)).all()
        rows = [row for row in found if row.removed_at is None]
        if not rows and found:
            raise NotFound(f"{name}@{found[-1].version}, {digest}, was removed on {found[-1].removed_at[:10]}")
        if not rows:
            if self._last_version(connection, name) is None:
                raise NotFound(f"there is no adapter {name}")
            raise NotFound(f"no version of {name} has a digest that starts with {digest}")
        if len(rows) > 1:
            fitting = ", ".join(str(row.version) for row in rows)
            raise BadReference(f"{digest} fits the versions {fitting} of {name}; give more of the digest")
        return Resolved(name, rows[0].version, rows[0].digest, None)

    def _why_no_version(self, connection: Connection, name: str, version: int) -> str:
        last = self._last_version(connection, name)
        if last is None:
            return f"there is no adapter {name}"
        return f"there is no {name}@{version}; the last version is {last}"

    def _why_no_alias(self, connection: Connection, name: str, alias: str) -> str:
        if self._last_version(connection, name) is None:
            return f"there is no adapter {name}"
        known = connection.scalars(sa.select(aliases.c.alias).where(aliases.c.name == name)).all()
        return f"{name} has no alias {printable(alias)}; it has {', '.join(sorted(known)) or 'none left'}"

    def _last_version(self, connection: Connection, name: str) -> int | None:
        """The largest number that a name has ever given out."""
        return connection.scalar(sa.select(sa.func.max(versions.c.version)).where(versions.c.name == name))

    def _events(self, connection: Connection, condition: Any, *, limit: int | None = None) -> list[Event]:
        rows = connection.execute(sa.select(events).where(condition).order_by(events.c.seq).limit(limit))
        return [_event(row) for row in rows]

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).isoformat()


def _fits(name: sa.ColumnElement[str], pattern: str | None) -> sa.ColumnElement[bool]:
    """Whether a name fits a pattern with * and ?; a name has small letters only, a pattern with others fits none."""
    if pattern is None:
        return sa.true()
    if not ("*" in pattern or "?" in pattern):
        return name == pattern
    if pattern != pattern.lower():
        return sa.false()
    like = pattern.replace("/", "//").replace("%", "/%").replace("_", "/_").replace("*", "%").replace("?", "_")
    return name.like(like, escape="/")


def _place(version: int | None) -> str:
    return "no version" if version is None else f"version {version}"


def _held(routers: Sequence[str]) -> str:
    """Who pins a version, and what to do about it."""
    if not routers:
        return "routers under names that you do not see pin it as their expert"
    shown = ", ".join(routers[:_SHOWN_ROUTERS])
    more = len(routers) - _SHOWN_ROUTERS
    named = (
        f"router {shown} pins" if len(routers) == 1 else f"routers {shown}{f' and {more} more' if more > 0 else ''} pin"
    )
    return f"{named} it as expert; remove {'that' if len(routers) == 1 else 'those'} first: hub rm {routers[0]}"


def _version(row: Row[Any]) -> Version:
    return Version(
        version=row.version,
        digest=row.digest,
        kind=row.kind,
        bytes=row.bytes,
        base=row.base,
        fingerprint=row.fingerprint,
        actor=row.actor,
        note=row.note,
        at=datetime.fromisoformat(row.at),
    )


def _event(row: Row[Any]) -> Event:
    return Event(**{**row._mapping, "at": datetime.fromisoformat(row.at)})
