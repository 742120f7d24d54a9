"""Who is asking: a header is somebody's key or nobody's, and nobody is never anybody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from hub.contract import Adapter
from hub.errors import BadReference, Forbidden, NotFound, Unauthorized
from hub.http.access import Access, own, seen, seen_adapters, seen_digest, unbounded
from hub.http.config import RegistryConfig
from hub.keys import Principal
from hub.registry import LocalHub

ADMIN, READ = "the-admin-key", "the-read-key"
TEAM = Principal("0123456789ab", "ci", frozenset({"read", "push"}), ("team/*",))
ALL = Principal("ba9876543210", "ada", frozenset({"admin"}))


@pytest.fixture
def hub(tmp_path: Path) -> LocalHub:
    return LocalHub(tmp_path / "home")


def asking(hub: LocalHub, authorization: str | None, config: RegistryConfig | None = None) -> Principal:
    access = Access(hub.keys, config or RegistryConfig(admin_key=ADMIN, read_key=READ))
    return asyncio.run(access.identify(authorization))


def test_the_keys_of_the_environment_have_their_scopes(hub: LocalHub) -> None:
    assert asking(hub, f"Bearer {ADMIN}") == Principal("admin", "admin", frozenset({"admin"}))
    assert asking(hub, f"bearer   {READ}") == Principal("reader", "reader", frozenset({"read"}))


def test_a_made_key_is_its_own_principal(hub: LocalHub) -> None:
    created = hub.keys.create("ci", ["push"], names=["team/*"], actor="ada")
    expected = Principal(created.key.key, "ci", frozenset({"push"}), ("team/*",))
    assert asking(hub, f"Bearer {created.secret}") == expected
    hub.keys.revoke(created.key.key)
    with pytest.raises(Unauthorized, match="unknown, revoked or expired"):
        asking(hub, f"Bearer {created.secret}")


@pytest.mark.parametrize(
    "header",
    ["", " ", "Bearer", "Bearer ", ADMIN, f"Basic {ADMIN}", f"Token {ADMIN}", f"Bearer {ADMIN} ", f"Bearer {ADMIN}x",
     f" Bearer {ADMIN}", f"Bearer\t{ADMIN}", f"Bearer {ADMIN}\n", f"Bearer {ADMIN},{READ}", f"Bearer {ADMIN} {READ}",
     f"Bearer {ADMIN.upper()}", f"Bearer {ADMIN[:-1]}", "Bearer \u00e9", "Bearer " + "x" * 100_000, "Bearer None",
     f"Bearer Bearer {ADMIN}", "Bearer anonymous", "Bearer admin"],
)  # fmt: skip
def test_a_header_that_is_not_understood_is_nobody(hub: LocalHub, header: str) -> None:
    everybody_reads = RegistryConfig(admin_key=ADMIN, read_key=READ, anonymous=frozenset({"read"}))
    for config in (None, everybody_reads):
        with pytest.raises(Unauthorized):
            asking(hub, header, config)


def test_without_a_header_there_is_nobody_unless_the_operator_says_so(hub: LocalHub) -> None:
    with pytest.raises(Unauthorized, match="this hub asks for a key"):
        asking(hub, None)
    somebody = asking(hub, None, RegistryConfig(anonymous=frozenset({"read"})))
    assert (somebody.scopes, somebody.holds("push")) == (frozenset({"read"}), False)


def test_a_hub_without_keys_in_its_environment_has_no_such_keys(hub: LocalHub) -> None:
    for header in (f"Bearer {ADMIN}", "Bearer ", "Bearer None", "Bearer admin"):
        with pytest.raises(Unauthorized):
            asking(hub, header, RegistryConfig())


def test_what_a_key_does_not_see_is_told_in_the_words_of_what_is_not_there() -> None:
    assert seen(TEAM, "team/legal") == "team/legal"
    with pytest.raises(NotFound, match=r"^there is no adapter other/legal$"):
        seen(TEAM, "other/legal")
    with pytest.raises(BadReference):
        seen(ALL, "../legal")


def test_a_key_writes_under_its_own_names_alone() -> None:
    assert own(TEAM, "team/legal") == "team/legal"
    with pytest.raises(Forbidden, match=r"key ci is for the names team/\*, not for other/legal"):
        own(TEAM, "other/legal")
    with pytest.raises(BadReference):
        own(ALL, "team/../legal")


def test_what_concerns_the_whole_hub_is_for_keys_of_all_of_it() -> None:
    assert unbounded(ALL) is ALL
    with pytest.raises(Forbidden):
        unbounded(TEAM)


def test_a_digest_is_seen_under_any_of_its_names(hub: LocalHub, adapter: Path) -> None:
    digest = hub.push(adapter, "other/legal").digest
    for principal, found in ((TEAM, digest), (ALL, "sha256:" + "0" * 64)):
        with pytest.raises(NotFound, match=f"^no adapter here has the digest {found}$"):
            seen_digest(principal, hub, found)
    assert seen_digest(ALL, hub, digest) == digest
    hub.push(adapter, "team/legal")
    assert seen_digest(TEAM, hub, digest) == digest
    hub.remove("team/legal", 1)
    with pytest.raises(NotFound):
        seen_digest(TEAM, hub, digest)
    with pytest.raises(BadReference):
        seen_digest(ALL, hub, "sha256:../../x")


def test_a_listing_holds_what_is_seen() -> None:
    adapters = [Adapter(name, (), {}) for name in ("team/a", "other/b", "team", "team/c")]
    assert [adapter.name for adapter in seen_adapters(TEAM, adapters)] == ["team/a", "team/c"]
