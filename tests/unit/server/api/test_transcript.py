from __future__ import annotations

import pytest

from server.api.transcript import Piece, Transcript, join
from server.errors import EngineFailed
from server.records import Event, Failed, Finished, PromptScored, Sampled, TokenScore
from server.text.tokenizer import Tokenizer
from tests.unit.server.text.tokenizers_for_tests import byte_level


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level())


def begin(
    tokenizer: Tokenizer,
    *,
    stops: tuple[str, ...] = (),
    stop_ids: frozenset[int] = frozenset(),
    echo: str | None = None,
) -> Transcript:
    prompt = tokenizer.encode("Hello")
    return Transcript(tokenizer.vocabulary, prompt, stops=stops, stop_token_ids=stop_ids, echo=echo)


def tokens(tokenizer: Tokenizer, text: str, *, scored: bool = False) -> list[Event]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [Sampled(token_id, TokenScore(token_id, -1.0) if scored else None, 3) for token_id in ids]


def read(transcript: Transcript, events: list[Event]) -> list[Piece]:
    pieces = []
    for event in events:
        pieces.append(transcript.read(event))
        if transcript.ended:
            break
    return pieces


def test_the_pieces_are_the_text_and_the_last_says_how_it_ended(tokenizer: Tokenizer) -> None:
    events = tokens(tokenizer, "Graft the apple")
    pieces = read(begin(tokenizer), [*events, Finished("stop", 5, len(events) + 1, 2, 1)])
    whole = join(pieces)
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("Graft the apple", "stop", None)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * len(events)


def test_a_stop_string_ends_the_choice_before_the_engine_does(tokenizer: Tokenizer) -> None:
    transcript = begin(tokenizer, stops=("the",))
    events = tokens(tokenizer, "Graft the apple onto the quince")
    whole = join(read(transcript, events))
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("Graft ", "stop", "the")
    assert transcript.ended
    assert transcript.generated < len(events), "tokens after the stop string do not count"
    assert transcript.cached == 3, "known although the engine never said Finished"


def test_a_stop_string_that_only_the_end_completes_still_counts_as_one(tokenizer: Tokenizer) -> None:
    half = next(one for one in range(len(tokenizer.vocabulary)) if tokenizer.vocabulary.piece(one) == b"\xf0")
    whole = join(read(begin(tokenizer, stops=("\ufffd",)), [Sampled(half), Finished("length", 5, 1, 0)]))
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("", "stop", "\ufffd")


def test_every_token_that_counts_has_its_score_though_its_text_was_held(tokenizer: Tokenizer) -> None:
    transcript = begin(tokenizer, stops=("quince!",))
    events = tokens(tokenizer, "the quince.", scored=True)
    whole = join(read(transcript, [*events, Finished("length", 5, len(events), 0)]))
    assert len(whole.scores) == len(whole.token_ids) == transcript.generated == len(events)


def test_a_token_that_was_asked_to_stop_is_named_and_the_bases_own_end_is_not(tokenizer: Tokenizer) -> None:
    asked = begin(tokenizer, stop_ids=frozenset({9}))
    assert asked.read(Finished("stop", 5, 1, 0, 9)).stop_reason == 9
    assert begin(tokenizer).read(Finished("stop", 5, 1, 0, 1)).stop_reason is None


def test_an_echo_comes_before_the_first_text_with_the_prompts_scores(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Hello")
    scores = tuple(TokenScore(token_id, -2.0) for token_id in prompt[1:])
    transcript = begin(tokenizer, echo="Hello")
    pieces = read(
        transcript, [PromptScored(scores), *tokens(tokenizer, " there", scored=True), Finished("length", 1, 1, 0)]
    )
    whole = join(pieces)
    assert whole.text == "Hello there"
    assert whole.scores[0] is None
    assert len(whole.scores) == len(whole.token_ids)


def test_an_echo_of_a_prompt_that_is_only_scored_is_one_piece(tokenizer: Tokenizer) -> None:
    assert begin(tokenizer, echo="Hello").read(Finished("length", 1, 0, 0)).text == "Hello"


def test_a_stop_string_in_the_echo_stops_nothing(tokenizer: Tokenizer) -> None:
    transcript = begin(tokenizer, echo="Hello", stops=("Hello",))
    whole = join(read(transcript, [*tokens(tokenizer, " there"), Finished("length", 1, 1, 0)]))
    assert whole.text == "Hello there"


def test_a_failure_is_raised_anew_for_each_request(tokenizer: Tokenizer) -> None:
    error = EngineFailed("the step failed")
    caught = []
    for _ in range(2):
        with pytest.raises(EngineFailed, match="the step failed") as info:
            begin(tokenizer).read(Failed(error))
        caught.append(info.value)
    assert caught[0] is not caught[1] is not error
