"""Uploads: resumed where they stopped, believed only when the bytes hash to their name, seen by their own key alone."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.base import Base, Modules
from hub.digest import sha256_of
from hub.errors import (
    BadReference,
    BadUpload,
    HubUnavailable,
    Refused,
    TooLarge,
    UploadBusy,
    UploadGone,
)
from hub.manifest import CONFIG_FILE, GOLDEN_ROWS_FILE, METRICS_FILE, README_FILE, WEIGHTS_FILE
from hub.methods import Limits
from hub.ref import parse_reference
from hub.registry import LocalHub
from hub.strict_json import MAX_DEPTH
from hub.uploads import MAX_PARTS, PIECE_LIFE_S, Part, Piece, Upload
from hub.validate import config_bytes, describe, validate
from tests.unit.hub.makers import raw_safetensors
from tests.unit.hub.test_registry import LATER_S, Clock

OWNER, OTHER = "0123456789ab", "ba9876543210"
TEXT = b"a readme of some length, to be sent in pieces\n" * 20
PART = Part(README_FILE, len(TEXT), sha256_of(TEXT))
EXAMPLES = 40


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hub(tmp_path: Path, clock: Clock) -> LocalHub:
    return LocalHub(tmp_path / "home", clock=clock)


def begin(hub: LocalHub, *parts: Part, owner: str = OWNER) -> Upload:
    return hub.uploads.begin("team/legal", parts or (PART,), owner=owner)


def send(hub: LocalHub, upload: Upload, data: bytes, *, offset: int = 0, owner: str = OWNER, part: Part = PART) -> int:
    """One connection that brings some bytes; gives how far the piece has come."""
    with hub.uploads.piece(upload.upload, part.sha256, owner=owner, offset=offset) as piece:
        piece.write(data)
        if piece.whole:
            piece.finish()
        return piece.offset


@contextmanager
def sending(hub: LocalHub, upload: Upload, data: bytes, *, start: int = 0) -> Iterator[Piece]:
    """A connection that has brought some bytes of a piece and stays open."""
    with hub.uploads.piece(upload.upload, PART.sha256, owner=OWNER, offset=start) as piece:
        piece.write(data)
        yield piece


def offset(hub: LocalHub, upload: Upload, *, owner: str = OWNER) -> int | None:
    """Where the one file of an upload stands; None when it is whole."""
    missing = hub.uploads.state(upload.upload, owner=owner).missing
    return missing[0].offset if missing else None


def left(hub: LocalHub) -> list[str]:
    """Every file of blobs and pieces."""
    found = [*(hub.home / "blobs").rglob("*"), *(hub.home / "uploads").rglob("*")]
    return sorted(path.name for path in found if path.is_file())


def rows(hub: LocalHub, table: str) -> int:
    with sqlite3.connect(hub.home / "catalogue.sqlite") as database:
        (count,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)


def test_an_upload_is_told_what_is_missing_and_nothing_of_what_is_here(hub: LocalHub) -> None:
    other = Part(METRICS_FILE, 2, sha256_of(b"{}"))
    upload = begin(hub, PART, other)
    assert {(one.sha256, one.size, one.offset) for one in upload.missing} == {
        (PART.sha256, PART.size, 0),
        (other.sha256, 2, 0),
    }
    assert send(hub, upload, TEXT) == len(TEXT)
    assert [one.sha256 for one in hub.uploads.state(upload.upload, owner=OWNER).missing] == [other.sha256]
    assert [one.sha256 for one in begin(hub, PART, other).missing] == [other.sha256], "the next upload knows it too"
    assert left(hub) == [PART.sha256]


def test_a_push_run_again_goes_on_where_it_stopped(hub: LocalHub) -> None:
    send(hub, begin(hub), TEXT[:100])
    again = begin(hub)
    assert offset(hub, again) == 100
    send(hub, again, TEXT[100:300], offset=100)
    send(hub, again, TEXT[300:], offset=300)
    assert offset(hub, again) is None
    assert left(hub) == [PART.sha256]


def test_what_came_before_a_restart_of_the_hub_is_not_sent_again(hub: LocalHub, clock: Clock) -> None:
    upload = begin(hub)
    send(hub, upload, TEXT[:100])
    restarted = LocalHub(hub.home, clock=clock)
    assert offset(restarted, upload) == 100
    send(restarted, upload, TEXT[100:], offset=100)
    assert offset(restarted, upload) is None


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.booleans()), max_size=20))
def test_any_cutting_of_a_piece_into_connections_and_writes_gives_the_same_blob(cuts: list[tuple[int, bool]]) -> None:
    """Law. Each cut is a number of bytes, and whether the connection ends after them."""
    with TemporaryDirectory() as home:
        hub = LocalHub(Path(home))
        upload, position = begin(hub), 0
        pending = [*cuts, (len(TEXT), True)]
        while position < len(TEXT):
            with hub.uploads.piece(upload.upload, PART.sha256, owner=OWNER, offset=position) as piece:
                ends = False
                while not ends:
                    count, ends = pending.pop(0)
                    piece.write(TEXT[position : position + count])
                    position = min(position + count, len(TEXT))
                if piece.whole:
                    piece.finish()
        assert left(hub) == [PART.sha256]
        assert next(path for path in Path(home).rglob(PART.sha256)).read_bytes() == TEXT


@pytest.mark.parametrize("wrong", [b"X" + TEXT[1:], TEXT[:-1] + b"X", TEXT[::-1]])
def test_bytes_that_hash_to_another_name_leave_nothing(hub: LocalHub, wrong: bytes) -> None:
    upload = begin(hub)
    with pytest.raises(BadUpload, match=f"hash to {sha256_of(wrong)}, not to {PART.sha256}"):
        send(hub, upload, wrong)
    assert left(hub) == []
    assert offset(hub, upload) == 0
    send(hub, upload, TEXT)
    assert offset(hub, upload) is None, "the same upload can be put right"


def test_a_resumed_piece_is_hashed_from_its_beginning(hub: LocalHub) -> None:
    upload = begin(hub)
    send(hub, upload, b"X" * 100)
    with pytest.raises(BadUpload, match=r"README\.md hash to"):
        send(hub, upload, TEXT[100:], offset=100)
    assert left(hub) == []


def test_more_bytes_than_were_announced_leave_nothing(hub: LocalHub) -> None:
    upload = begin(hub)
    send(hub, upload, TEXT[:-1])
    with pytest.raises(BadUpload, match=f"more than the {len(TEXT)} bytes"):
        send(hub, upload, TEXT[-1:] + b"!", offset=len(TEXT) - 1)
    assert left(hub) == []


@pytest.mark.parametrize("size", [0, 1, len(TEXT) - 1, len(TEXT) + 1])
def test_a_size_that_is_not_the_blobs_never_passes(hub: LocalHub, size: int) -> None:
    send(hub, begin(hub), TEXT)
    lie = Part(README_FILE, size, PART.sha256)
    upload = begin(hub, lie)
    assert [(one.size, one.offset) for one in upload.missing] == [(size, 0)]
    with pytest.raises(BadUpload):
        send(hub, upload, TEXT[:size].ljust(size), part=lie)
    assert left(hub) == [PART.sha256]
    with pytest.raises(BadUpload, match="not whole yet"):
        hub.uploads.parts(upload.upload, owner=OWNER)


def test_a_piece_goes_on_at_its_end_and_nowhere_else(hub: LocalHub) -> None:
    upload = begin(hub)
    send(hub, upload, TEXT[:100])
    for wrong in (0, 99, 101, len(TEXT)):
        with pytest.raises(UploadBusy, match=f"goes on at byte 100, not {wrong}") as busy:
            send(hub, upload, b"", offset=wrong)
        assert busy.value.offset == 100
    send(hub, upload, TEXT[100:], offset=100)
    with pytest.raises(UploadBusy, match="is here already") as busy:
        send(hub, upload, b"")
    assert busy.value.offset == len(TEXT)


def test_only_one_connection_at_a_time_writes_a_piece(hub: LocalHub) -> None:
    upload, again = begin(hub), begin(hub)
    with sending(hub, upload, TEXT[:100]) as piece:
        for other in (upload, again):
            with pytest.raises(UploadBusy, match="by another push now") as busy:
                send(hub, other, TEXT[100:], offset=100)
            assert busy.value.offset == 100
        piece.write(TEXT[100:])
        piece.finish()
    assert left(hub) == [PART.sha256]


def test_a_lie_about_the_size_cannot_put_other_bytes_under_the_hands_of_a_writer(hub: LocalHub) -> None:
    """Law: nothing enters the blob store but bytes that hash to their name."""
    upload = begin(hub)
    with sending(hub, upload, TEXT[:100]) as piece:
        shorter = begin(hub, Part(README_FILE, 50, PART.sha256))
        assert [one.offset for one in shorter.missing] == [0]
        with pytest.raises(UploadBusy):
            send(hub, upload, b"X" * 100)
        piece.write(TEXT[100:])
        piece.finish()
    assert left(hub) == [PART.sha256]
    assert next(hub.home.rglob(PART.sha256)).read_bytes() == TEXT


def test_what_was_announced_too_short_before_makes_room_for_the_truth(hub: LocalHub) -> None:
    send(hub, begin(hub), TEXT[:100])
    shorter = Part(README_FILE, 50, PART.sha256)
    upload = begin(hub, shorter)
    assert offset(hub, upload) == 0
    assert left(hub) == []
    assert offset(hub, begin(hub)) == 0


def test_another_keys_upload_is_answered_like_one_that_never_was(hub: LocalHub) -> None:
    upload = begin(hub)
    send(hub, upload, TEXT[:100])
    never = "0" * 32
    for asked in (upload.upload, never):
        for ask in (
            lambda asked=asked: hub.uploads.state(asked, owner=OTHER),
            lambda asked=asked: hub.uploads.parts(asked, owner=OTHER),
            lambda asked=asked: send(hub, Upload(asked, ()), TEXT[100:], offset=100, owner=OTHER),
        ):
            with pytest.raises(UploadGone) as gone:
                ask()
            assert str(gone.value).replace(asked, never) == (
                f"there is no upload {never}, or it has expired; run the same command again"
            )
    assert offset(hub, upload) == 100


def test_two_keys_that_send_the_same_file_do_not_meet(hub: LocalHub) -> None:
    mine, theirs = begin(hub), begin(hub, owner=OTHER)
    send(hub, mine, TEXT[:100])
    assert offset(hub, theirs, owner=OTHER) == 0
    with sending(hub, mine, TEXT[100:200], start=100):
        send(hub, theirs, TEXT, owner=OTHER)
    assert offset(hub, mine) is None, "whose bytes they were does not matter once they are whole"


@pytest.mark.parametrize("upload", ["", "0" * 31, "0" * 33, "../" + "0" * 29, "G" * 32, "0" * 31 + "\n", "' OR 1=1 --"])
def test_what_is_no_upload_is_answered_like_one_that_has_expired(hub: LocalHub, upload: str) -> None:
    with pytest.raises(UploadGone, match="there is no upload"):
        hub.uploads.state(upload, owner=OWNER)


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, PART.sha256 + "\n", PART.sha256[:-1]])
def test_a_piece_that_is_named_by_no_sha256_is_refused(hub: LocalHub, sha256: str) -> None:
    upload = begin(hub)
    with pytest.raises(BadReference), hub.uploads.piece(upload.upload, sha256, owner=OWNER, offset=0):
        pass
    with (
        pytest.raises(BadUpload, match="holds no file"),
        hub.uploads.piece(upload.upload, "0" * 64, owner=OWNER, offset=0),
    ):
        pass
    assert left(hub) == []


def test_an_upload_expires_and_is_swept(hub: LocalHub, clock: Clock) -> None:
    upload = begin(hub)
    clock.now += LATER_S
    with pytest.raises(UploadGone):
        hub.uploads.state(upload.upload, owner=OWNER)
    hub.collect()
    assert (rows(hub, "uploads"), rows(hub, "leases")) == (0, 0)


def test_an_upload_lives_on_while_its_pieces_arrive(hub: LocalHub, clock: Clock) -> None:
    upload = begin(hub)
    for position in range(0, 300, 100):
        clock.now += LATER_S / 3
        send(hub, upload, TEXT[position : position + 100], offset=position)
    assert offset(hub, upload) == 300


def test_what_an_upload_has_brought_is_kept_until_it_expires(hub: LocalHub, clock: Clock) -> None:
    send(hub, begin(hub), TEXT)
    assert hub.collect().blobs == 0
    clock.now += LATER_S
    assert hub.collect().blobs == 1
    assert left(hub) == []


def test_pieces_that_nobody_goes_on_with_are_swept_after_a_day(hub: LocalHub, clock: Clock) -> None:
    send(hub, begin(hub), TEXT[:100])
    (piece,) = (hub.home / "uploads").rglob("*.part")
    clock.now = piece.stat().st_mtime + PIECE_LIFE_S - 1
    hub.collect()
    assert piece.exists()
    clock.now += 2
    hub.collect()
    assert left(hub) == []


def test_a_piece_that_is_being_written_is_never_swept(hub: LocalHub, clock: Clock) -> None:
    with sending(hub, begin(hub), TEXT[:100]) as piece:
        (path,) = (hub.home / "uploads").rglob("*.part")
        os.utime(path, (0, 0))
        hub.uploads.sweep()
        piece.write(TEXT[100:])
        piece.finish()
    assert left(hub) == [PART.sha256]


def test_a_link_in_the_place_of_a_piece_is_not_followed(hub: LocalHub, tmp_path: Path) -> None:
    upload = begin(hub)
    (tmp_path / "victim").write_text("precious")
    place = hub.home / "uploads" / OWNER / f"{PART.sha256}.part"
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "victim")
    with pytest.raises(OSError):
        send(hub, upload, TEXT)
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize(
    ("parts", "error", "reason"),
    [
        ([], BadUpload, "0 files"),
        ([Part(f"{number}.md", 1, "0" * 64) for number in range(MAX_PARTS + 1)], BadUpload, "17 files"),
        ([PART, PART], BadUpload, "stands twice"),
        ([Part("../README.md", 1, PART.sha256)], Refused, "is no part of an adapter"),
        ([Part("/etc/passwd", 1, PART.sha256)], Refused, "is no part of an adapter"),
        ([Part("optimizer.pt", 1, PART.sha256)], Refused, "is no part of an adapter"),
        ([Part("manifest.json", 1, PART.sha256)], Refused, "is no part of an adapter"),
        ([Part("README.md\0", 1, PART.sha256)], Refused, "is no part of an adapter"),
        ([Part(README_FILE, (1 << 20) + 1, PART.sha256)], TooLarge, "README.md has 1048577 bytes, above the limit"),
        ([Part(WEIGHTS_FILE, 1001, PART.sha256)], TooLarge, "above the limit of 1000"),
        ([Part(README_FILE, 1, "../x")], BadReference, "is no sha256"),
        ([Part(README_FILE, 1, PART.sha256.upper())], BadReference, "is no sha256"),
    ],
)
def test_an_upload_that_could_become_no_adapter_does_not_begin(
    tmp_path: Path, parts: list[Part], error: type[Exception], reason: str
) -> None:
    hub = LocalHub(tmp_path / "home", limits=Limits(max_weights_bytes=1000))
    with pytest.raises(error, match=reason):
        hub.uploads.begin("legal", parts, owner=OWNER)
    assert (rows(hub, "uploads"), rows(hub, "leases"), left(hub)) == (0, 0, [])


def test_an_upload_for_what_is_no_name_does_not_begin(hub: LocalHub) -> None:
    for name in ("../legal", "", "Legal", "a/b/c", "legal\0"):
        with pytest.raises(BadReference):
            hub.uploads.begin(name, [PART], owner=OWNER)
    assert rows(hub, "uploads") == 0


def test_an_upload_that_the_disk_has_no_room_for_does_not_begin(tmp_path: Path) -> None:
    hub = LocalHub(tmp_path / "home", limits=Limits(max_weights_bytes=1 << 62))
    with pytest.raises(HubUnavailable, match=f"this push needs {1 << 60}"):
        begin(hub, Part(WEIGHTS_FILE, 1 << 60, "0" * 64))
    assert (rows(hub, "uploads"), rows(hub, "leases")) == (0, 0)


def test_a_disk_that_is_full_is_told_and_loses_nothing(hub: LocalHub, tmp_path: Path) -> None:
    descriptor = os.open("/dev/full", os.O_RDWR)
    try:
        piece = Piece(descriptor, tmp_path / "piece", PART, 0, hub._blobs)
        with pytest.raises(HubUnavailable, match="disk is full; nothing is lost"):
            piece.write(TEXT)
    finally:
        os.close(descriptor)


@pytest.fixture
def described(adapter: Path) -> tuple[Base, Modules]:
    return describe(adapter, base=None)


def bring(hub: LocalHub, folder: Path, changes: Mapping[str, bytes] | None = None) -> Upload:
    """Everything of an adapter's folder arrives, some files with other bytes."""
    manifest = validate(folder)
    contents = {entry.path: (folder / entry.path).read_bytes() for entry in manifest.files}
    contents |= {CONFIG_FILE: config_bytes(manifest), **(changes or {})}
    parts = {name: Part(name, len(data), sha256_of(data)) for name, data in contents.items()}
    upload = begin(hub, *parts.values())
    for name, data in contents.items():
        if any(one.sha256 == parts[name].sha256 for one in upload.missing):
            send(hub, upload, data, part=parts[name])
    return upload


