"""Which terms of a mixture work at which position, and what of that a KV block's key holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.policy.reach import EVERYWHERE, FromLast, PromptEnds, Reach, Term, course, marks, pieces

reaches: st.SearchStrategy[Reach] = st.one_of(
    st.just(EVERYWHERE),
    st.builds(PromptEnds, st.integers(0, 4), st.integers(0, 4)),
    st.builds(FromLast, st.lists(st.integers(0, 1), min_size=1, max_size=2).map(tuple)),
)
terms = st.lists(st.builds(Term, st.sampled_from(["", "a*1.0", "b*0.5", "c*-2.0"]), reaches), max_size=4)
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=10)
virtuals = st.sampled_from([0, 1, 5])
GENERATED = 4


def works(reach: Reach, prompt: list[int], token: int) -> bool:
    """The same by the definition, token by token."""
    if isinstance(reach, PromptEnds):
        half = len(prompt) // 2
        return token < min(reach.first, half) or len(prompt) - min(reach.last, half) <= token < len(prompt)
    if isinstance(reach, FromLast):
        wanted = list(reach.tokens)
        starts = [at for at in range(len(prompt)) if prompt[at : at + len(wanted)] == wanted]
        return bool(starts) and token >= starts[-1]
    return True


@given(terms, prompts, virtuals, st.integers(0, 19), st.integers(0, 19))
def test_a_term_works_at_exactly_the_tokens_that_its_reach_means(
    terms: list[Term], prompt: list[int], virtual: int, one: int, other: int
) -> None:
    phases = course(terms, prompt, virtual=virtual, virtual_label="prefix")
    start, stop = sorted((one % (virtual + len(prompt) + GENERATED), other % (virtual + len(prompt) + GENERATED)))
    found = [indices for count, indices in pieces(phases, start, stop) for _ in range(count)]
    assert len(found) == stop - start
    for position, indices in zip(range(start, stop), found, strict=True):
        if position < virtual:
            assert indices == ()
            continue
        token = position - virtual
        assert indices == tuple(i for i, term in enumerate(terms) if works(term.reach, prompt, token))


@given(terms, prompts, virtuals, st.randoms(use_true_random=False))
def test_the_order_of_the_terms_changes_no_mark(
    terms: list[Term], prompt: list[int], virtual: int, random: st.DataObject
) -> None:
    shuffled = list(terms)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    end = virtual + len(prompt) + GENERATED
    one, other = (
        marks(course(each, prompt, virtual=virtual, virtual_label="prefix"), 0, end) for each in (terms, shuffled)
    )
    assert one == other


@given(terms, terms, prompts, prompts)
def test_two_courses_have_equal_marks_exactly_when_the_same_labels_work_at_every_position(
    terms: list[Term], others: list[Term], prompt: list[int], longer: list[int]
) -> None:
    """What lets a longer prompt reuse the blocks of a shorter one, unless they were computed otherwise."""
    whole = prompt + longer
    shown = len(prompt)

    def labels(terms: list[Term], prompt: list[int]) -> list[list[str]]:
        return [
            sorted(term.label for term in terms if term.label and works(term.reach, prompt, at)) for at in range(shown)
        ]

    same = labels(terms, prompt) == labels(others, whole)
    assert (marks(course(terms, prompt), 0, shown) == marks(course(others, whole), 0, shown)) == same


def test_what_comes_before_an_invocation_has_the_keys_of_the_bare_base() -> None:
    phases = course([Term("a*1.0", FromLast((1,)))], [0, 0, 0, 1, 0])
    assert marks(phases, 0, 3) == []
    assert [at for at, _ in marks(phases, 0, 5)] == [3]
