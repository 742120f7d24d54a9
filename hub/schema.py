"""The tables of the catalogue and how their database is opened: SQLite now, written so that others can follow.

Migrations ship with the package and run at opening, in one transaction under the write lock, so that of many processes
one makes them and the others find them made. The write-ahead log with synchronous=FULL makes every commit durable, and
readers never wait for a writer.
Law: the tables here are the tables that the migrations make (a test compares them).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from hub.errors import HubUnavailable

REVISION = "0003"
BUSY_TIMEOUT_S = 60.0
MAX_CONNECTIONS = 128  # more than the threads of any process of ours: none ever waits for another's
MIGRATIONS = Path(__file__).parent / "migrations"
WRITES = "hub_writes"

metadata = sa.MetaData()

manifests = sa.Table(
    "manifests",
    metadata,
    sa.Column("digest", sa.String(71), primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("base", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False, index=True),
    sa.Column("body", sa.Text, nullable=False),
)
files = sa.Table(
    "files",
    metadata,
    sa.Column("digest", sa.String(71), sa.ForeignKey("manifests.digest"), primary_key=True),
    sa.Column("path", sa.String(128), primary_key=True),
    sa.Column("sha256", sa.String(64), nullable=False, index=True),
)
# Which versions of which names an adapter is nothing without: a router its experts.
pins = sa.Table(
    "pins",
    metadata,
    sa.Column("digest", sa.String(71), sa.ForeignKey("manifests.digest"), primary_key=True),
    sa.Column("name", sa.String(193), primary_key=True),
    sa.Column("pinned", sa.String(71), primary_key=True, index=True),
)
versions = sa.Table(
    "versions",
    metadata,
    sa.Column("name", sa.String(193), primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("digest", sa.String(71), nullable=False, index=True),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("removed_at", sa.String(40)),
)
_LIVE = versions.c.removed_at.is_(None)
sa.Index(
    "one_live_version_per_digest",
    versions.c.name,
    versions.c.digest,
    unique=True,
    sqlite_where=_LIVE,
)
aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("name", sa.String(193), primary_key=True),
    sa.Column("alias", sa.String(96), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["name", "version"], ["versions.name", "versions.version"]),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("name", sa.String(193), nullable=False, index=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("alias", sa.String(96)),
    sa.Column("digest", sa.String(71)),
    sa.Column("previous", sa.Integer),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("rollback", sa.Boolean, nullable=False),
    sqlite_autoincrement=True,
)
leases = sa.Table(
    "leases",
    metadata,
    sa.Column("lease", sa.String(32), primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("expires_at", sa.Float, nullable=False),
)
# An upload over the network: its lease keeps its blobs, `owner` is the key that began it, `files` what it will hold.
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("lease", sa.String(32), primary_key=True),
    sa.Column("owner", sa.String(32), nullable=False),
    sa.Column("name", sa.String(193), nullable=False),
    sa.Column("files", sa.Text, nullable=False),
)
keys = sa.Table(
    "keys",
    metadata,
    sa.Column("key", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(96), nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("scopes", sa.Text, nullable=False),
    sa.Column("names", sa.Text, nullable=False),
    sa.Column("actor", sa.Text, nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.String(40)),
)


def open_database(path: Path) -> Engine:
    """The database in a file, made or brought up to date first.

    Raises: HubUnavailable.
    """
    engine = _engine(path)
    try:
        if not (path.exists() and _revision(engine) == REVISION):
            _use_write_ahead_log(path)
            _migrate(engine)
    except (OSError, sqlite3.Error, sa.exc.DBAPIError) as error:
        raise HubUnavailable(f"the hub's catalogue cannot be opened: {_reason(error)}") from error
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One consistent view. Raises: HubUnavailable."""
    with _refusals(), engine.begin() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction that holds the write lock from its start. Raises: HubUnavailable."""
    with _refusals(), engine.connect().execution_options(**{WRITES: True}) as connection, connection.begin():
        yield connection


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except sa.exc.OperationalError as error:
        raise HubUnavailable(f"the hub's catalogue refused: {_reason(error)}") from error
    except sa.exc.DatabaseError as error:
        if isinstance(error, sa.exc.IntegrityError):
            raise
        raise HubUnavailable(f"the hub's catalogue is damaged: {_reason(error)}") from error


def _engine(path: Path) -> Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"timeout": BUSY_TIMEOUT_S},
        max_overflow=MAX_CONNECTIONS,
    )

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself; we do, below
        for pragma in ("synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get(WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _use_write_ahead_log(path: Path) -> None:
    """Stands in the file from then on. SQLite's own timeout does not cover this change, so we wait ourselves."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        finally:
            connection.close()
        time.sleep(0.02)


def _migrate(engine: Engine) -> None:
    # Loaded only when there is something to do: it takes longer than any command of the hub.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    found = _revision(engine)
    if found is not None and found not in known:
        raise HubUnavailable(
            f"the hub's catalogue has revision {found}, but this version of multigraft knows none after "
            f"{REVISION}; upgrade multigraft"
        )
    with writing(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _revision(engine: Engine) -> str | None:
    with engine.begin() as connection:
        tables = connection.scalars(sa.text("SELECT name FROM sqlite_master WHERE name = 'alembic_version'")).all()
        return connection.scalar(sa.text("SELECT version_num FROM alembic_version")) if tables else None


def _reason(error: Exception) -> str:
    original = getattr(error, "orig", None) or error
    return getattr(original, "strerror", None) or str(original)
