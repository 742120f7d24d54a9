"""Pieces of text as OpenAI's two kinds of answers, whole and in chunks. One shape serves one answer.

What does not change from chunk to chunk is written once: a token costs one small string.
Source: OpenAI's specification 2.3.0. Beyond it, as in vLLM: `stop_reason`, and token ids when asked for.
Ours: `adapters`, and `routing` where the prompt chose them or when asked for.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.api.generation import Usage
from server.api.logprobs import CompletionLogprobs, chat_logprobs
from server.api.transcript import Piece
from server.records import AdapterTerm, Mixture, PromptChoice, RouteRow
from server.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the answer is to hold besides the text."""

    model: str  # as it was asked for
    logprobs: bool = False
    token_ids: bool = False
    echo: bool = False
    usage: bool = False  # at the end of a stream, and as null before
    routing: bool = False


def adapters_body(mixture: Mixture) -> list[dict[str, Any]]:
    """The mixture's terms, then its experts, whose weight is null: every token has its own."""
    experts = () if mixture.routing is None else mixture.routing.experts
    return [_term_body(term, term.weight) for term in mixture.terms] + [_term_body(term, None) for term in experts]


def routing_body(mixture: Mixture, rows: Sequence[RouteRow]) -> dict[str, Any]:
    """Who served which tokens: `ids[token][layer]` are places in `experts`, `weights` the same with their shares."""
    routing = mixture.routing
    assert routing is not None, "only a routed request can ask for its routing"
    return {
        "mode": routing.mode,
        "top_k": routing.top_k,
        "temperature": routing.temperature,
        "experts": [f"{term.name}@{term.version}" for term in routing.experts],
        "tokens": len(rows),
        "ids": [[[number for number, _ in layer] for layer in row] for row in rows],
        "weights": [[[share for _, share in layer] for layer in row] for row in rows],
    }


def _term_body(term: AdapterTerm, weight: float | None) -> dict[str, Any]:
    return {"ref": term.ref, "version": term.version, "digest": term.digest, "weight": weight}


def served_body(mixture: Mixture) -> dict[str, Any]:
    """What served it, and who chose that."""
    body: dict[str, Any] = {"adapters": adapters_body(mixture)}
    if mixture.choice is not None:
        body["routing"] = choice_body(mixture.choice)
    return body


