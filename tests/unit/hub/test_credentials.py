"""Keys of remote hubs on this machine: for one origin and one reader."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from hub.credentials import FILE, check_url, forget_key, origin_of, store_key, stored_key
from hub.errors import BadReference, HubUnavailable

HUB = "https://hub.example"
PASSWORD = "hunter2"


def test_a_stored_key_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = store_key(tmp_path / "home", HUB, "one")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [FILE], "nothing is left beside it"


def test_a_file_that_others_could_read_is_closed_to_them_at_the_next_key(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"https://hub.example:443": "old"}))
    (tmp_path / FILE).chmod(0o644)
    path = store_key(tmp_path, "https://other.example", "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stored_key(tmp_path, HUB) == "old"


def test_a_key_is_given_to_its_own_origin_alone(tmp_path: Path) -> None:
    store_key(tmp_path, HUB, "secret")
    for same in (HUB, f"{HUB}/", f"{HUB}:443", "https://HUB.example", f"{HUB}/behind/a/path"):
        assert stored_key(tmp_path, same) == "secret", same
    for other in (
        "http://hub.example",
        "https://hub.example:8443",
        "http://hub.example:443",
        "https://hub.example.evil.example",
        "https://evil.example/hub.example",
        "https://sub.hub.example",
        "https://hub.exampl",
    ):
        assert stored_key(tmp_path, other) is None, other


def test_keys_of_many_hubs_stand_side_by_side(tmp_path: Path) -> None:
    store_key(tmp_path, HUB, "one")
    store_key(tmp_path, "http://localhost:8080", "two")
    store_key(tmp_path, HUB, "three")
    assert (stored_key(tmp_path, HUB), stored_key(tmp_path, "http://localhost:8080")) == ("three", "two")
    assert forget_key(tmp_path, HUB)
    assert not forget_key(tmp_path, HUB)
    assert (stored_key(tmp_path, HUB), stored_key(tmp_path, "http://localhost:8080")) == (None, "two")


def test_without_a_file_there_is_no_key(tmp_path: Path) -> None:
    assert stored_key(tmp_path / "nowhere", HUB) is None
    assert not forget_key(tmp_path / "nowhere", HUB)


@pytest.mark.parametrize(
    "url",
    [
        f"https://ada:{PASSWORD}@hub.example",
        f"https://ada:{PASSWORD}@hub.example?x",
        f"https://ada:{PASSWORD}@hub.example:port",
        f"https://{PASSWORD}@",
        f"https://hub.example\\@{PASSWORD}.example",
    ],
)
def test_an_address_with_a_user_is_refused_and_the_password_not_shown(tmp_path: Path, url: str) -> None:
    with pytest.raises(BadReference, match="no user and no password") as refused:
        store_key(tmp_path, url, "key")
    assert PASSWORD not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    ["", "hub.example", "ftp://hub.example", "file:///etc/passwd", "https://", "https:///x", "https://hub.example:0",
     "https://hub.example:99999", "https://hub.example:port", "https://hub.example?x=1", "https://hub.example#x",
     "https://hub .example", "https://hub.example\n", "https://hub.exämple", "https://[::1", "//hub.example"],
)  # fmt: skip
def test_what_is_no_address_of_a_hub_is_refused(url: str) -> None:
    with pytest.raises(BadReference):
        check_url(url)


def test_an_address_is_its_scheme_host_and_port() -> None:
    assert origin_of(check_url("https://Hub.Example/x/")) == "https://hub.example:443"
    assert origin_of(check_url("http://[::1]:8080")) == "http://::1:8080"
    assert check_url("http://hub.example/x/") == "http://hub.example/x"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"https://hub.example:443": 1}', '{"https://hub.example:443": []}'])
def test_a_damaged_file_is_told_and_left_as_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    for use in (lambda: stored_key(tmp_path, HUB), lambda: store_key(tmp_path, HUB, "new")):
        with pytest.raises(HubUnavailable, match=FILE):
            use()
    assert (tmp_path / FILE).read_text() == text


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HubUnavailable, match="cannot be"):
        store_key(tmp_path / "file", HUB, "key")
