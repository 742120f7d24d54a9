"""The catalogue's database: made by migrations, one process at a time, and never by a newer version's."""

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from hub.errors import HubUnavailable
from hub.schema import MIGRATIONS, REVISION, metadata, open_database, reading, writing


def test_the_migrations_make_the_tables_that_the_code_uses(tmp_path: Path) -> None:
    with reading(open_database(tmp_path / "c.sqlite")) as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_the_newest_migration_is_the_one_that_the_code_expects() -> None:
    assert ScriptDirectory(str(MIGRATIONS)).get_heads() == [REVISION]


def test_commits_are_durable(tmp_path: Path) -> None:
    with reading(open_database(tmp_path / "c.sqlite")) as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA synchronous")) == 2
        assert connection.scalar(text("PRAGMA foreign_keys")) == 1


def test_a_catalogue_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with writing(open_database(tmp_path / "c.sqlite")) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(HubUnavailable, match=r"revision 9999.*upgrade multigraft"):
        open_database(tmp_path / "c.sqlite")


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(HubUnavailable, match="not a database"):
        open_database(tmp_path / "c.sqlite")


def test_many_processes_may_open_a_new_catalogue_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, alembic.command, sqlalchemy as sa; from pathlib import Path\n"
        "from hub.schema import open_database, reading\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "with reading(open_database(Path(sys.argv[1]))) as c: c.execute(sa.text('SELECT * FROM events'))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "c.sqlite")]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(4)]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
