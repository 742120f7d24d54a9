"""The plain records that travel between the HTTP loop and the engine thread.

Nothing here holds a tensor or a name to be looked up: a request arrives with its prompt as token ids and its mixture
as leased digests, and events leave as numbers. Text is made of them in `server.text`, answers in `server.api`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from server.errors import ServerError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class AdapterTerm:
    """One resolved adapter of a mixture. `ref` is what was asked for; the digest is what is served."""

    ref: str
    name: str
    version: int
    digest: str
    kind: str
    weight: float = 1.0


# One token's experts: for every decoder layer (number among the request's experts, share), the largest first.
RouteRow = tuple[tuple[tuple[int, float], ...], ...]

RoutingMode = Literal["arrow", "gate", "semantic"]


@dataclass(frozen=True, slots=True)
class RoutingOrder:
    """What a request asks of routing, as it was sent; None where it left the choice to the server.

    `candidates` are references. `semantic` chooses once, by the prompt, and becomes a plain mixture before anything is
    leased; the others choose token by token.
    """

    mode: RoutingMode
    candidates: tuple[str, ...] = ()
    top_k: int | None = None
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Routing:
    """Experts whose weights are found token by token while the request runs.

    arrow: by each Linear's input and the experts' own directions. gate: by each layer's input and the trained router
    that is the mixture's one term. The `top_k` best of every token are weighted by the softmax of their scores over
    `temperature`. An expert's own `weight` means nothing.
    """

    mode: Literal["arrow", "gate"]
    experts: tuple[AdapterTerm, ...]
    top_k: int
    temperature: float


@dataclass(frozen=True, slots=True)
class PromptChoice:
    """What semantic routing made of a prompt. `chosen` is a reference, None the bare base.

    `score` and `threshold` are those of the chosen one, else of the nearest; None where nobody could be asked.
    `nearest` are the best (reference, score), the best first.
    """

    chosen: str | None
    score: float | None
    threshold: float | None
    nearest: tuple[tuple[str, float], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Mixture:
    """The adapters of one request with their weights; no terms and no routing means the bare base.

    `choice` tells how a prompt came to its terms, for the answer alone.
    """

    terms: tuple[AdapterTerm, ...] = ()
    routing: Routing | None = None
    choice: PromptChoice | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy.

    The draw depends on (seed, index of the token, probabilities) alone: never on the neighbours in the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to be continued.

    `stop_token_ids` end the text and are not part of it; the base's own end tokens are added by the engine unless
    `ignore_eos`. `logprobs` is the number of alternatives wanted beside each chosen token (None: no log-probabilities;
    0: the chosen token's alone). `prompt_logprobs` asks for the same over the prompt. `max_tokens` 0 only scores it.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    mixture: Mixture
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_routing: bool = False  # tell with every token which experts served the positions before it
    keep_logits: bool = False  # golden rows: the last prompt position's logits ride on `Finished`
    embed: bool = False  # the prompt's embedding rides on `Finished`


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's log-probability under the model (before temperature, penalties, truncation) and its best rivals."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token. A token that ends the text (stop token, end of turn) is not sent; `Finished` follows instead."""

    token_id: int
    score: TokenScore | None = None
    cached_tokens: int = 0  # as in `Finished`, for an answer that ends before it (a stop string)
    routes: tuple[RouteRow, ...] = ()  # of the positions computed since the last event that told some


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Scores of prompt tokens 1..n-1 (token 0 has none), sent once before the first `Sampled`."""

    scores: tuple[TokenScore, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a request that ended well. `stop_token_id` is set when a stop or end token ended it."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    stop_token_id: int | None = None
    logits: bytes | None = None  # in fp32
    embedding: tuple[float, ...] | None = None
    routes: tuple[RouteRow, ...] = ()  # as in `Sampled`


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that did not."""

    error: ServerError


Event = Sampled | PromptScored | Finished | Failed

UNKNOWN_MODEL = "The model `{}` does not exist or you do not have access to it"
