"""Laws of streaming text: chunking changes nothing, and the whole is what the tokenizer itself decodes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.stream import Detokenizer, StopScanner, TextStream
from server.text.vocabulary import Vocabulary, decode, read_vocabulary
from tests.unit.server.text.tokenizers_for_tests import byte_fallback, byte_level, word_piece

BACKENDS: dict[str, Any] = {make.__name__: make().backend_tokenizer for make in (byte_level, byte_fallback, word_piece)}
TABLES: dict[str, Vocabulary] = {name: read_vocabulary(backend) for name, backend in BACKENDS.items()}
FAMILIES = sorted(BACKENDS)
# Few letters, so that stop strings overlap each other and themselves.
LETTERS = "ab🌱"


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(TABLES[name]) - 1), max_size=24)


@st.composite
def chunked(draw: st.DrawFn, name: str) -> list[list[int]]:
    ids = draw(ids_of(name))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def stream(table: Vocabulary, chunks: list[list[int]], stops: list[str]) -> tuple[str, str | None, list[str]]:
    text = TextStream(table, stops=stops, opens_text=True)
    pieces = [text.push(chunk) for chunk in chunks]
    pieces.append(text.finish())
    return "".join(pieces), text.stopped_by, pieces


def cut_at_first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition, letter by letter: the first stop string to be complete ends the text, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(deadline=None)
def test_any_chunking_of_the_ids_gives_the_text_of_the_whole(name: str, data: st.DataObject) -> None:
    chunks = data.draw(chunked(name))
    ids = [token_id for chunk in chunks for token_id in chunk]
    assert stream(TABLES[name], chunks, [])[0] == decode(TABLES[name], ids)


@pytest.mark.parametrize("name", ["byte_level", "word_piece"])
@given(data=st.data())
@settings(deadline=None)
def test_the_text_of_any_ids_is_what_the_tokenizer_decodes(name: str, data: st.DataObject) -> None:
    ids = data.draw(ids_of(name))
    assert decode(TABLES[name], ids) == BACKENDS[name].decode(ids)


@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
@settings(deadline=None)
def test_with_byte_fallback_the_text_of_what_was_encoded_is_what_the_tokenizer_decodes(text: str) -> None:
    # Of ids that no text gives, where bytes are no characters, the tokenizer blanks valid neighbours too; we do not.
    ids = BACKENDS["byte_fallback"].encode(text, add_special_tokens=False).ids
    assert decode(TABLES["byte_fallback"], ids) == BACKENDS["byte_fallback"].decode(ids)


@pytest.mark.parametrize("name", FAMILIES)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=20))
@settings(deadline=None)
def test_no_piece_of_a_valid_text_holds_half_a_character(name: str, text: str) -> None:
    ids = BACKENDS[name].encode(text.replace("\ufffd", "")).ids
    for piece in stream(TABLES[name], [[token_id] for token_id in ids], [])[2]:
        assert "\ufffd" not in piece


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(deadline=None)
def test_stop_strings_cut_the_same_text_for_any_chunking(name: str, data: st.DataObject) -> None:
    chunks = data.draw(chunked(name))
    ids = [token_id for chunk in chunks for token_id in chunk]
    whole = decode(TABLES[name], ids)
    inner = st.integers(0, max(0, len(whole) - 1)).flatmap(
        lambda start: st.integers(start + 1, start + 5).map(lambda end: whole[start:end] or "x")
    )
    stops = data.draw(st.lists(st.one_of(inner, st.text(min_size=1, max_size=3)), min_size=1, max_size=3))
    text, stopped_by, _ = stream(TABLES[name], chunks, stops)
    assert (text, stopped_by) == cut_at_first_stop(whole, stops)


@given(
    pieces=st.lists(st.text(alphabet=LETTERS, max_size=4), max_size=8),
    stops=st.lists(st.text(alphabet=LETTERS, min_size=1, max_size=4), max_size=3),
)
def test_a_scanner_never_lets_a_part_of_a_stop_string_out_too_early(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    sent = ""
    for piece in pieces:
        sent += scanner.push(piece)
    whole, found = cut_at_first_stop("".join(pieces), stops)
    assert whole.startswith(sent)
    assert sent + scanner.flush() == whole
    assert scanner.found == found


@given(ids=ids_of("byte_level"))
def test_a_detokenizer_waits_for_at_most_three_bytes(ids: list[int]) -> None:
    table = TABLES["byte_level"]
    detokenizer = Detokenizer(table)
    sent = ""
    for count, token_id in enumerate(ids, start=1):
        sent += detokenizer.push(token_id)
        known = b"".join(table.piece(one) for one in ids[:count])
        assert len(known.decode(errors="replace")) - len(sent) <= 3
