"""The adapters of this server: which are resident, who holds them, and what each alias means here today.

A reference is resolved once, at the door; what a request then holds is a lease on digests. Loading happens in worker
threads while the engine goes on; a version serves only after its golden rows came out right. When an alias moves to a
version that fails, the one before keeps serving. Everything here runs on the HTTP loop except what is handed to
`asyncio.to_thread`, so there are no locks.
Laws: a leased graft is never evicted; one digest is loaded once, however many ask; the resident bytes stay under the
budget; nobody holds a lease while it waits for room, so those that hold one are at work and end.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from server.adapters import golden
from server.adapters.catalogue import Catalogue
from server.adapters.lowering.table import lower
from server.adapters.lowering.target import Lowered, Target
from server.adapters.quiet import QuietThreads
from server.adapters.room import Line, NoRoom
from server.adapters.semantic import Candidate, rank, tell
from server.adapters.source import Artifact, Forgotten, Happened, Listed, Resolution, Source
from server.config import AdapterConfig
from server.contract import AdapterStatus, Embed, HubStatus, Lease, Servable
from server.errors import (
    AdapterIncompatible,
    AdapterUnavailable,
    InvalidValue,
    MixtureRefused,
    ModelNotFound,
    ServerError,
    Unavailable,
)
from server.metrics import Metrics
from server.primitives.graft import Graft, check_mixture, combined, prefixed
from server.primitives.prefix import Prefix
from server.primitives.routed_experts import Expert, Route, make_prototypes, why_no_expert
from server.records import UNKNOWN_MODEL, AdapterTerm, Mixture, PromptChoice, Routing, RoutingOrder

log = logging.getLogger(__name__)

DEFAULT_TOP_K = 2
RECONNECT_S = 0.25
MAX_PROVED = 100_000
PROBES_AT_ONCE = 8  # golden rows that share a step; more would stand in the way of requests


class Workshop(Protocol):
    """What the store needs of the engine to finish and to try a graft."""

    async def compile(self, embeddings: Tensor, *, after: Prefix | None = None) -> Prefix: ...

    async def probe(self, graft: Graft, prompt_ids: Sequence[int], *, route: Route | None) -> Tensor: ...


@dataclass(slots=True)
class Resident:
    """`experts` are those of a router, in the order of its rows, each leased for as long as the router is here."""

    resolution: Resolution
    kind: str
    rank: int | None
    graft: Graft
    tier: str  # where it came from: disk, or hub when that was across the network
    approximation: float | None = None
    leases: int = 0
    pinned: bool = False
    experts: tuple[Resident, ...] = ()
    prototypes: Mapping[str, Tensor] | None = None  # made when arrow first asks for them

    @property
    def bytes(self) -> int:
        return self.graft.bytes + sum(one.nbytes for one in (self.prototypes or {}).values())

    @property
    def exactness(self) -> str:
        """For the log."""
        return "" if self.approximation is None else f", off by {self.approximation:.2g} of its change at most"


@dataclass(slots=True)
class Join:
    """The prefix of a mixture of several adapters that bring virtual tokens, and how many requests hold it."""

    prefix: Prefix
    leases: int = 0


@dataclass(frozen=True, slots=True)
class Pointer:
    """What an alias serves, and where it has moved to if that has not been tried yet."""

    serving: Resolution
    pending: Resolution | None = None


class HeldLease:
    def __init__(
        self,
        store: AdapterStore,
        mixture: Mixture,
        held: Sequence[tuple[Resident, float]],
        join: Join | None,
        route: Route | None = None,
    ) -> None:
        """A weight of zero holds a graft that is no term of the mixture: an expert."""
        self.mixture = mixture
        self.grafts = _grafts(held)
        self.route = route
        self._store = store
        self._held: Sequence[tuple[Resident, float]] = held
        self._join = join

    @property
    def prefix(self) -> Prefix | None:
        if self._join is not None:
            return self._join.prefix
        return next((graft.prefix for graft in prefixed(self.grafts)), None)

    @property
    def virtual_tokens(self) -> int:
        return sum(graft.virtual_tokens for graft in prefixed(self.grafts))

    def release(self) -> None:
        held, self._held = self._held, ()
        for resident, _ in held:
            self._store.release(resident)
        if held and self._join is not None:
            self._store.release(self._join)


class AdapterStore:
    def __init__(
        self,
        source: Source,
        workshop: Workshop,
        target: Target,
        config: AdapterConfig,
        metrics: Metrics,
        *,
        quantized: bool,
    ) -> None:
        self._source = source
        self._workshop = workshop
        self._target = target
        self._config = config
        self._metrics = metrics
        self._quantized = quantized
        self._resident: OrderedDict[str, Resident] = OrderedDict()  # least recently used first
        self._loading: dict[str, tuple[Resolution, asyncio.Task[None]]] = {}
        self._joins: OrderedDict[tuple[str, ...], Join] = OrderedDict()  # least recently used first
        self._failed: dict[str, tuple[Resolution, ServerError]] = {}
        self._pointers: dict[tuple[str, str], Pointer] = {}
        self._moves: Counter[str] = Counter()  # by name, how often its aliases were looked at anew
        self._catching_up = 0  # how often those of all names were
        self._recalled: set[str] = set()  # names first asked for while the hub was away, which may have moved unseen
        self._named: dict[str, str] = {}  # names given by load_lora_adapter
        self._load_slots = asyncio.Semaphore(config.max_concurrent_loads)
        self._quiet = QuietThreads(config.max_concurrent_loads)
        self._proved: OrderedDict[str, None] = OrderedDict()  # digests whose golden rows came out right here
        self._line = Line(config.cache_bytes, self._fits)
        self._hub = HubStatus(True, 0, None)
        self._catalogue = Catalogue(source)
        self._background: set[asyncio.Task[None]] = set()

    async def acquire(self, terms: Sequence[tuple[str, float]], routing: RoutingOrder | None = None) -> Lease:
        return await self._line.serve(lambda: self._acquire(terms, routing))

    async def _acquire(self, terms: Sequence[tuple[str, float]], routing: RoutingOrder | None) -> Lease:
        held: list[tuple[Resident, float]] = []
        described = []
        with ExitStack() as undo:
            undo.callback(self._let_go, held)  # all that is in it by then
            try:
                for text, weight in self._combined(terms):
                    resident, resolution = await self._hold(text)
                    held.append((resident, weight))
                    described.append(_term(text, resolution, resident, weight))
                routed = await self._routed(held, routing)
                grafts = _grafts(held)
                check_mixture(grafts)
                join = await self._joined(prefixed(grafts))
            except NoRoom as lacking:
                raise self._beside((one for one, _ in held), lacking) from None
            undo.pop_all()
        if routed is None:
            return HeldLease(self, Mixture(tuple(described)), held, join)
        return HeldLease(self, Mixture(tuple(described), routed[0]), held, join, routed[1])

    async def nearest(self, candidates: Sequence[str], embed: Embed) -> PromptChoice:
        if candidates:
            found = [await self._named_candidate(text) for text in candidates]
        else:
            found = [candidate async for candidate in self._each_candidate()]
        if not found:
            return tell((), None)
        ranked = rank(found, await embed(), self._config.auto_threshold)
        for scored in ranked:
            if not scored.reached:
                continue
            try:
                await self.warm(scored.candidate.ref)
            except (AdapterIncompatible, AdapterUnavailable, ModelNotFound) as error:
                if candidates:
                    raise
                log.warning("semantic routing passes over %s: %s", scored.candidate.ref, error.message)
                continue
            return tell(ranked, scored)
        return tell(ranked, None)

    async def routable(self) -> bool:
        async for _ in self._each_candidate():
            return True
        return False

    async def _named_candidate(self, text: str) -> Candidate:
        resolution = await self._serving(self._named.get(text, text))
        centroids = await self._catalogue.centroids(resolution)
        if centroids is None:
            raise InvalidValue(
                f"routing.candidates: {text[:200]} ({resolution.label}) has no centroids, so no prompt can be compared "
                "with it; hub centroids makes them",
                param="routing.candidates",
            )
        return Candidate(text, centroids)

    async def _each_candidate(self) -> AsyncGenerator[Candidate, None]:
        """Every name under its default alias that has centroids; what is known to fail here is left out."""
        for name, listed in (await self._catalogue.names()).items():
            pointer = self._pointers.get((name, self._config.default_alias))
            resolution = pointer.serving if pointer else listed
            if resolution.digest in self._failed:
                continue
            try:
                centroids = await self._catalogue.centroids(resolution)
            except (AdapterIncompatible, AdapterUnavailable, ModelNotFound, Unavailable) as error:
                log.warning("semantic routing leaves %s out: %s", name, error.message)
                continue
            if centroids is not None:
                yield Candidate(name, centroids)

    async def _serving(self, reference: str) -> Resolution:
        """What a reference means here today."""
        key = self._source.pointer(reference)
        pointer = self._pointers.get(key) if key else None
        return pointer.serving if pointer else await asyncio.to_thread(self._source.resolve, reference)

    async def _routed(
        self, held: list[tuple[Resident, float]], order: RoutingOrder | None
    ) -> tuple[Routing, Route] | None:
        """How a mixture is routed, if it is; what that holds besides is put to `held`, at weight zero."""
        router = next((resident for resident, _ in held if resident.graft.router is not None), None)
        if order is None and router is None:
            return None
        if order is None or order.mode == "gate":
            return await self._by_gate(router, held, order or RoutingOrder("gate"))
        assert order.mode == "arrow", "semantic routing has become terms before this"
        if held:
            raise InvalidValue("routing.mode arrow stands beside no mixture", param="routing")
        return await self._by_arrow(held, order)

    async def _by_gate(
        self, router: Resident | None, held: Sequence[tuple[Resident, float]], order: RoutingOrder
    ) -> tuple[Routing, Route]:
        if router is None or router.graft.router is None:
            label = held[0][0].resolution.label if held else "the base"
            raise InvalidValue(f"routing.mode gate needs a router as model, {label} is none", param="model")
        label = router.resolution.label
        if len(held) > 1 or held[0][1] != 1:
            raise MixtureRefused(f"{label} is a router: it is served alone and at weight 1")
        named = {one.resolution.label: one for one in router.experts}
        if order.candidates:
            named = {text: await self._expert_of(router, text) for text in order.candidates}
        self._check_candidates([one.resolution for one in named.values()])
        experts = tuple(_term(text, one.resolution, one, 1.0) for text, one in named.items())
        top_k = _top_k(order, default=router.graft.router.top_k, candidates=len(experts))
        routing = Routing("gate", experts, top_k, 1.0 if order.temperature is None else order.temperature)
        grafts = tuple(Expert(one.graft) for one in named.values())
        return routing, Route(grafts, top_k, routing.temperature, router.graft)

    async def _expert_of(self, router: Resident, text: str) -> Resident:
        """The expert of a router that a candidate means. Raises: InvalidValue, ModelNotFound."""
        resolution = await self._resolved(text)
        found = next((one for one in router.experts if one.resolution.digest == resolution.digest), None)
        if found is None:
            known = ", ".join(one.resolution.label for one in router.experts)
            raise InvalidValue(
                f"{resolution.label} is no expert of {router.resolution.label}, which has {known}",
                param="routing.candidates",
            )
        return found

    def _check_candidates(self, candidates: Sequence[Resolution]) -> None:
        limit = self._config.max_terms
        if len(candidates) > limit:
            raise MixtureRefused(f"{len(candidates)} candidates are above the limit of {limit} adapters")
        labels: dict[str, str] = {}
        for one in candidates:
            if one.digest in labels:
                raise InvalidValue(
                    f"candidates {labels[one.digest]} and {one.label} are the same version", param="routing.candidates"
                )
            labels[one.digest] = one.label

    async def _by_arrow(self, held: list[tuple[Resident, float]], order: RoutingOrder) -> tuple[Routing, Route]:
        found = [(text, await self._resolved(text)) for text in order.candidates]
        self._check_candidates([resolution for _, resolution in found])
        experts, grafts = list[AdapterTerm](), list[Expert]()
        for text, _ in found:
            resident, resolution = await self._hold(text)
            held.append((resident, 0.0))
            reason = why_no_expert(resident.graft, self._target.decoder_layers)
            if reason is not None:
                raise MixtureRefused(f"routing.mode arrow: {reason}", param="routing.candidates")
            experts.append(_term(text, resolution, resident, 1.0))
            grafts.append(Expert(resident.graft, await self._prototypes(resident)))
        top_k = _top_k(order, default=DEFAULT_TOP_K, candidates=len(experts))
        routing = Routing("arrow", tuple(experts), top_k, 1.0 if order.temperature is None else order.temperature)
        return routing, Route(tuple(grafts), top_k, routing.temperature)

    async def _prototypes(self, resident: Resident) -> Mapping[str, Tensor]:
        """Made once for a resident adapter, beside the loop; the caller holds it."""
        if resident.prototypes is None:
            made = await self._quiet.run(make_prototypes, resident.graft)
            if resident.prototypes is None:
                self._make_room(sum(one.nbytes for one in made.values()), resident.resolution.label)
                resident.prototypes = made
        return resident.prototypes

    def release(self, held: Resident | Join) -> None:
        held.leases -= 1
        assert held.leases >= 0, f"{held} was released twice"
        if held.leases == 0:
            self._line.freed()

    def _let_go(self, held: Sequence[tuple[Resident, float]]) -> None:
        for resident, _ in held:
            self.release(resident)

    def given_names(self) -> Collection[str]:
        return self._named.keys()

    async def known(self, reference: str) -> Servable | None:
        target = self._named.get(reference, reference)
        with suppress(ModelNotFound, InvalidValue):
            line = await asyncio.to_thread(self._source.described, target)
            return None if line is None else _servable(reference, line)
        return None

    async def servable(self) -> Sequence[Servable]:
        listed = await asyncio.to_thread(self._source.listed)
        lines = [_servable(one.resolution.name, one) for one in listed]
        return lines + [found for name in self._named if (found := await self.known(name)) is not None]

    def hub(self) -> HubStatus:
        return self._hub

    def resident(self) -> Sequence[AdapterStatus]:
        lines = [self._status(one) for one in self._resident.values()]
        lines += [_absent(resolution, "loading", None) for resolution, _ in self._loading.values()]
        return lines + [_absent(resolution, "failed", error.message) for resolution, error in self._failed.values()]

    async def load(self, name: str, reference: str) -> AdapterStatus:
        if self._source.pointer(name) is None or "@" in name:
            raise InvalidValue(f"lora_name {name[:200]} must be a bare name, without a selector", param="lora_name")
        status = await self.warm(reference)
        self._named[name] = reference
        return replace(status, references=(name, *status.references))

    async def unload(self, name: str) -> None:
        reference = self._named.pop(name, None)
        await self._drop(reference or name, strict=False)

    async def pin(self, reference: str) -> AdapterStatus:
        resident, _ = await self._line.serve(lambda: self._hold(reference))
        resident.pinned = True
        self.release(resident)
        return self._status(resident)

    async def warm(self, reference: str) -> AdapterStatus:
        resident, _ = await self._line.serve(lambda: self._hold(reference))
        self.release(resident)
        return self._status(resident)

    async def evict(self, reference: str) -> AdapterStatus:
        return await self._drop(reference, strict=True)

    async def watch(self) -> None:
        """Follow the hub for ever: aliases in use move when their new version has proved itself.

        While the hub is away everything goes on with what is here; when it is back, what happened meanwhile is caught
        up with by the numbers of its events.
        """
        seen: int | None = None
        while True:
            try:
                if seen is None:
                    seen = await asyncio.to_thread(self._source.head)
                    await self._follow_all(seen)
                async with aclosing(self._events(seen)) as batches:
                    async for events in batches:
                        if events:
                            self._catalogue.forget_names()
                        for name in {event.name for event in events} | self._recalled:
                            await self._follow(name)
                            self._recalled.discard(name)
                        seen = max([seen, *(event.seq for event in events)])
                        self._found(seen)
            except Forgotten:
                log.warning("the hub has gone back behind event %s: asking anew what its aliases mean", seen)
                seen = None
            except ServerError as error:
                self._lost(error)
                await asyncio.sleep(RECONNECT_S)

    async def _events(self, after: int) -> AsyncGenerator[Sequence[Happened], None]:
        """The hub's events, read in a thread of their own: waiting for the next one takes no worker away."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Sequence[Happened] | Exception] = asyncio.Queue()
        over = threading.Event()

        def hand_over(item: Sequence[Happened] | Exception) -> None:
            with suppress(RuntimeError):  # the loop has ended before this thread
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        def read() -> None:
            try:
                for events in self._source.watch(after):
                    if over.is_set():
                        return
                    hand_over(events)
            except (ServerError, Forgotten) as error:
                hand_over(error)

        threading.Thread(target=read, name="hub-events", daemon=True).start()
        try:
            while True:
                item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            over.set()

    async def _follow_all(self, seen: int) -> None:
        self._catalogue.forget_names()
        self._catching_up += 1
        for name in {name for name, _ in self._pointers}:
            await self._follow(name)
        self._found(seen)

    def _found(self, seen: int) -> None:
        if not self._hub.reachable:
            log.info("the hub is back, at event %d", seen)
        self._hub = HubStatus(True, seen, None)

    def _lost(self, error: ServerError) -> None:
        if self._hub.reachable or self._hub.away_since is None:
            log.warning("the hub is away, serving goes on with what is here: %s", error.message)
            self._hub = HubStatus(False, self._hub.seen, time.time())

    async def _joined(self, grafts: Sequence[Graft]) -> Join | None:
        """The virtual tokens of several adapters in the order written, leased once; None when one or none has any.

        Keys and values that were trained stand as they are. Embeddings run through the bare base behind what stands
        before them, as if the mixture's soft prompts had been written one after the other.
        """
        if len(grafts) < 2:
            return None
        length = sum(graft.virtual_tokens for graft in grafts)
        if length > self._target.max_virtual:
            labels = " and ".join(graft.label for graft in grafts)
            raise MixtureRefused(f"{labels} have {length} virtual tokens, the limit is {self._target.max_virtual}")
        key = tuple(graft.digest for graft in grafts)
        join = self._joins.get(key)
        if join is None:
            prefix = await self._append(grafts)
            self._make_room(prefix.bytes, " and ".join(graft.label for graft in grafts))
            join = self._joins.setdefault(key, Join(prefix))
        join.leases += 1
        self._joins.move_to_end(key)
        return join

    async def _append(self, grafts: Sequence[Graft]) -> Prefix:
        prefix = grafts[0].prefix
        assert prefix is not None, "only adapters with virtual tokens are joined"
        for graft in grafts[1:]:
            own = graft.prefix
            if graft.soft_prompt_VE is not None:
                own = await self._workshop.compile(graft.soft_prompt_VE, after=prefix)
                if not own.finite:
                    raise MixtureRefused(f"the soft prompt of {graft.label} overflows behind {grafts[0].label}")
            assert own is not None, "only adapters with virtual tokens are joined"
            prefix = prefix.then(own)
        return prefix

    def _combined(self, terms: Sequence[tuple[str, float]]) -> Sequence[tuple[str, float]]:
        """The same reference twice is one adapter with the sum of the weights."""
        if len(terms) > self._config.max_terms:
            raise MixtureRefused(f"a mixture of {len(terms)} adapters is above the limit of {self._config.max_terms}")
        weights: dict[str, float] = {}
        for text, weight in terms:
            if not math.isfinite(weight) or abs(weight) > self._config.max_weight:
                raise InvalidValue(f"weight {weight:g} of {text[:200]} is outside ±{self._config.max_weight:g}")
            weights[text] = weights.get(text, 0.0) + weight
        return list(weights.items())

    async def _hold(self, text: str) -> tuple[Resident, Resolution]:
        """Resolve, load if absent, lease."""
        key = self._source.pointer(self._named.get(text, text))
        resolution = await self._resolved(text)
        try:
            resident = await self._ensure(resolution)
        except (AdapterIncompatible, AdapterUnavailable) as error:
            if key is None:
                raise
            failed, (resident, resolution) = resolution, await self._ensure_earlier(key, error)
            pointer = self._pointers.get(key)
            if pointer and pointer.serving == failed:
                self._pointers[key] = replace(pointer, serving=resolution)
        return resident, resolution

    async def _resolved(self, text: str) -> Resolution:
        """What a reference means here now; an alias that has moved is tried first."""
        reference = self._named.get(text, text)
        key = self._source.pointer(reference)
        pointer = self._pointers.get(key) if key else None
        if key and pointer and pointer.pending:
            pointer = await self._advance(key, pointer)
        if key and not pointer:
            pointer = await self._point(key, reference)
        return pointer.serving if pointer else await asyncio.to_thread(self._source.resolve, reference)

    async def _point(self, key: tuple[str, str], reference: str) -> Pointer:
        """Find out where an alias points when it is asked for first; from then on its moves are followed."""
        while True:
            before = self._moves[key[0]], self._catching_up
            resolution = await asyncio.to_thread(self._source.resolve, reference)
            if before == (self._moves[key[0]], self._catching_up):  # else it may have moved, with nothing to follow yet
                if resolution.remembered:
                    self._recalled.add(key[0])
                return self._pointers.setdefault(key, Pointer(resolution))

    async def _ensure_earlier(self, key: tuple[str, str], error: ServerError) -> tuple[Resident, Resolution]:
        """What an alias serves when its version fails and none before it is at work here: where the alias was before.

        So a server that starts now answers as those that saw the alias move. Raises: `error`, when nothing does better.
        """
        for resolution in await asyncio.to_thread(self._source.earlier, *key):
            with suppress(AdapterIncompatible, AdapterUnavailable):
                resident = await self._ensure(resolution)
                log.error("%s@%s points to a version that fails; %s serves: %s", *key, resolution.label, error.message)
                return resident, resolution
        raise error

    async def _ensure(self, resolution: Resolution) -> Resident:
        """The graft of a digest, leased once for the caller. Raises: ServerError, NoRoom."""
        digest = resolution.digest
        while digest not in self._resident:  # again where it was evicted between the end of its loading and now
            if digest in self._failed:
                raise self._failed[digest][1]
            if digest not in self._loading:
                self._loading[digest] = (resolution, asyncio.create_task(self._load(resolution)))
            # Shielded: when the one who asked first goes away, the others still wait for it.
            await asyncio.shield(self._loading[digest][1])
        resident = self._resident[digest]
        resident.leases += 1
        self._resident.move_to_end(digest)
        return resident

    async def _load(self, resolution: Resolution) -> None:
        """Make it resident. Raises: ServerError, NoRoom."""
        started = time.perf_counter()
        try:
            resident = await self._make(resolution)
        except (AdapterIncompatible, AdapterUnavailable) as error:
            # Remembered, for the bytes of a digest never change; only what the disk did may be better next time.
            if not isinstance(error.__cause__, Exception):
                self._failed[resolution.digest] = (resolution, error)
            self._metrics.adapter_refused(error.code or "refused")
            log.warning("%s (%s) does not serve: %s", resolution.label, resolution.digest[:19], error.message)
            raise
        finally:
            del self._loading[resolution.digest]
        self._resident[resolution.digest] = resident
        seconds = time.perf_counter() - started
        self._metrics.adapter_loaded(resident.tier, seconds)
        log.info(
            "%s (%s) is resident after %.3f s%s", resolution.label, resolution.digest[:19], seconds, resident.exactness
        )

    async def _make(self, resolution: Resolution) -> Resident:
        async with self._load_slots:
            artifact, lowered = await self._quiet.run(self._read, resolution)
        # A router's experts take load slots of their own, so it must not wait for them in one.
        experts = await self._hold_experts(resolution, lowered.experts)
        with ExitStack() as undo:
            for expert in experts:
                undo.callback(self.release, expert)
            async with self._load_slots:
                resident = await self._finish(resolution, artifact, lowered, experts)
            try:
                self._make_room(resident.bytes, resolution.label)  # nothing comes between the room and its use
            except NoRoom as lacking:
                raise self._beside(experts, lacking) from None
            undo.pop_all()
            return resident

    def _read(self, resolution: Resolution) -> tuple[Artifact, Lowered]:
        """In a thread. Raises: AdapterIncompatible, AdapterUnavailable."""
        artifact = self._source.fetch(resolution)
        try:
            return artifact, lower(artifact.kind, artifact.config, artifact.tensors, self._target)
        except AdapterIncompatible as error:
            raise AdapterIncompatible(f"{resolution.label}: {error.message}", param="model") from None

    async def _hold_experts(self, resolution: Resolution, references: Sequence[str]) -> tuple[Resident, ...]:
        """A router's experts, by the digests that it pins, leased for it."""
        held: list[Resident] = []
        with ExitStack() as undo:
            for text in references:
                try:
                    expert = await self._ensure(await asyncio.to_thread(self._source.resolve, text))
                except NoRoom as lacking:
                    raise self._beside(held, lacking) from None
                except (ModelNotFound, AdapterUnavailable) as error:
                    raise AdapterUnavailable(
                        f"{resolution.label} has no expert {text[:200]}: {error.message}"
                    ) from error
                undo.callback(self.release, expert)
                held.append(expert)
                reason = why_no_expert(expert.graft, self._target.decoder_layers)
                if reason is not None:
                    raise AdapterIncompatible(f"{resolution.label} routes among experts: {reason}", param="model")
            undo.pop_all()
        return tuple(held)

    async def _finish(
        self, resolution: Resolution, artifact: Artifact, lowered: Lowered, experts: tuple[Resident, ...]
    ) -> Resident:
        prefix = lowered.prefix
        if lowered.soft_prompt_VE is not None:
            prefix = await self._workshop.compile(lowered.soft_prompt_VE)
            if not prefix.finite:
                raise AdapterIncompatible(f"{resolution.label}: its soft prompt overflows in the base", param="model")
        graft = lowered.graft(resolution.digest, resolution.label, prefix)
        if self._config.check_golden and graft.digest not in self._proved:
            await self._replay(artifact, graft, experts)
            self._remember_proof(graft.digest)
        tier, off = artifact.tier, lowered.approximation
        return Resident(resolution, artifact.kind, artifact.rank, graft, tier, off, experts=experts)

    async def _replay(self, artifact: Artifact, graft: Graft, experts: Sequence[Resident]) -> None:
        limit = golden.limit(self._target.dtype, quantized=self._quantized or artifact.golden_is_quantized)
        route = None
        if graft.router is not None:
            route = Route(tuple(Expert(one.graft) for one in experts), graft.router.top_k, 1.0, graft)
        for first in range(0, len(artifact.golden), PROBES_AT_ONCE):
            rows = artifact.golden[first : first + PROBES_AT_ONCE]
            asked = [self._workshop.probe(graft, row.prompt_ids, route=route) for row in rows]
            for index, got in enumerate(await asyncio.gather(*asked)):
                off = golden.distance(rows[index].logits_V, got)
                if not off <= limit:
                    raise AdapterUnavailable(
                        f"{graft.label}: golden row {first + index} is off by {off:.3g}, the limit is {limit:g}"
                    )

    def _remember_proof(self, digest: str) -> None:
        """For as long as this process lives, whose base and whose code do not change: decision 25."""
        self._proved[digest] = None
        if len(self._proved) > MAX_PROVED:
            self._proved.popitem(last=False)

    def _beside(self, held: Iterable[Resident], lacking: NoRoom) -> NoRoom:
        """That there is no room beside these, which are let go. Raises: MixtureRefused where there never is."""
        own = {one.resolution.digest: one.bytes for one in held}
        known = NoRoom(lacking.label, lacking.wanted, {**lacking.beside, **own})
        if known.together > self._config.cache_bytes:
            raise MixtureRefused(
                f"{known.label} and what is served with it take {known.together} bytes, the adapter cache holds "
                f"{self._config.cache_bytes}"
            )
        return known

    def _fits(self, lacking: NoRoom) -> bool:
        held = self._held()
        more = sum(size for digest, size in lacking.beside.items() if digest not in held)
        return sum(held.values()) + more + lacking.wanted <= self._config.cache_bytes

    def _make_room(self, wanted: int, label: str) -> None:
        """Evict what nobody holds, joins first, then the least recently used, until so many bytes are free.

        Raises: NoRoom, with nothing evicted; AdapterIncompatible.
        """
        budget = self._config.cache_bytes
        if wanted > budget:
            raise AdapterIncompatible(f"{label} takes {wanted} bytes, the adapter cache holds {budget}")
        lacking = NoRoom(label, wanted)
        if not self._fits(lacking):
            raise lacking
        while self._bytes() + wanted > budget:
            key = next((key for key, join in self._joins.items() if not join.leases), None)
            if key is not None:
                del self._joins[key]
                continue
            digest = next(d for d, one in self._resident.items() if not one.leases and not one.pinned)
            evicted = self._forget(digest)
            log.info("%s was evicted for %s", evicted.resolution.label, label)

    def _held(self) -> Mapping[str, int]:
        """The bytes of all that cannot be evicted: what is leased or pinned, but not by routers alone that can be."""
        idle = [one for one in self._resident.values() if not one.leases and not one.pinned]
        by_idle = Counter(expert.resolution.digest for router in idle for expert in router.experts)
        held = {d: one.bytes for d, one in self._resident.items() if one.pinned or one.leases > by_idle[d]}
        return held | {"+".join(key): join.prefix.bytes for key, join in self._joins.items() if join.leases}

    def _forget(self, digest: str) -> Resident:
        """Take a resident adapter away, and with a router its hold on its experts."""
        gone = self._resident.pop(digest)
        for expert in gone.experts:
            self.release(expert)
        return gone

    def _bytes(self) -> int:
        joins = sum(join.prefix.bytes for join in self._joins.values())
        return joins + sum(one.bytes for one in self._resident.values())

    async def _follow(self, name: str) -> None:
        """Something happened to a name: find out where its aliases in use point now."""
        self._moves[name] += 1
        for key in [key for key in self._pointers if key[0] == name]:
            try:
                resolution = await asyncio.to_thread(self._source.resolve, f"{key[0]}@{key[1]}")
            except ModelNotFound:
                del self._pointers[key]
                continue
            if resolution.remembered:
                raise Unavailable(f"the hub cannot be reached for {name}", retry_after_s=RECONNECT_S)
            serving = self._pointers[key].serving  # by now
            if resolution.digest == serving.digest:
                self._pointers[key] = Pointer(resolution)
                continue
            if resolution.digest in self._failed:
                continue
            self._pointers[key] = moved = Pointer(serving, resolution)
            if serving.digest in self._resident or serving.digest in self._loading:
                self._spawn(key, moved)

    def _spawn(self, key: tuple[str, str], pointer: Pointer) -> None:
        async def advance() -> None:
            with suppress(Unavailable):
                await self._line.serve(lambda: self._advance(key, pointer, serve_meanwhile=False))

        task = asyncio.create_task(advance())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _advance(self, key: tuple[str, str], pointer: Pointer, *, serve_meanwhile: bool = True) -> Pointer:
        """Try the version that an alias has moved to; the pointer as it is afterwards.

        Where there is no room for it, what serves goes on if it is here and may `serve_meanwhile`. Raises: NoRoom.
        """
        assert pointer.pending is not None
        after = Pointer(pointer.pending)
        try:
            self.release(await self._ensure(pointer.pending))
        except (AdapterIncompatible, AdapterUnavailable, ModelNotFound) as error:
            log.error(
                "%s@%s moved to %s, which fails; %s keeps serving: %s",
                *key,
                pointer.pending.label,
                pointer.serving.label,
                error.message,
            )
            after = Pointer(pointer.serving)
        except Unavailable:
            return pointer
        except NoRoom:
            if serve_meanwhile and pointer.serving.digest in self._resident:
                return pointer
            raise
        if self._pointers.get(key) == pointer:
            self._pointers[key] = after
            if after.serving.digest != pointer.serving.digest:
                self._metrics.adapter_swapped()
                log.info("%s@%s now serves %s", *key, after.serving.label)
        return after

    async def _drop(self, reference: str, *, strict: bool) -> AdapterStatus:
        key = self._source.pointer(reference)
        pointer = self._pointers.get(key) if key else None
        resolution = pointer.serving if pointer else await asyncio.to_thread(self._source.resolve, reference)
        resident = self._resident.get(resolution.digest)
        if resident is None:
            raise ModelNotFound(UNKNOWN_MODEL.format(reference[:200]) + ": it is not resident")
        resident.pinned = False
        if resident.leases and strict:
            raise InvalidValue(f"{resolution.label} is held by {resident.leases} running requests or resident routers")
        if not resident.leases:
            self._forget(resolution.digest)
            self._line.freed()
        return replace(self._status(resident), tier="evicted")

    def _status(self, one: Resident) -> AdapterStatus:
        digest = one.resolution.digest
        return AdapterStatus(
            name=one.resolution.name,
            version=one.resolution.version,
            digest=digest,
            kind=one.kind,
            tier="device",
            bytes=one.bytes,
            leases=one.leases,
            pinned=one.pinned,
            rank=one.rank,
            references=tuple(self._references(one.resolution)),
            approximation=one.approximation,
        )

    def _references(self, resolution: Resolution) -> Iterable[str]:
        """Every string under which a digest can be asked for without a look at the hub."""
        asked = {resolution.label}
        for (name, alias), pointer in self._pointers.items():
            if pointer.serving.digest == resolution.digest:
                asked.add(f"{name}@{alias}")
                if alias == self._config.default_alias:
                    asked.add(name)
        asked.update(name for name, reference in self._named.items() if reference in asked)
        return sorted(asked)


def _term(text: str, resolution: Resolution, resident: Resident, weight: float) -> AdapterTerm:
    return AdapterTerm(text, resolution.name, resolution.version, resolution.digest, resident.kind, weight)


def _top_k(order: RoutingOrder, *, default: int, candidates: int) -> int:
    """What was asked for, or the default as far as there are candidates. Raises: InvalidValue."""
    if order.top_k is None:
        return min(default, candidates)
    if order.top_k > candidates:
        raise InvalidValue(f"top_k {order.top_k} is above the {candidates} candidates", param="routing.top_k")
    return order.top_k


def _grafts(held: Sequence[tuple[Resident, float]]) -> tuple[tuple[Graft, float], ...]:
    return combined([(resident.graft, weight) for resident, weight in held])


def _servable(id_: str, line: Listed) -> Servable:
    return Servable(id_, line.resolution.version, line.resolution.digest, line.kind, line.created)


def _absent(resolution: Resolution, tier: str, error: str | None) -> AdapterStatus:
    return AdapterStatus(
        name=resolution.name,
        version=resolution.version,
        digest=resolution.digest,
        kind="",
        tier=tier,
        bytes=0,
        leases=0,
        pinned=False,
        rank=None,
        references=(resolution.label,),
        error=error,
    )
