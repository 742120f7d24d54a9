"""Tokens in, text out, a piece at a time: never half a character, never a word past a stop string.

Laws: any chunking of the same ids gives the same text, equal to the whole decode when nothing stops it; with stop
strings the text ends before the one that is complete first (of several that end together, before the longest).
Source for the hold-back: a suffix that may still grow into a stop string waits for the next token.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from server.text.vocabulary import Vocabulary


class Detokenizer:
    """Ids to text. What is still half a character waits for its other half."""

    def __init__(self, vocabulary: Vocabulary, *, opens_text: bool = False) -> None:
        self._vocabulary = vocabulary
        self._opens = opens_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        piece = self._vocabulary.piece(token_id)
        if self._opens and piece:
            piece = self._vocabulary.first[token_id]
            self._opens = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """The text has ended: half a character becomes U+FFFD, as in a whole decode."""
        return self._utf8.decode(b"", True)


class StopScanner:
    """Text to text, cut before the first stop string. `found` names it; what follows it is dropped."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string stops everything"
        self._stops = tuple(stops)
        self._reach = max((len(stop) for stop in stops), default=0) - 1  # characters that may have to wait
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        if not self._stops:
            return text
        if self.found is not None:
            return ""
        self._held += text
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            _, start, self.found = min(hits)
            return self._release(start, drop_rest=True)
        return self._release(len(self._held) - self._waiting())

    def flush(self) -> str:
        return self._release(len(self._held))

    def _waiting(self) -> int:
        """Length of the longest suffix that is the beginning of a stop string."""
        for length in range(min(self._reach, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0

    def _release(self, count: int, *, drop_rest: bool = False) -> str:
        text, self._held = self._held[:count], "" if drop_rest else self._held[count:]
        return text


class TextStream:
    """Ids to text up to a stop string."""

    def __init__(self, vocabulary: Vocabulary, *, stops: Sequence[str] = (), opens_text: bool = False) -> None:
        self._detokenizer = Detokenizer(vocabulary, opens_text=opens_text)
        self._scanner = StopScanner(stops)

    @property
    def stopped_by(self) -> str | None:
        return self._scanner.found

    def push(self, ids: Iterable[int]) -> str:
        """New text, possibly none. Ids after a stop string are not looked at."""
        text = ""
        for token_id in ids:
            if self._scanner.found is not None:
                break
            text += self._scanner.push(self._detokenizer.push(token_id))
        return text

    def finish(self) -> str:
        """What was held back, once no more ids follow."""
        return self._scanner.push(self._detokenizer.flush()) + self._scanner.flush()
