"""One choice of an answer, from the engine's events to pieces of text; the same for streams and for whole answers.

Law: the pieces' texts joined are the choice's text, their tokens all the tokens that the engine gave up to the end.
A token whose text waits (half a character, maybe a stop string) travels in the piece that brings the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.errors import ServerError
from server.records import Event, Failed, Finished, FinishReason, PromptScored, RouteRow, Sampled, TokenScore
from server.text.stream import TextStream
from server.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Piece:
    """`scores` has one entry for each of `token_ids` where log-probabilities were asked for; a text's first has none.

    `routes` are on a choice's last piece, all of them: of the prompt's tokens and of its own but the last.
    `stop_reason` is the stop string or the id of the token that ended the text, if one that was asked for did.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    scores: tuple[TokenScore | None, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    routes: tuple[RouteRow, ...] = ()


def join(pieces: Sequence[Piece]) -> Piece:
    """The whole of a choice. The last piece says how it ended."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token_id for piece in pieces for token_id in piece.token_ids),
        scores=tuple(score for piece in pieces for score in piece.scores),
        finish_reason=pieces[-1].finish_reason,
        stop_reason=pieces[-1].stop_reason,
        routes=pieces[-1].routes,
    )


class Transcript:
    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int],
        *,
        stops: Sequence[str],
        stop_token_ids: frozenset[int],
        echo: str | None,
    ) -> None:
        """`echo`: the prompt's text, to stand before the choice's own."""
        self._stream = TextStream(vocabulary, stops=stops, opens_text=vocabulary.opens_text(prompt_ids))
        self._prompt_ids = tuple(prompt_ids)
        self._stop_token_ids = stop_token_ids
        self._echo = echo
        self._prompt_scores: tuple[TokenScore | None, ...] = ()
        self._token_ids: list[int] = []
        self._scores: list[TokenScore | None] = []
        self._routes: list[RouteRow] = []
        self.generated = 0
        self.cached = 0
        self.ended = False

    def read(self, event: Event) -> Piece:
        """What the event adds; an empty piece if nothing can be said yet.

        Raises: ServerError, the engine's.
        """
        assert not self.ended, "an event after the last one"
        if isinstance(event, Sampled):
            return self._sampled(event)
        if isinstance(event, Finished):
            self.generated, self.cached = event.completion_tokens, event.cached_tokens
            self._routes += event.routes
            return self._last(self._stream.finish(), event.reason, event.stop_token_id)
        if isinstance(event, PromptScored):
            self._prompt_scores = (None, *event.scores)
            return Piece()
        assert isinstance(event, Failed)
        raise _failure(event.error)

    def _sampled(self, event: Sampled) -> Piece:
        self.generated += 1
        self.cached = event.cached_tokens
        self._token_ids.append(event.token_id)
        self._routes += event.routes
        if event.score is not None:
            self._scores.append(event.score)
        text = self._stream.push((event.token_id,))
        if self._stream.stopped_by is not None:
            return self._last(text, "stop", None)
        return self._piece(text) if text or self._echo is not None else Piece()

    def _last(self, text: str, reason: FinishReason, stop_token_id: int | None) -> Piece:
        self.ended = True
        asked = stop_token_id if stop_token_id in self._stop_token_ids else None
        stopped_by = self._stream.stopped_by  # the flush, too, may complete a stop string
        return self._piece(text, "stop" if stopped_by else reason, stopped_by if stopped_by else asked)

    def _piece(self, text: str, reason: FinishReason | None = None, stop_reason: str | int | None = None) -> Piece:
        token_ids, scores = tuple(self._token_ids), tuple(self._scores)
        self._token_ids.clear()
        self._scores.clear()
        if self._echo is not None:
            text, self._echo = self._echo + text, None
            token_ids, scores = self._prompt_ids + token_ids, self._prompt_scores + scores
        return Piece(text, token_ids, scores, reason, stop_reason, tuple(self._routes) if reason else ())


def _failure(error: ServerError) -> ServerError:
    """A fresh exception: one error may end many requests, and a raised object collects tracebacks."""
    return type(error)(error.message, param=error.param, retry_after_s=error.retry_after_s)