def commit(hub: LocalHub, upload: Upload, described: tuple[Base, Modules], *, owner: str = OWNER) -> str:
    base, modules = described
    return hub.commit_upload(upload.upload, owner=owner, base=base, modules=modules, actor="ci").digest


def test_what_was_brought_becomes_the_version_that_a_push_would_make(
    hub: LocalHub, tmp_path: Path, adapter: Path, described: tuple[Base, Modules]
) -> None:
    digest = commit(hub, bring(hub, adapter), described)
    assert digest == LocalHub(tmp_path / "other").push(adapter, "legal").digest
    assert hub.verify(parse_reference("team/legal@1")).digest == digest
    assert (rows(hub, "uploads"), rows(hub, "leases")) == (0, 0)


def test_an_upload_is_committed_once_and_by_its_own_key(
    hub: LocalHub, adapter: Path, described: tuple[Base, Modules]
) -> None:
    upload = bring(hub, adapter)
    with pytest.raises(UploadGone):
        commit(hub, upload, described, owner=OTHER)
    assert hub.adapters() == []
    commit(hub, upload, described)
    with pytest.raises(UploadGone):
        commit(hub, upload, described)
    assert hub.head() == 2


def test_what_has_not_all_arrived_is_not_committed(
    hub: LocalHub, adapter: Path, described: tuple[Base, Modules]
) -> None:
    parts = [Part(entry.path, entry.size, entry.sha256) for entry in validate(adapter).files]
    upload = begin(hub, *parts)
    with pytest.raises(BadUpload, match="2 files are not whole yet"):
        commit(hub, upload, described)
    assert hub.adapters() == []


