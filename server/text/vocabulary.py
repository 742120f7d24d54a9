"""What each token id stands for, as bytes: one table, built when the server starts and never written again.

The table is what makes streams of text exact: the text of a sequence is the UTF-8 of its tokens' bytes joined, so an
incremental decoder is enough and nothing is decoded twice. It also spares the event loop every call into the
tokenizer, whose native half must not be entered while another thread changes its settings ("Already borrowed").
Law: `b"".join(pieces)` decoded equals the tokenizer's own decode, invalid bytes replaced (tests/laws/test_text_stream).
Source: the decoders ByteLevel, ByteFallback and Metaspace of the Hugging Face tokenizers library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from server.errors import StartupRefused

ANCHOR = "a"  # an ordinary letter to stand before a token, so that decoders which trim the first word trim nothing
PROBE = "Grafting: 3 buds, one rootstock; żółw — 接ぎ木 🌱\n\ttwo  spaces"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`pieces[id]` is what the token adds to a text, `first[id]` what it adds when it opens one.

    Special tokens add nothing; `names` keeps what they are called. An id without a token adds nothing either.
    """

    pieces: tuple[bytes, ...]
    first: tuple[bytes, ...]
    names: dict[int, str]
    longest: int  # bytes of the longest piece

    def __len__(self) -> int:
        return len(self.pieces)

    def piece(self, token_id: int) -> bytes:
        """Ids above the table exist in bases whose embedding is padded; they are no text."""
        return self.pieces[token_id] if token_id < len(self.pieces) else b""

    def opens_text(self, ids: Iterable[int]) -> bool:
        """Whether a token that follows `ids` opens the text: nothing readable stands before it."""
        return not any(self.piece(token_id) for token_id in ids)

    def label(self, token_id: int) -> str:
        """The token for a person to read; distinct bytes never share a label, as half a character would."""
        if token_id in self.names:
            return self.names[token_id]
        piece = self.piece(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def read_vocabulary(backend: Any) -> Vocabulary:
    """Build the table from a `tokenizers.Tokenizer`.

    Raises: StartupRefused, when the tokens' bytes joined are not what the tokenizer decodes.
    """
    added = backend.get_added_tokens_decoder()
    special = {token_id: token.content for token_id, token in added.items() if token.special}
    names = {token_id: piece for piece, token_id in backend.get_vocab(with_added_tokens=True).items()}
    size = max(names) + 1 if names else 0
    spelled = [names.get(token_id) for token_id in range(size)]
    if _is_byte_level(backend.decoder):
        pieces = [b"" if piece is None else _from_byte_level(piece) for piece in spelled]
        first = pieces
    else:
        pieces = _by_decoding(backend, spelled, frozenset(added), anchored=True)
        first = _by_decoding(backend, spelled, frozenset(added), anchored=False)
    for token_id in special:
        pieces[token_id] = first[token_id] = b""
    table = Vocabulary(tuple(pieces), tuple(first), special, max((len(piece) for piece in pieces), default=0))
    _check(backend, table)
    return table


def decode(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    """The whole text of `ids`."""
    seen = False
    parts: list[bytes] = []
    for token_id in ids:
        piece = vocabulary.piece(token_id)
        if piece and not seen:
            piece, seen = vocabulary.first[token_id], True
        parts.append(piece)
    return b"".join(parts).decode(errors="replace")


def _check(backend: Any, table: Vocabulary) -> None:
    ids = backend.encode(PROBE, add_special_tokens=False).ids
    ours, theirs = decode(table, ids), backend.decode(ids, skip_special_tokens=True)
    if ours != theirs:
        raise StartupRefused(
            "this base's tokenizer does not decode token by token, so its text cannot be streamed exactly: "
            f"token by token {ours!r}, whole {theirs!r}"
        )


def _is_byte_level(decoder: Any) -> bool:
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    kinds = {part["type"] for part in state.get("decoders", [state])}
    return "ByteLevel" in kinds


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes in printable characters.

    Source: Radford et al. 2019, `bytes_to_unicode` of the reference code.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_ALPHABET = _byte_level_alphabet()


def _from_byte_level(piece: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in piece)
    except KeyError:  # an added token, spelled plainly
        return piece.encode()


def _by_decoding(backend: Any, spelled: Sequence[str | None], added: frozenset[int], *, anchored: bool) -> list[bytes]:
    """Ask the tokenizer for each token's text, behind the anchor or alone; lone bytes are read off their spelling."""
    anchor = list(backend.encode(ANCHOR, add_special_tokens=False).ids) if anchored else []
    cut = len(backend.decode(anchor, skip_special_tokens=False)) if anchor else 0
    texts = backend.decode_batch([[*anchor, token_id] for token_id in range(len(spelled))], skip_special_tokens=False)
    pieces: list[bytes] = []
    for token_id, (name, text) in enumerate(zip(spelled, texts, strict=True)):
        byte = _BYTE_PIECE.fullmatch(name) if name is not None and token_id not in added else None
        pieces.append(b"" if name is None else bytes([int(byte[1], 16)]) if byte else text[cut:].encode())
    return pieces
