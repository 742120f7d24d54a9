"""Laws of the grammar: what is printed is read back, and no text at all does anything but parse or be refused."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hub.errors import BadReference
from hub.ref import MAX_TERMS, SLUG, Reference, Term, format_mixture, parse_mixture, parse_reference

slugs = st.from_regex(rf"\A{SLUG}\Z")
names = slugs | st.tuples(slugs, slugs).map("/".join)
selectors = (
    st.none()
    | st.integers(1, 2**31 - 1).map(str)
    | slugs.filter(lambda slug: not slug.isdigit())
    | st.from_regex(r"\Asha256:[0-9a-f]{12,64}\Z")
)
references = st.builds(Reference, names, selectors)
weights = st.floats(allow_nan=False, allow_infinity=False)
mixtures = st.lists(st.builds(Term, references, weights), min_size=1, max_size=6).map(tuple)


@settings(deadline=None)
@given(references)
def test_a_reference_is_read_back_as_it_was_printed(reference: Reference) -> None:
    assert parse_reference(str(reference)) == reference


@settings(deadline=None)
@given(references)
def test_a_selector_is_exactly_one_of_its_three_sorts(reference: Reference) -> None:
    sorts = [reference.version, reference.alias, reference.digest]
    assert sum(sort is not None for sort in sorts) == (reference.selector is not None)


@settings(deadline=None)
@given(mixtures)
def test_a_mixture_is_read_back_as_it_was_printed(mixture: tuple[Term, ...]) -> None:
    assert parse_mixture(format_mixture(mixture)) == mixture


@settings(deadline=None)
@given(st.text() | st.text(alphabet="ab/@:.*+-019 sh\n", max_size=30))
def test_any_text_is_a_mixture_that_prints_the_same_or_is_refused(text: str) -> None:
    try:
        mixture = parse_mixture(text)
    except BadReference as refusal:
        assert str(refusal).isprintable()
    else:
        assert parse_mixture(format_mixture(mixture)) == mixture
        assert len(mixture) <= MAX_TERMS


@settings(deadline=None)
@given(references)
def test_no_reference_can_leave_a_folder(reference: Reference) -> None:
    parts = reference.name.split("/")
    assert all(part not in ("", ".", "..") and not part.startswith(".") for part in parts)