def deep(levels: int) -> bytes:
    return b'{"a": ' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({CONFIG_FILE: b"{}"}, "peft_type"),
        ({WEIGHTS_FILE: raw_safetensors({})}, "is missing"),
        ({WEIGHTS_FILE: raw_safetensors(b"{}", length=99_000_000)}, "declares 99000000 bytes, above"),
        ({METRICS_FILE: deep(MAX_DEPTH + 1)}, "nested too deeply"),
        ({METRICS_FILE: deep(400)}, "nested too deeply"),
        ({METRICS_FILE: b"[1]"}, "must be a JSON object"),
        ({README_FILE: b"\xff"}, "no UTF-8"),
        ({README_FILE: b"\x80\x04pickle"}, "holds a pickle"),
        ({GOLDEN_ROWS_FILE: b"{}"}, "golden.safetensors"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_is_refused_and_what_it_brought_is_freed(
    hub: LocalHub, adapter: Path, described: tuple[Base, Modules], changes: Mapping[str, bytes], reason: str
) -> None:
    upload = bring(hub, adapter, changes)
    assert left(hub)
    with pytest.raises(Refused, match=reason):
        commit(hub, upload, described)
    with pytest.raises(UploadGone):
        hub.uploads.state(upload.upload, owner=OWNER)
    hub.collect()
    assert (left(hub), hub.adapters(), hub.head(), rows(hub, "leases")) == ([], [], 0, 0)


def test_a_config_in_another_form_than_the_kept_one_is_refused(
    hub: LocalHub, adapter: Path, described: tuple[Base, Modules]
) -> None:
    config = json.dumps(json.loads((adapter / CONFIG_FILE).read_text())).encode()
    with pytest.raises(Refused, match="was not sent in its canonical form"):
        commit(hub, bring(hub, adapter, {CONFIG_FILE: config}), described)
    assert hub.adapters() == []


def test_nesting_up_to_the_limit_is_kept_and_read_back(
    hub: LocalHub, adapter: Path, described: tuple[Base, Modules]
) -> None:
    digest = commit(hub, bring(hub, adapter, {METRICS_FILE: deep(MAX_DEPTH)}), described)
    assert hub.manifest(digest).metrics == json.loads(deep(MAX_DEPTH))


def test_a_pattern_that_could_take_for_ever_on_the_base_that_was_sent_is_refused(
    hub: LocalHub, tmp_path: Path, adapter: Path, described: tuple[Base, Modules]
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = {**json.loads((folder / CONFIG_FILE).read_text()), "target_modules": r".*.*.*.*(q_proj|v_proj)"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    base, modules = described
    commit(hub, bring(hub, folder), (base, modules))
    long = Modules(modules.linears, modules.others | {"a" * 256})
    with pytest.raises(Refused, match="on a module's name of 256 characters, above the limit"):
        commit(hub, bring(hub, folder), (base, long))


def test_a_refusal_of_very_many_problems_tells_the_first_of_them(
    hub: LocalHub, adapter: Path, described: tuple[Base, Modules]
) -> None:
    base, modules = described
    sizes = modules.linears["model.layers.0.self_attn.v_proj"]
    many = Modules({**modules.linears, **{f"x.{number}.v_proj": sizes for number in range(5000)}}, modules.others)
    with pytest.raises(Refused) as refused:
        commit(hub, bring(hub, adapter), (base, many))
    assert len(refused.value.problems) == 1001
    assert refused.value.problems[-1].reason == "has more problems; 9000 are not told"
