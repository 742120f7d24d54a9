"""The grammar of references and mixtures."""

import pytest

from hub.errors import BadReference
from hub.ref import Reference, Term, check_alias, check_name, parse_mixture, parse_reference

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("legal", Reference("legal")),
        ("team/legal", Reference("team/legal")),
        ("legal@3", Reference("legal", "3")),
        ("legal@prod", Reference("legal", "prod")),
        ("team/legal@v1.2", Reference("team/legal", "v1.2")),
        (f"legal@{DIGEST}", Reference("legal", DIGEST)),
        ("legal@sha256:abcdef012345", Reference("legal", "sha256:abcdef012345")),
        ("0", Reference("0")),
        ("a" * 96, Reference("a" * 96)),
    ],
)
def test_a_reference_is_a_name_and_perhaps_a_selector(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected
    assert str(expected) == text


def test_a_selector_is_a_version_an_alias_or_a_digest() -> None:
    assert parse_reference("legal@3").version == 3
    assert parse_reference("legal@prod").alias == "prod"
    assert parse_reference(f"legal@{DIGEST}").digest == DIGEST
    assert parse_reference("legal@3").alias is None
    assert parse_reference("legal").version is None
    assert parse_reference("legal").alias is None


@pytest.mark.parametrize(
    "text",
    [
        "", "@prod", "legal@", "legal@0", "legal@007", "legal@99999999999999999999", "legal@Prod", "legal@a b",
        "legal@sha256:abc", "legal@sha256:" + "AB" * 32, "legal@md5:abcdef012345", "legal@prod@2", "a/b/c", "/legal",
        "legal/", "-legal", ".legal", "..", "../etc", "a/../b", "a\\b", "~/x", "legal\n", "légal", "legal ", "a" * 97,
        "legal\x00", "٣", "legal@٣", "x" * 5000,
    ],
)  # fmt: skip
def test_what_the_grammar_does_not_allow_is_refused(text: str) -> None:
    with pytest.raises(BadReference):
        parse_reference(text)


@pytest.mark.parametrize("name", ["../etc/passwd", "..", "a/..", "/etc", "~root", "a\\..\\b"])
def test_a_name_that_looks_like_a_path_is_told_so(name: str) -> None:
    with pytest.raises(BadReference, match="looks like a path"):
        check_name(name)


def test_capital_letters_get_a_suggestion() -> None:
    with pytest.raises(BadReference, match="did you mean team/legal"):
        check_name("Team/Legal")


def test_an_alias_is_no_number() -> None:
    assert check_alias("prod-2") == "prod-2"
    with pytest.raises(BadReference, match="numbers are versions"):
        check_alias("2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("legal", (Term(Reference("legal")),)),
        ("legal@prod*0.7+tone*0.3", (Term(Reference("legal", "prod"), 0.7), Term(Reference("tone"), 0.3))),
        ("legal+legal*-1", (Term(Reference("legal")), Term(Reference("legal"), -1.0))),
        ("legal*2e-3", (Term(Reference("legal"), 0.002),)),
    ],
)
def test_a_mixture_is_a_sum_of_weighted_references(text: str, expected: tuple[Term, ...]) -> None:
    assert parse_mixture(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "+", "legal+", "legal*", "legal*x", "legal*nan", "legal*inf", "legal*1e999", "legal*0.7*2", "legal * 0.7",
     "legal*.5", "legal*1_0", "legal*٣", "+".join(["a"] * 65)],
)  # fmt: skip
def test_a_mixture_with_a_bad_term_is_refused(text: str) -> None:
    with pytest.raises(BadReference):
        parse_mixture(text)


def test_a_refusal_shows_no_control_characters() -> None:
    with pytest.raises(BadReference) as refusal:
        parse_reference("x\x1b[31m\n")
    assert str(refusal.value).isprintable()
