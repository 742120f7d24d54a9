"""Log-probabilities as the two routes of OpenAI's API tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.api.transcript import Piece
from server.records import TokenScore
from server.text.stream import Detokenizer
from server.text.vocabulary import Vocabulary

LOWEST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON has not


def chat_logprobs(vocabulary: Vocabulary, scores: Sequence[TokenScore | None]) -> dict[str, Any]:
    """One entry for each token that counts as completion, those of a stop string too."""
    content = [
        {
            **_entry(vocabulary, score.token_id, score.logprob),
            "top_logprobs": [_entry(vocabulary, token_id, logprob) for token_id, logprob in score.top],
        }
        for score in scores
        if score is not None
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The older shape, in parallel lists. `text_offset` counts characters of the returned text, so it keeps state."""

    def __init__(self, vocabulary: Vocabulary, *, opens_text: bool) -> None:
        self._vocabulary = vocabulary
        self._detokenizer = Detokenizer(vocabulary, opens_text=opens_text)
        self._offset = 0

    def read(self, piece: Piece) -> dict[str, Any]:
        body: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, score in zip(piece.token_ids, piece.scores, strict=True):
            body["text_offset"].append(self._offset)
            body["tokens"].append(self._vocabulary.label(token_id))
            body["token_logprobs"].append(None if score is None else _finite(score.logprob))
            body["top_logprobs"].append(None if score is None else self._top(score))
            self._offset += len(self._detokenizer.push(token_id))
        return body

    def _top(self, score: TokenScore) -> dict[str, float]:
        """The rivals, best first, and the token itself: one more than asked for where it is not among them.

        Two tokens that read the same have one place; the better one has it.
        """
        top: dict[str, float] = {}
        for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
            top.setdefault(self._vocabulary.label(token_id), _finite(logprob))
        return top


def _entry(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, Any]:
    label = vocabulary.label(token_id)
    piece = vocabulary.piece(token_id) or label.encode()
    return {"token": label, "logprob": _finite(logprob), "bytes": list(piece)}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
