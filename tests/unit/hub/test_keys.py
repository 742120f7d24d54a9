"""Keys: kept as hashes, held to their scopes and names, and nobody's once they are revoked or expired."""

from __future__ import annotations

import math
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hub.errors import BadReference, NotFound
from hub.keys import MAX_LIFE_S, MAX_PATTERNS, SCOPES, Principal, Scope, fits, same_secret
from hub.registry import LocalHub
from tests.unit.hub.test_registry import Clock

HOUR_S = 3600.0
ID_CHARACTERS = len("mgk_0123456789ab_")  # what of a key may be known: its id
OTHER_SECRET = "mgk_0123456789ab_" + "A" * 43

# Small alphabets, so that names and patterns meet often; `*` is what a pattern has beyond a name.
names = st.text("ab/.", max_size=12)
patterns = st.text("ab/.*", max_size=12)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hub(tmp_path: Path, clock: Clock) -> LocalHub:
    return LocalHub(tmp_path / "home", clock=clock)


def test_a_key_is_told_once_and_kept_as_a_hash(hub: LocalHub) -> None:
    created = hub.keys.create("ci", ["push", "read"], names=["team/*"], actor="ada")
    assert re.fullmatch(r"mgk_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", created.secret)
    assert hub.keys.listed() == [created.key]
    assert created.secret not in repr(created.key)
    for path in hub.home.rglob("*"):
        assert not path.is_file() or created.secret[ID_CHARACTERS:].encode() not in path.read_bytes(), path.name


def test_whoever_holds_a_key_is_known_by_it(hub: LocalHub) -> None:
    created = hub.keys.create("ci", ["push", "read", "push"], names=["team/*", "tone", "team/*"], actor="ada")
    found = hub.keys.authenticate(created.secret)
    assert found == Principal(created.key.key, "ci", frozenset({"push", "read"}), ("team/*", "tone"))
    assert (created.key.scopes, created.key.names, created.key.actor) == (("push", "read"), ("team/*", "tone"), "ada")


def test_two_keys_of_one_name_are_two_keys(hub: LocalHub) -> None:
    one, other = (hub.keys.create("ci", ["read"], actor="ada") for _ in range(2))
    assert one.secret != other.secret
    hub.keys.revoke(one.key.key)
    assert hub.keys.authenticate(one.secret) is None
    assert hub.keys.authenticate(other.secret) is not None


def test_one_wrong_character_anywhere_makes_it_nobodys(hub: LocalHub) -> None:
    secret = hub.keys.create("ci", ["admin"], actor="ada").secret
    for index, right in enumerate(secret):
        wrong = "0" if right != "0" else "1"
        assert hub.keys.authenticate(secret[:index] + wrong + secret[index + 1 :]) is None, index


@pytest.mark.parametrize("change", ["", "{}\n", "{} ", " {}", "{}x", "{:.59}", "{}{}"])
def test_what_only_looks_like_a_key_is_nobodys(hub: LocalHub, change: str) -> None:
    secret = hub.keys.create("ci", ["admin"], actor="ada").secret
    assert hub.keys.authenticate(change.format(secret, secret)) is None
    assert hub.keys.authenticate(OTHER_SECRET) is None
    mixed = secret[:ID_CHARACTERS] + OTHER_SECRET[ID_CHARACTERS:]
    assert hub.keys.authenticate(mixed) is None, "the id of one, the rest of another"


def test_a_key_ends_when_its_life_does(hub: LocalHub, clock: Clock) -> None:
    created = hub.keys.create("ci", ["read"], life_s=HOUR_S, actor="ada")
    for_ever = hub.keys.create("ada", ["read"], actor="ada")
    clock.now += HOUR_S - 1
    principal = hub.keys.authenticate(created.secret)
    assert principal is not None
    assert not hub.keys.is_over(principal)
    clock.now += 1
    assert hub.keys.authenticate(created.secret) is None
    assert hub.keys.is_over(principal)
    assert hub.keys.authenticate(for_ever.secret) is not None
    assert for_ever.key.expires_at is None


def test_a_revoked_key_is_nobodys_at_once_and_for_ever(hub: LocalHub) -> None:
    created = hub.keys.create("ci", ["read"], actor="ada")
    principal = hub.keys.authenticate(created.secret)
    assert principal is not None
    assert hub.keys.revoke(created.key.key).revoked_at is not None
    assert hub.keys.authenticate(created.secret) is None
    assert hub.keys.is_over(principal)
    for key in (created.key.key, "0" * 12, "", "../x", created.secret):
        with pytest.raises(NotFound, match="no key"):
            hub.keys.revoke(key)
    assert hub.keys.listed()[0].revoked_at is not None, "it stays in the list"


