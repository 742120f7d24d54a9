"""Bytes by their sha256 in a directory."""

from io import BytesIO
from pathlib import Path

import pytest

from hub.blobs import DirectoryBlobs, gather, open_blob
from hub.digest import sha256_of
from hub.errors import BadReference, Corrupt, NotFound

DATA = b"some bytes" * 1000
NAME = sha256_of(DATA)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryBlobs:
    return DirectoryBlobs(tmp_path)


def stored_file(root: Path) -> Path:
    (path,) = (path for path in root.rglob(NAME))
    return path


def test_what_was_put_is_read_back_and_a_second_put_writes_nothing(store: DirectoryBlobs) -> None:
    assert store.put(BytesIO(DATA), NAME)
    assert not store.put(BytesIO(DATA), NAME)
    assert open_blob(store, NAME).read() == DATA
    assert list(store.stored()) == [(NAME, len(DATA))]


def test_bytes_of_another_name_are_not_stored(store: DirectoryBlobs, tmp_path: Path) -> None:
    with pytest.raises(Corrupt):
        store.put(BytesIO(b"other"), NAME)
    assert list(store.stored()) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("damage", [DATA[:-1], b"X" + DATA[1:], b"", DATA + b"x"])
def test_damaged_bytes_are_never_given_out_as_whole_and_a_new_put_mends_them(
    store: DirectoryBlobs, tmp_path: Path, damage: bytes
) -> None:
    store.put(BytesIO(DATA), NAME)
    stored_file(tmp_path).write_bytes(damage)
    with pytest.raises(Corrupt, match=NAME):
        open_blob(store, NAME).read()
    with pytest.raises(Corrupt, match=NAME):
        store.load(NAME, len(DATA))
    assert store.put(BytesIO(DATA), NAME)
    assert open_blob(store, NAME).read() == store.load(NAME, len(DATA)) == DATA


def test_a_blob_that_is_not_there_is_told(store: DirectoryBlobs) -> None:
    with pytest.raises(NotFound):
        open_blob(store, NAME).read()
    with pytest.raises(NotFound):
        store.load(NAME, len(DATA))
    store.delete(NAME)


@pytest.mark.parametrize("size", [0, len(DATA) - 1, len(DATA) + 1])
def test_a_blob_of_another_size_than_was_told_is_not_loaded(store: DirectoryBlobs, size: int) -> None:
    store.put(BytesIO(DATA), NAME)
    with pytest.raises(Corrupt, match=NAME):
        store.load(NAME, size)


def test_an_empty_blob_is_loaded(store: DirectoryBlobs) -> None:
    store.put(BytesIO(b""), sha256_of(b""))
    assert bytes(store.load(sha256_of(b""), 0)) == b""


@pytest.mark.parametrize("pieces", [[DATA], [DATA[:7], b"", DATA[7:]]])
def test_pieces_are_gathered_when_they_are_of_the_size_told(pieces: list[bytes]) -> None:
    assert gather(iter(pieces), len(DATA)) == DATA
    for size in (0, len(DATA) - 1, len(DATA) + 1):
        with pytest.raises(Corrupt):
            gather(iter(pieces), size)


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "", NAME.upper(), NAME[:-1], NAME + "0", f"{NAME}\n"])
def test_a_name_that_is_no_sha256_never_becomes_a_path(store: DirectoryBlobs, name: str) -> None:
    with pytest.raises(BadReference):
        open_blob(store, name).read()
    with pytest.raises(BadReference):
        store.put(BytesIO(DATA), name)
    with pytest.raises(BadReference):
        store.delete(name)


def test_leftovers_are_swept_once_they_are_old(store: DirectoryBlobs, tmp_path: Path) -> None:
    leftover = tmp_path / "tmp" / "unfinished"
    leftover.write_bytes(b"half")
    store.sweep(before=leftover.stat().st_mtime - 1)
    assert leftover.exists()
    store.sweep(before=leftover.stat().st_mtime + 1)
    assert not leftover.exists()
