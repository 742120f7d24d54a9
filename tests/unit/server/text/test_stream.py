from __future__ import annotations

import pytest

from server.text.stream import Detokenizer, StopScanner, TextStream
from server.text.vocabulary import Vocabulary, read_vocabulary
from tests.unit.server.text.tokenizers_for_tests import byte_fallback, byte_level


@pytest.fixture
def table() -> Vocabulary:
    return read_vocabulary(byte_level().backend_tokenizer)


def test_a_character_of_four_tokens_comes_out_with_its_last(table: Vocabulary) -> None:
    ids = byte_fallback().encode("🦊", add_special_tokens=False)[-4:]
    fallback = read_vocabulary(byte_fallback().backend_tokenizer)
    detokenizer = Detokenizer(fallback)
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "🦊"]


def test_half_a_character_at_the_end_is_shown_as_one_replacement(table: Vocabulary) -> None:
    first_byte = next(token_id for token_id in range(len(table)) if table.piece(token_id) == b"\xf0")
    stream = TextStream(table)
    assert stream.push([first_byte]) == ""
    assert stream.finish() == "\ufffd"


def test_what_may_become_a_stop_string_waits_until_it_cannot() -> None:
    scanner = StopScanner(["</end>"])
    assert [scanner.push(piece) for piece in ("a<", "/e", "n", "x", "</")] == ["a", "", "", "</enx", ""]
    assert scanner.flush() == "</"


def test_the_stop_string_and_all_after_it_are_dropped() -> None:
    scanner = StopScanner(["STOP"])
    assert scanner.push("one ST") + scanner.push("OP two") + scanner.push("three") + scanner.flush() == "one "
    assert scanner.found == "STOP"


def test_of_two_stop_strings_the_first_to_be_complete_wins() -> None:
    scanner = StopScanner(["abcd", "bc"])
    assert scanner.push("abcd") == "a"
    assert scanner.found == "bc"


def test_a_stop_string_that_fails_may_hold_the_beginning_of_one_that_does_not() -> None:
    scanner = StopScanner(["aab"])
    assert "".join(scanner.push(letter) for letter in "aaab") == "a"
    assert scanner.found == "aab"


def test_ids_after_a_stop_string_are_not_looked_at(table: Vocabulary) -> None:
    ids = byte_level().encode("one. two. three.", add_special_tokens=False)
    stream = TextStream(table, stops=["."])
    assert stream.push(ids) == "one"
    assert stream.push(ids) + stream.finish() == ""
    assert stream.stopped_by == "."
