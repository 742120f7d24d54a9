"""One HTTP request in the engine: its leases, its streams, their pieces, and how many tokens all that was.

Everything taken is given back on every way out: `close` cancels what still runs, and whoever starts a generation closes
it. Each choice is one request of the engine with its own lease and seed, all on the digests that the first one found.
"""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass

from server.api.choose import Terms
from server.api.merge import merge
from server.api.prompts import EncodedPrompt
from server.api.sampling import choice_seed
from server.api.semantic import choose_by_prompt, terms_of
from server.api.service import Service
from server.api.transcript import Piece, Transcript
from server.contract import Lease, Stream
from server.errors import InvalidValue, PromptTooLong
from server.metrics import Meter, Outcome
from server.records import GenerationRequest, Mixture, PromptChoice, RoutingOrder, Sampled, Sampling


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be generated: `n` choices for each prompt, in the order of the prompts."""

    terms: Terms
    prompts: tuple[EncodedPrompt, ...]
    sampling: Sampling
    routing: RoutingOrder | None = None
    n: int = 1
    max_tokens: int | None = None  # None: as many as fit
    stops: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    echo: bool = False
    return_routing: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generation:
    def __init__(
        self, mixture: Mixture, prompts: Sequence[EncodedPrompt], choices: Sequence[Choice], meter: Meter
    ) -> None:
        self.mixture = mixture
        self.choices = choices
        self._prompts = prompts
        self._meter = meter
        self._outcome: Outcome = "failed"

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(index of the choice, piece) as they come; every choice ends with a piece that has a finish reason.

        Raises: ServerError, when the engine failed one of them.
        """
        try:
            async with aclosing(merge([choice.pieces() for choice in self.choices])) as items:
                async for item in items:
                    yield item
        except (asyncio.CancelledError, GeneratorExit):
            self._outcome = "cancelled"
            raise
        self._outcome = "completed"

    def usage(self) -> Usage:
        """So far. A prompt counts once however many choices it has."""
        per_prompt = len(self.choices) // len(self._prompts)
        return Usage(
            prompt_tokens=sum(len(prompt.ids) for prompt in self._prompts),
            completion_tokens=sum(choice.transcript.generated for choice in self.choices),
            cached_tokens=sum(choice.transcript.cached for choice in self.choices[::per_prompt]),
        )

    def close(self) -> None:
        for choice in self.choices:
            choice.stream.cancel()
        usage = self.usage()
        self._meter.finish(
            self._outcome,
            prompt_tokens=usage.prompt_tokens,
            generated_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class Choice:
    stream: Stream
    transcript: Transcript
    tick: Callable[[], None]

    async def pieces(self) -> AsyncIterator[Piece]:
        async for event in self.stream:
            if isinstance(event, Sampled):
                self.tick()
            yield self.transcript.read(event)
            if self.transcript.ended:
                self.stream.cancel()
                return


async def start(service: Service, order: Order, *, arrived: float) -> Generation:
    """Lease the adapters and queue every choice; all or nothing.

    Raises: what `Adapters.acquire` and `Engine.submit` raise; PromptTooLong, InvalidValue.
    """
    with ExitStack() as undo:
        choice = await _choice(service, order)
        leases = await _leases(service, order, choice, undo)
        requests = _requests(service, order, leases[0])
        streams: list[Stream] = []
        for request, lease in zip(requests, leases, strict=True):
            stream = service.engine.submit(request, lease)
            undo.callback(stream.cancel)
            streams.append(stream)
        undo.pop_all()
    mixture = dataclasses.replace(leases[0].mixture, choice=choice)
    meter = service.metrics.meter(mixture, arrived=arrived)
    choices = [
        Choice(stream, _transcript(service, order, index // order.n), _ticker(meter, index))
        for index, stream in enumerate(streams)
    ]
    return Generation(mixture, order.prompts, choices, meter)


async def _choice(service: Service, order: Order) -> PromptChoice | None:
    """What semantic routing makes of the prompt, where it was asked for."""
    if order.routing is None or order.routing.mode != "semantic":
        return None
    if len(order.prompts) > 1:
        raise InvalidValue("routing.mode semantic takes one prompt, not a list of them", param="prompt")
    return await choose_by_prompt(service, order.routing, order.prompts[0])


async def _leases(service: Service, order: Order, choice: PromptChoice | None, undo: ExitStack) -> list[Lease]:
    """One lease for each choice. A name may move between two of them, so the later ones ask for the first's digests."""
    terms, routing = order.terms, order.routing
    if choice is not None:
        terms, routing = terms_of(choice), None
    first = await service.adapters.acquire(terms, routing)
    undo.callback(first.release)
    leases = [first]
    terms, routing = _pinned(first.mixture)
    for _ in range(len(order.prompts) * order.n - 1):
        lease = await service.adapters.acquire(terms, routing)
        undo.callback(lease.release)
        leases.append(lease)
    return leases


def _pinned(mixture: Mixture) -> tuple[Terms, RoutingOrder | None]:
    """What asks for the same digests again."""
    terms = tuple((f"{term.name}@{term.digest}", term.weight) for term in mixture.terms)
    routing = mixture.routing
    if routing is None:
        return terms, None
    candidates = tuple(f"{expert.name}@{expert.digest}" for expert in routing.experts)
    return terms, RoutingOrder(routing.mode, candidates, routing.top_k, routing.temperature)


def _requests(service: Service, order: Order, lease: Lease) -> list[GenerationRequest]:
    group = uuid.uuid4().hex
    requests: list[GenerationRequest] = []
    for place, prompt in enumerate(order.prompts):
        limit = service.engine.max_model_len
        max_tokens = fitting_tokens(
            len(prompt.ids), virtual_tokens=lease.virtual_tokens, asked=order.max_tokens, max_model_len=limit
        )
        for index in range(order.n):
            requests.append(
                GenerationRequest(
                    request_id=f"{group}-{place}-{index}",
                    prompt_ids=prompt.ids,
                    mixture=lease.mixture,
                    max_tokens=max_tokens,
                    sampling=dataclasses.replace(order.sampling, seed=choice_seed(order.sampling.seed, index)),
                    stop_token_ids=order.stop_token_ids,
                    ignore_eos=order.ignore_eos,
                    logprobs=order.logprobs,
                    prompt_logprobs=order.logprobs if order.echo else None,
                    return_routing=order.return_routing,
                )
            )
    return requests


def fitting_tokens(prompt_tokens: int, *, virtual_tokens: int, asked: int | None, max_model_len: int) -> int:
    """How many tokens may follow the prompt: what was asked for, or all that fit.

    Raises: PromptTooLong, InvalidValue.
    """
    if prompt_tokens == 0:
        raise InvalidValue("the prompt has no tokens", param="prompt")
    room = max_model_len - prompt_tokens - virtual_tokens
    adapters = f", its adapters take {virtual_tokens}" if virtual_tokens else ""
    limit = f"this model's maximum context length is {max_model_len} tokens{adapters}; "
    if room < min(1, asked if asked is not None else 1):
        raise PromptTooLong(f"{limit}the prompt has {prompt_tokens}", param="prompt")
    if asked is not None and asked > room:
        raise PromptTooLong(
            f"{limit}you asked for {prompt_tokens + asked} ({prompt_tokens} in the prompt, {asked} to generate)",
            param="max_tokens",
        )
    return room if asked is None else asked


def _transcript(service: Service, order: Order, place: int) -> Transcript:
    prompt = order.prompts[place]
    return Transcript(
        service.tokenizer.vocabulary,
        prompt.ids,
        stops=order.stops,
        stop_token_ids=order.stop_token_ids,
        echo=prompt.echo(service.tokenizer) if order.echo else None,
    )


def _ticker(meter: Meter, index: int) -> Callable[[], None]:
    return lambda: meter.token(index)