def choice_body(choice: PromptChoice) -> dict[str, Any]:
    return {
        "mode": "semantic",
        "chosen": choice.chosen,
        "score": choice.score,
        "threshold": choice.threshold,
        "candidates": [{"ref": ref, "score": score} for ref, score in choice.nearest],
        "reason": choice.reason,
    }


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class ChatShape:
    def __init__(self, wanted: Wanted, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> None:
        self._wanted = wanted
        self._vocabulary = vocabulary
        self._prompt_ids = prompt_ids
        self._frame = _Frame("chatcmpl", wanted)

    def opening(self, index: int, mixture: Mixture | None) -> str:
        choice = f'{{"index":{index},"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}'
        extra: dict[str, Any] = {}
        if mixture is not None:
            extra |= served_body(mixture)
            if self._wanted.token_ids:
                extra["prompt_token_ids"] = self._prompt_ids
        return self._frame.chunk(choice, extra)

    def event(self, index: int, piece: Piece, usage: Usage | None, mixture: Mixture) -> str:
        delta = f'{{"content":{json.dumps(piece.text)}}}' if piece.text else "{}"
        choice = f'{{"index":{index},"delta":{delta},{self._rest(piece)}{self._routing(piece, mixture)}}}'
        return self._frame.chunk(choice, {} if usage is None else {"usage": usage_body(usage)})

    def usage_event(self, usage: Usage) -> str:
        return self._frame.chunk("", {"usage": usage_body(usage)})

    def whole(self, choices: Sequence[Piece], usage: Usage, mixture: Mixture) -> str:
        texts = [
            f'{{"index":{index},"message":{{"role":"assistant","content":{json.dumps(piece.text)},"refusal":null}},'
            f"{self._rest(piece)}{self._routing(piece, mixture)}}}"
            for index, piece in enumerate(choices)
        ]
        extra: dict[str, Any] = {"usage": usage_body(usage), **served_body(mixture)}
        if self._wanted.token_ids:
            extra["prompt_token_ids"] = self._prompt_ids
        return self._frame.answer("chat.completion", texts, extra)

    def _rest(self, piece: Piece) -> str:
        logprobs = chat_logprobs(self._vocabulary, piece.scores) if self._wanted.logprobs and piece.token_ids else None
        return _rest(piece, logprobs, token_ids=list(piece.token_ids) if self._wanted.token_ids else None)

    def _routing(self, piece: Piece, mixture: Mixture) -> str:
        return _routing(piece, mixture) if self._wanted.routing else ""


class CompletionShape:
    def __init__(self, wanted: Wanted, vocabulary: Vocabulary, prompts: Sequence[tuple[int, ...]], *, n: int) -> None:
        self._wanted = wanted
        self._prompts = prompts
        self._n = n
        self._logprobs = [
            CompletionLogprobs(vocabulary, opens_text=wanted.echo or vocabulary.opens_text(prompts[index // n]))
            for index in range(len(prompts) * n)
        ]
        self._frame = _Frame("cmpl", wanted)

    def opening(self, index: int, mixture: Mixture | None) -> str | None:
        if mixture is None and not self._wanted.token_ids:
            return None
        choice = f'{{"index":{index},"text":"","logprobs":null,"finish_reason":null{self._prompt_ids(index)}}}'
        return self._frame.chunk(choice, {} if mixture is None else served_body(mixture))

    def event(self, index: int, piece: Piece, usage: Usage | None, mixture: Mixture) -> str:
        choice = self._choice(index, piece, self._routing(piece, mixture))
        return self._frame.chunk(choice, {} if usage is None else {"usage": usage_body(usage)})

    def usage_event(self, usage: Usage) -> str:
        return self._frame.chunk("", {"usage": usage_body(usage)})

    def whole(self, choices: Sequence[Piece], usage: Usage, mixture: Mixture) -> str:
        texts = [
            self._choice(index, piece, self._prompt_ids(index) + self._routing(piece, mixture))
            for index, piece in enumerate(choices)
        ]
        extra = {"usage": usage_body(usage), **served_body(mixture)}
        return self._frame.answer("text_completion", texts, extra)

    def _choice(self, index: int, piece: Piece, more: str = "") -> str:
        logprobs = self._logprobs[index].read(piece) if self._wanted.logprobs and piece.token_ids else None
        rest = _rest(piece, logprobs, token_ids=list(piece.token_ids) if self._wanted.token_ids else None)
        return f'{{"index":{index},"text":{json.dumps(piece.text)},{rest}{more}}}'

    def _routing(self, piece: Piece, mixture: Mixture) -> str:
        return _routing(piece, mixture) if self._wanted.routing else ""

    def _prompt_ids(self, index: int) -> str:
        if not self._wanted.token_ids:
            return ""
        return f',"prompt_token_ids":{_dump(self._prompts[index // self._n])}'


class _Frame:
    """What stands around the choices."""

    def __init__(self, prefix: str, wanted: Wanted) -> None:
        self._head = (
            f'"id":"{prefix}-{uuid.uuid4().hex}","created":{int(time.time())},'
            f'"model":{json.dumps(wanted.model)},"system_fingerprint":null,'
        )
        kind = "chat.completion.chunk" if prefix == "chatcmpl" else "text_completion"
        self._chunk = f'{{"object":"{kind}",{self._head}"choices":['
        self._no_usage = ',"usage":null' if wanted.usage else ""

    def chunk(self, choice: str, extra: dict[str, Any]) -> str:
        usage = "" if "usage" in extra else self._no_usage
        return f"{self._chunk}{choice}]{_members(extra)}{usage}}}"

    def answer(self, kind: str, choices: Sequence[str], extra: dict[str, Any]) -> str:
        return f'{{"object":"{kind}",{self._head}"choices":[{",".join(choices)}]{_members(extra)}}}'


def _rest(piece: Piece, logprobs: dict[str, Any] | None, *, token_ids: list[int] | None) -> str:
    """The members that both kinds of choices end with."""
    rest = f'"logprobs":{"null" if logprobs is None else _dump(logprobs)}'
    if piece.finish_reason is None:
        rest += ',"finish_reason":null'
    else:
        rest += f',"finish_reason":"{piece.finish_reason}","stop_reason":{json.dumps(piece.stop_reason)}'
    return rest if token_ids is None else f'{rest},"token_ids":{_dump(token_ids)}'


def _routing(piece: Piece, mixture: Mixture) -> str:
    """A member of the choice's last piece alone."""
    return "" if piece.finish_reason is None else f',"routing":{_dump(routing_body(mixture, piece.routes))}'


def _members(extra: dict[str, Any]) -> str:
    return "".join(f",{json.dumps(name)}:{_dump(value)}" for name, value in extra.items())


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
