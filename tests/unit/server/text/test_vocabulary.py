from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models

from server.errors import StartupRefused
from server.text.vocabulary import PROBE, Vocabulary, decode, read_vocabulary
from tests.unit.server.text.tokenizers_for_tests import CONTROL, byte_fallback, byte_level, word_piece


@pytest.fixture
def table() -> Vocabulary:
    return read_vocabulary(byte_level().backend_tokenizer)


def test_special_tokens_add_nothing_to_a_text_but_have_a_name(table: Vocabulary) -> None:
    assert [table.piece(token_id) for token_id in range(3)] == [b"", b"", b""]
    assert [table.label(token_id) for token_id in range(3)] == list(CONTROL)


def test_an_added_token_that_is_not_special_is_text_spaces_included(table: Vocabulary) -> None:
    token_id = byte_level().convert_tokens_to_ids("<tool call>")
    assert table.piece(token_id) == b"<tool call>"


def test_half_a_character_has_a_label_of_its_own(table: Vocabulary) -> None:
    ids = byte_level().encode("🌱", add_special_tokens=False)
    halves = [
        token_id for token_id in range(3, 259) if len(table.piece(token_id)) == 1 and table.piece(token_id) > b"\x7f"
    ]
    assert decode(table, ids) == "🌱"
    assert len({table.label(token_id) for token_id in halves}) == len(halves)
    assert all(table.label(token_id).startswith("bytes:\\x") for token_id in halves)


def test_an_id_above_the_table_is_no_text(table: Vocabulary) -> None:
    assert table.piece(len(table) + 5) == b""


def test_the_first_word_of_a_text_loses_the_space_that_its_token_carries() -> None:
    wrapped = byte_fallback()
    table = read_vocabulary(wrapped.backend_tokenizer)
    ids = wrapped.encode("Hello there", add_special_tokens=False)
    assert decode(table, ids) == "Hello there"
    assert b"".join(table.piece(token_id) for token_id in ids) == b" Hello there"


def test_words_after_a_prompt_keep_their_spaces() -> None:
    table = read_vocabulary(byte_fallback().backend_tokenizer)
    assert table.opens_text([1]), "only a special token stands before"
    assert not table.opens_text([1, *byte_fallback().encode("Graft", add_special_tokens=False)])


def test_word_pieces_are_joined_as_their_decoder_joins_them() -> None:
    wrapped = word_piece()
    ids = wrapped.encode("the rootstock suits the garden", add_special_tokens=False)
    assert decode(read_vocabulary(wrapped.backend_tokenizer), ids) == wrapped.backend_tokenizer.decode(ids)


def test_a_tokenizer_that_does_not_decode_token_by_token_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: i for i, word in enumerate(PROBE, start=1)}}, "[UNK]"))
    backend.add_tokens(list(set(PROBE)))
    # Its decoder rewrites across the border of two tokens, which no token can know.
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ro", "R")])
    with pytest.raises(StartupRefused, match="does not decode token by token"):
        read_vocabulary(backend)