def test_a_principal_of_no_stored_key_is_never_over(hub: LocalHub) -> None:
    assert not hub.keys.is_over(Principal("admin", "admin", frozenset({"admin"})))


@pytest.mark.parametrize("life_s", [0.0, -1.0, math.nan, math.inf, -math.inf, MAX_LIFE_S * 1.1])
def test_a_life_that_would_not_end_as_it_says_is_refused(hub: LocalHub, life_s: float) -> None:
    with pytest.raises(BadReference, match="a life of"):
        hub.keys.create("ci", ["read"], life_s=life_s, actor="ada")
    assert hub.keys.listed() == []


@pytest.mark.parametrize(
    ("name", "scopes", "allowed", "reason"),
    [
        ("", ["read"], ["*"], "the name of a key"),
        ("../x", ["read"], ["*"], "the name of a key"),
        ("a b", ["read"], ["*"], "the name of a key"),
        ("ci\n", ["read"], ["*"], "the name of a key"),
        ("ci", [], ["*"], r"scope \(none\)"),
        ("ci", ["read", "root"], ["*"], "scope root: known are read, push, promote, admin"),
        ("ci", ["read push"], ["*"], "scope 'read push'"),
        ("ci", ["read"], [], "0 patterns"),
        ("ci", ["read"], ["x"] * (MAX_PATTERNS + 1), "65 patterns"),
        ("ci", ["read"], ["a b"], "'a b' is no pattern"),
        ("ci", ["read"], ["Team/*"], "is no pattern"),
        ("ci", ["read"], ["team/?"], "is no pattern"),
        ("ci", ["read"], [""], "is no pattern"),
        ("ci", ["read"], ["x" * 194], "is no pattern"),
        ("ci", ["read"], ["../*"], "is no pattern"),
        ("ci", ["read"], ["/etc/passwd"], "is no pattern"),
        ("ci", ["read"], ["team/"], "is no pattern"),
        ("ci", ["read"], ["a/*/b"], "is no pattern"),
        ("ci", ["read"], [".*"], "is no pattern"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(
    hub: LocalHub, name: str, scopes: list[str], allowed: list[str], reason: str
) -> None:
    with pytest.raises(BadReference, match=reason):
        hub.keys.create(name, scopes, names=allowed, actor="ada")
    assert hub.keys.listed() == []


@pytest.mark.parametrize("held", SCOPES)
def test_a_scope_is_itself_alone_and_admin_is_all(held: Scope) -> None:
    principal = Principal("x", "x", frozenset({held}))
    assert {scope for scope in SCOPES if principal.holds(scope)} == (set(SCOPES) if held == "admin" else {held})


def test_only_a_single_star_sees_the_whole_hub() -> None:
    assert Principal("x", "x", frozenset({"admin"}), ("team/*", "*")).unbounded
    for pattern in ("**", "team/*", "*/*"):
        assert not Principal("x", "x", frozenset({"admin"}), (pattern,)).unbounded


def test_a_name_is_seen_when_any_pattern_fits() -> None:
    principal = Principal("x", "x", frozenset({"read"}), ("team/*", "tone"))
    assert [name for name in ("team/a", "tone", "tone2", "team", "other/team/a") if principal.sees(name)] == [
        "team/a",
        "tone",
    ]


@st.composite
def names_and_patterns(draw: st.DrawFn) -> tuple[str, str]:
    """Any name with any pattern, or with one made of its own beginning and end, which may overlap."""
    name = draw(names)
    if draw(st.booleans()):
        return name, draw(patterns)
    cut = st.integers(0, len(name))
    return name, name[: draw(cut)] + draw(st.sampled_from(["*", "**", "*a*"])) + name[draw(cut) :]


@given(names_and_patterns())
@example(("aba", "ab*ba"))
def test_a_pattern_fits_what_fnmatch_says_it_does(both: tuple[str, str]) -> None:
    name, pattern = both
    assert fits(name, pattern) == fnmatchcase(name, pattern)


@given(st.lists(names, min_size=1, max_size=5), st.lists(st.text("ab/.", max_size=4), min_size=6, max_size=6))
def test_whatever_stands_for_the_stars_fits(parts: list[str], fillings: list[str]) -> None:
    name = "".join(part + filling for part, filling in zip(parts, fillings, strict=False))
    assert fits(name, "*".join([*parts, ""]))


def test_a_pattern_of_many_stars_is_answered_without_trying_every_way() -> None:
    assert not fits("a" * 193, "*a" * 96 + "b")
    assert fits("a" * 193, "*a" * 96 + "*")


def test_secrets_are_equal_only_when_they_are() -> None:
    assert same_secret("kéy", "kéy")
    assert not same_secret("key", "kez")
    assert not same_secret("key", "key2")
    assert not same_secret("key", "")
