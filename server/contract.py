"""What the HTTP side asks of the engine and of the adapters: two protocols, spoken in `server.records`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.primitives.graft import Graft
from server.primitives.prefix import Prefix
from server.primitives.routed_experts import Route
from server.records import Event, GenerationRequest, Mixture, PromptChoice, RoutingOrder


class Lease(Protocol):
    """The right to use a mixture until released: its adapters stay resident and keep their digests."""

    @property
    def mixture(self) -> Mixture: ...

    @property
    def grafts(self) -> Sequence[tuple[Graft, float]]:
        """What the mixture is made of; for the engine alone."""

    @property
    def route(self) -> Route | None:
        """How its tokens are routed, if they are; for the engine alone."""

    @property
    def prefix(self) -> Prefix | None:
        """The virtual tokens of the whole mixture, one adapter's after the other's; for the engine alone."""

    @property
    def virtual_tokens(self) -> int:
        """Positions that the mixture's prefix takes of the context."""

    def release(self) -> None:
        """Idempotent."""


class Stream(Protocol):
    def __aiter__(self) -> AsyncIterator[Event]:
        """Events in order; the last one is `Finished` or `Failed`."""

    def cancel(self) -> None:
        """Free the request's KV blocks and its lease in the next step. Idempotent; no event follows."""


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    running: int
    waiting: int
    kv_blocks_used: int  # held by running requests; cached blocks that could be evicted are free
    kv_blocks_total: int
    block_size: int
    running_adapters: tuple[str, ...]  # digests
    waiting_adapters: tuple[str, ...]


class Engine(Protocol):
    @property
    def max_model_len(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    def submit(self, request: GenerationRequest, lease: Lease) -> Stream:
        """Queue a request; the engine releases the lease when the request ends. Call it on the event loop.

        Raises: QueueFull, Draining, PromptTooLong, InvalidValue (the lease is released).
        """

    def snapshot(self) -> EngineSnapshot: ...


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One version that this server knows: resident, loading, or refused with the reason."""

    name: str
    version: int
    digest: str
    kind: str
    tier: str  # device | loading | failed
    bytes: int
    leases: int
    pinned: bool
    rank: int | None
    references: tuple[str, ...]  # every string under which it can be asked for now
    error: str | None = None
    # Of a kind of full rank, served as the closest low-rank change: the largest error at any Linear, relative to it.
    approximation: float | None = None


@dataclass(frozen=True, slots=True)
class Servable:
    """One line of /v1/models besides the base: a name of the hub (or one loaded by hand) and what it means now."""

    id: str
    version: int
    digest: str
    kind: str
    created: int


@dataclass(frozen=True, slots=True)
class HubStatus:
    """Whether the hub can be reached, and the last of its events that was acted on. Units: seconds since the epoch."""

    reachable: bool
    seen: int
    away_since: float | None


Embed = Callable[[], Awaitable[Sequence[float]]]


class Adapters(Protocol):
    async def acquire(self, terms: Sequence[tuple[str, float]], routing: RoutingOrder | None = None) -> Lease:
        """Resolve every reference to a digest, load what is absent, lease all. No terms: the bare base.

        `routing` asks for experts that the engine weights token by token; never `semantic`, which is terms by now.

        Raises: ModelNotFound, InvalidValue (a malformed reference, a weight), MixtureRefused, AdapterIncompatible,
        AdapterUnavailable.
        """

    async def nearest(self, candidates: Sequence[str], embed: Embed) -> PromptChoice:
        """Choose the adapter whose training prompts are nearest to a prompt, or the base.

        No candidates: every name that this base can serve under its default alias and that has centroids. `embed`
        gives the prompt's embedding; it is called only where there is something to choose.

        Raises: ModelNotFound, InvalidValue (also for a candidate without centroids), AdapterIncompatible,
        AdapterUnavailable, and what `embed` raises.
        """

    async def routable(self) -> bool:
        """Whether any adapter can be chosen by a prompt."""

    async def known(self, reference: str) -> Servable | None:
        """The model of that id, if it can be asked for (GET /v1/models/{id}); never loads anything."""

    def given_names(self) -> Collection[str]:
        """Names that were given by hand; only they may hold characters that the grammar of mixtures uses."""

    def hub(self) -> HubStatus: ...

    async def servable(self) -> Sequence[Servable]: ...

    def resident(self) -> Sequence[AdapterStatus]: ...

    async def load(self, name: str, reference: str) -> AdapterStatus:
        """Serve `reference` also under the exact string `name` (vLLM's load_lora_adapter); loads it."""

    async def unload(self, name: str) -> None: ...

    async def pin(self, reference: str) -> AdapterStatus: ...

    async def warm(self, reference: str) -> AdapterStatus: ...

    async def evict(self, reference: str) -> AdapterStatus:
        """Raises: InvalidValue while a request holds it."""
