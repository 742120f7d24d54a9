"""The engine: one thread that drains its inbox, plans, packs, runs the network, draws and commits, again and again.

It talks to the HTTP loop by two queues of plain records. Everything that touches the network or the KV cache happens in
this thread, between or within steps, so nothing here needs a lock. An error in a step fails the requests of that
step, is logged, and the loop goes on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from server.adapters.bank import Bank
from server.config import EngineConfig
from server.contract import EngineSnapshot, Lease
from server.engine.pack import Packed, block_rows, pack_step
from server.engine.pack_routes import read_shares
from server.engine.sample import Draw, draw_tokens, score
from server.errors import AdapterUnavailable, EngineFailed, InvalidValue, PromptTooLong, QueueFull, StartupRefused
from server.kernels import native
from server.model.kv import KvCache, block_bytes
from server.model.network import Network
from server.policy.blocks import BlockPool
from server.policy.reach import Course, Term, course, nowhere
from server.policy.schedule import Chunk, Outcome, Scheduler, Step
from server.policy.schedule import Sequence as ScheduledSequence
from server.primitives.graft import Graft, combined, prefixed
from server.primitives.prefix import Prefix
from server.primitives.routed_experts import Route
from server.records import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Mixture,
    PromptScored,
    RouteRow,
    Sampled,
    TokenScore,
)

if TYPE_CHECKING:
    from server.engine.graphs import GraphRunner

log = logging.getLogger(__name__)

PROMPT_TOKENS_ON_CPU = 128  # a CPU's step takes as long as it has tokens, from about so many on: see decision 24
QUEUE_RESERVE = 16  # of so many open requests one place is kept for others than the queue that holds all the rest
PROBES = "(golden rows)"  # the queue of probes; no name of an adapter has parentheses


class EventStream:
    """A request's events on the HTTP loop's side."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancel = cancel
        self._over = False

    def put(self, event: Event) -> None:
        self._events.put_nowait(event)

    def cancel(self) -> None:
        if not self._over:
            self._over = True
            self._cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while not self._over:
            event = await self._events.get()
            self._over = isinstance(event, Finished | Failed)
            yield event


@dataclass(slots=True)
class Live:
    """One request in the engine thread."""

    request: GenerationRequest
    lease: Lease
    stream: EventStream
    loop: asyncio.AbstractEventLoop
    sequence: ScheduledSequence
    scores: list[TokenScore] = field(default_factory=list)
    summed_E: Tensor | None = None  # hidden states of the prompt so far, where its embedding is wanted
    route: Route | None = None  # the lease's, once it has read the prompt
    routes: list[RouteRow] = field(default_factory=list)  # not yet told
    routed_positions: int = 0

    def take_routes(self) -> tuple[RouteRow, ...]:
        taken, self.routes = tuple(self.routes), []
        return taken


@dataclass(frozen=True, slots=True)
class ProbeLease:
    """Grafts that no request may see yet."""

    grafts: Sequence[tuple[Graft, float]]
    mixture: Mixture = field(default_factory=Mixture)
    route: Route | None = None

    @property
    def prefix(self) -> Prefix | None:
        return next((graft.prefix for graft in prefixed(self.grafts)), None)

    @property
    def virtual_tokens(self) -> int:
        return sum(graft.virtual_tokens for graft, _ in self.grafts)

    def release(self) -> None:
        """Nothing is held."""


class EngineLoop:
    def __init__(self, network: Network, config: EngineConfig) -> None:
        facts = network.facts
        self._network = network
        self._config = config
        self.max_model_len = min(facts.context, config.max_model_len or facts.context)
        blocks = _block_count(network, config, self.max_model_len)
        self._cache = network.new_cache(blocks, config.block_size)
        in_place = native.serves(facts.device, facts.dtype)
        self._bank = Bank(facts.dtype, facts.groups, facts.numbers) if in_place else Bank(facts.dtype)
        self._graphs = _graph_runner(network, self._cache, config, self.max_model_len) if config.graphs else None
        self._pool = BlockPool(blocks)
        self._scheduler = Scheduler(
            self._pool,
            block_size=config.block_size,
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            prompt_tokens=_prompt_tokens(config, facts.device),
        )
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: dict[int, Live] = {}
        self._outbox: list[tuple[Live, Event]] = []
        self._next_id = 0
        self._open = 0
        self._open_of: Counter[str] = Counter()  # by queue
        self._digests: Counter[str] = Counter()  # of the grafts of all that wait or run
        self._told = -1  # the scheduler's count of changes at the last snapshot
        self._snapshot = EngineSnapshot(0, 0, 0, blocks, config.block_size, (), ())
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open_requests(self) -> int:
        """Requests that have been submitted and have not ended."""
        return self._open

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step in hand. Open requests are left where they are."""
        self._inbox.put(None)
        self._thread.join()

    def snapshot(self) -> EngineSnapshot:
        return self._snapshot

    def submit(self, request: GenerationRequest, lease: Lease) -> EventStream:
        try:
            self._check(request, lease)
        except (QueueFull, PromptTooLong, InvalidValue):
            lease.release()
            raise
        queue_name = queue_of(request)
        self._open += 1
        self._open_of[queue_name] += 1
        self._next_id += 1
        sequence = ScheduledSequence(
            id=self._next_id,
            tokens=list(request.prompt_ids),
            prompt_len=len(request.prompt_ids),
            max_tokens=request.max_tokens,
            course=course_of(lease, request.prompt_ids),
            virtual=lease.virtual_tokens,
            stop_ids=request.stop_token_ids | (frozenset() if request.ignore_eos else self._network.facts.end_ids),
            reuse=self._config.prefix_cache and _reads_cache(request),
            share=self._config.prefix_cache and _fills_cache(request),
            queue=queue_name,
            weight=_weight(request, self._config.shares),
        )
        stream = EventStream(lambda: self._inbox.put(lambda: self._drop(sequence.id)))
        live = Live(request, lease, stream, asyncio.get_running_loop(), sequence)
        self._inbox.put(lambda: self._accept(live))
        return stream

    async def compile(self, embeddings: Tensor, *, after: Prefix | None = None) -> Prefix:
        """Turn a soft prompt (V, E) into a prefix, between two steps; `after` stands before it."""
        return await self._between_steps(
            lambda: self._network.compile_prefix(embeddings, block_size=self._config.block_size, after=after)
        )

    async def probe(self, graft: Graft, prompt_ids: Sequence[int], *, route: Route | None = None) -> Tensor:
        """The logits (vocabulary) after a prompt under one graft, computed in the running batch like any request.

        `route` goes with a graft that is a router.
        """
        request = GenerationRequest(
            request_id=f"golden-{graft.digest[7:19]}",
            prompt_ids=tuple(prompt_ids),
            mixture=Mixture(),
            max_tokens=0,
            keep_logits=True,
        )
        async for event in self.submit(request, ProbeLease(combined(((graft, 1.0),)), route=route)):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished) and event.logits is not None:
                return torch.frombuffer(bytearray(event.logits), dtype=torch.float32)
        raise EngineFailed("a golden row got no logits")

    def _check(self, request: GenerationRequest, lease: Lease) -> None:
        limit = self._config.max_running + self._config.max_waiting
        if self._open >= limit:
            raise QueueFull(f"{self._open} requests are open, the limit is {limit}", retry_after_s=1.0)
        own, most = self._open_of[queue_of(request)], limit - limit // QUEUE_RESERVE
        if own >= most:
            raise QueueFull(
                f"{own} requests of one adapter are open, the limit is {most} of {limit}", retry_after_s=1.0
            )
        if request.return_routing and lease.route is None:
            raise InvalidValue("return_routing: this request is not routed token by token", param="return_routing")
        if request.embed and not self._network.facts.decoder_layers:
            raise InvalidValue("the layers of this base could not be told apart, so it embeds nothing", param="model")
        if request.return_routing and not self._network.facts.decoder_layers:
            raise InvalidValue(
                "return_routing: the layers of this base could not be told apart", param="return_routing"
            )
        if not request.prompt_ids:
            raise InvalidValue("the prompt has no tokens", param="prompt")
        if not request.keep_logits:  # a golden row shows what its maker saw there, whatever worked
            _check_reach(request, lease)
        length = len(request.prompt_ids) + lease.virtual_tokens + request.max_tokens
        if length > self.max_model_len:
            virtual = f" and {lease.virtual_tokens} virtual tokens of the adapter" if lease.virtual_tokens else ""
            raise PromptTooLong(
                f"{len(request.prompt_ids)} prompt tokens{virtual} plus {request.max_tokens} new tokens are {length}, "
                f"the context of this server is {self.max_model_len}"
            )

    async def _between_steps(self, work: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except Exception as error:  # noqa: BLE001  handed to whoever waits
                done.set_exception(error)

        self._inbox.put(run)
        return await asyncio.wrap_future(done)

    # What follows runs in the engine thread.

    def _run(self) -> None:
        if self._config.threads:
            torch.set_num_threads(self._config.threads)
        while self._drain():
            step = self._scheduler.plan()
            if step.chunks:
                try:
                    self._step(step)
                except Exception:
                    log.exception("a step of %d chunks failed; its requests end, the engine goes on", len(step.chunks))
                    for chunk in step.chunks:
                        self._end(chunk.sequence.id, Failed(EngineFailed("the engine failed in this request's step")))
            self._deliver()

    def _drain(self) -> bool:
        """Take in what has arrived, waiting for it only when there is nothing to do; False at the end."""
        idle = not (self._scheduler.running or self._scheduler.waiting)
        try:
            while True:
                command = self._inbox.get(block=idle)
                idle = False
                if command is None:
                    return False
                command()
        except queue.Empty:
            return True

    def _step(self, step: Step) -> None:
        self._cache.clear(step.fresh_blocks)
        for chunk in step.chunks:
            self._preload(chunk)
        live = {chunk.sequence.id: self._live[chunk.sequence.id] for chunk in step.chunks}
        packed = pack_step(
            step,
            self._cache,
            self._bank,
            {id_: one.lease.grafts for id_, one in live.items()},
            frozenset(id_ for id_, one in live.items() if one.request.prompt_logprobs is not None),
            routes={id_: one.route for id_, one in live.items() if one.route is not None},
            traced=frozenset(id_ for id_, one in live.items() if one.request.return_routing),
        )
        if any(one.request.embed for one in live.values()):
            logits_RV, states_TE = self._network.forward_with_states(packed.batch)
            self._sum_states(packed, states_TE)
        else:
            logits_RV = self._forward(packed)
        self._note_routes(packed)
        drawn = self._draw(packed, logits_RV)
        for outcome in self._scheduler.commit(step, drawn):
            self._tell(outcome)

    def _forward(self, packed: Packed) -> Tensor:
        if self._graphs is None:
            return self._network.forward(packed.batch)
        return self._graphs.run(packed.batch, packed.grafts, packed.columns)

    def _note_routes(self, packed: Packed) -> None:
        """Keep who served the step's tokens for those who want to know; a preempted sequence tells nothing twice."""
        wanted = frozenset(c.sequence.id for c, _, _ in packed.rows if self._live[c.sequence.id].request.return_routing)
        if packed.routed is None or not wanted:
            return
        shares = read_shares(packed.routed, wanted, len(self._network.facts.layers))
        for one in packed.routed.chunks:
            live = self._live[one.chunk.sequence.id]
            if one.chunk.sequence.id in wanted:
                known = max(0, live.routed_positions - one.chunk.start)
                live.routes += shares[one.chunk.sequence.id][known:]
                live.routed_positions = max(live.routed_positions, one.chunk.start + one.chunk.count)

    def _preload(self, chunk: Chunk) -> None:
        if chunk.preload is None:
            return
        prefix = self._live[chunk.sequence.id].lease.prefix
        assert prefix is not None, "a sequence with virtual tokens has a prefix"
        rows = block_rows(chunk.sequence.blocks, *chunk.preload, self._config.block_size)
        self._cache.load(prefix, chunk.preload, rows)

    def _draw(self, packed: Packed, logits_RV: Tensor) -> dict[int, int]:
        """The next token of every chunk that completes its sequence; tells scores, ends what needs no token."""
        finite_R = logits_RV.sum(-1).isfinite().tolist()  # one pass: a sum is none where any of its terms is none
        rows, draws, ids = [], [], []
        for chunk, first, count in packed.rows:
            live = self._live[chunk.sequence.id]
            if not all(finite_R[first : first + count]):
                self._end(chunk.sequence.id, Failed(_overflow(live)))
                continue
            if live.request.prompt_logprobs is not None:
                self._score_prompt(live, chunk, logits_RV[first : first + count])
            if not chunk.completes:
                continue
            row = first + count - 1
            if live.request.max_tokens == 0:
                self._scheduler.settle(chunk)
                self._end(chunk.sequence.id, _scored(live, logits_RV[row]))
                continue
            rows.append(row)
            ids.append(chunk.sequence.id)
            draws.append(Draw(live.request.sampling, chunk.sequence.tokens, chunk.sequence.prompt_len))
        if not rows:
            return {}
        picked_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
        tokens = draw_tokens(picked_RV, draws)
        self._score_drawn(picked_RV, ids, tokens)
        return dict(zip(ids, tokens, strict=True))

    def _sum_states(self, packed: Packed, states_TE: Tensor) -> None:
        """Add up what the prompts that are to be embedded have in this step; a preempted one begins again."""
        first = 0
        for chunk, _, _ in packed.rows:
            live = self._live[chunk.sequence.id]
            if live.request.embed:
                sum_E = states_TE[first : first + chunk.count].sum(0, dtype=torch.float64)
                live.summed_E = sum_E if chunk.start == 0 or live.summed_E is None else live.summed_E + sum_E
            first += chunk.count

    def _score_drawn(self, logits_RV: Tensor, ids: Sequence[int], tokens: Sequence[int]) -> None:
        wanting = [row for row, id_ in enumerate(ids) if self._live[id_].request.logprobs is not None]
        if not wanting:
            return
        top = max(self._live[ids[row]].request.logprobs or 0 for row in wanting)
        for row, scored in zip(wanting, score(logits_RV[wanting], [tokens[row] for row in wanting], top), strict=True):
            live = self._live[ids[row]]
            live.scores.append(_trimmed(scored, live.request.logprobs or 0))

    def _score_prompt(self, live: Live, chunk: Chunk, logits_nV: Tensor) -> None:
        """Row i of the chunk scores the prompt token after it; the last row has none."""
        sequence = live.sequence
        first = chunk.start - sequence.virtual
        if first == 0:  # also after a preemption
            live.scores = []
        following = sequence.tokens[first + 1 : min(first + chunk.count + 1, sequence.prompt_len)]
        if following and sequence.generated == 0:
            scores = score(logits_nV[: len(following)], following, live.request.prompt_logprobs or 0)
            live.scores += scores
        if chunk.completes and sequence.generated == 0:
            self._outbox.append((live, PromptScored(tuple(live.scores))))
            live.scores = []

    def _tell(self, outcome: Outcome) -> None:
        live = self._live.get(outcome.sequence.id)
        if live is None:
            return
        if not outcome.stopped:
            scored = live.scores.pop() if live.scores else None
            self._outbox.append((live, Sampled(outcome.token, scored, live.sequence.cached, live.take_routes())))
        if outcome.finish is not None:
            stop = outcome.token if outcome.stopped else None
            self._end(outcome.sequence.id, _finished(live, outcome.finish, stop))

    def _accept(self, live: Live) -> None:
        live.route = live.lease.route
        if live.route is not None and live.route.router is not None:
            live.route = live.route.heard(self._network.reading(live.request.prompt_ids))
        self._live[live.sequence.id] = live
        self._digests.update(graft.digest for graft, _ in live.lease.grafts)
        self._scheduler.add(live.sequence)

    def _drop(self, id_: int) -> None:
        """A cancelled request: its blocks and lease are free before the next step."""
        live = self._forget(id_)
        if live is not None:
            live.loop.call_soon_threadsafe(self._close, [live])

    def _end(self, id_: int, event: Finished | Failed) -> None:
        live = self._forget(id_)
        if live is not None:
            self._outbox.append((live, event))

    def _forget(self, id_: int) -> Live | None:
        """Give back the blocks of a request that ends; None when it has ended already."""
        live = self._live.pop(id_, None)
        if live is not None:
            self._scheduler.finish(live.sequence)
            self._digests.subtract(graft.digest for graft, _ in live.lease.grafts)
        return live

    def _deliver(self) -> None:
        """Publish the step's numbers and send its events, one wake-up per HTTP loop."""
        if self._scheduler.changes != self._told:
            self._told = self._scheduler.changes
            self._snapshot = self._look()
        elif self._snapshot.kv_blocks_used != self._pool.held:
            self._snapshot = replace(self._snapshot, kv_blocks_used=self._pool.held)
        if not self._outbox:
            return
        outbox, self._outbox = self._outbox, []
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Live, Event]]] = {}
        for live, event in outbox:
            by_loop.setdefault(live.loop, []).append((live, event))
        for loop, events in by_loop.items():
            loop.call_soon_threadsafe(self._arrive, events)

    def _look(self) -> EngineSnapshot:
        """It looks at every running request and every digest in use, never at every waiting request."""
        running = Counter(g.digest for s in self._scheduler.running for g, _ in self._live[s.id].lease.grafts)
        self._digests += Counter()  # drops what is no longer held
        return EngineSnapshot(
            running=len(self._scheduler.running),
            waiting=self._scheduler.waiting,
            kv_blocks_used=self._pool.held,
            kv_blocks_total=self._pool.total,
            block_size=self._config.block_size,
            running_adapters=tuple(sorted(running)),
            waiting_adapters=tuple(sorted(digest for digest, held in self._digests.items() if held > running[digest])),
        )

    # What follows runs on the HTTP loop.

    def _arrive(self, events: Sequence[tuple[Live, Event]]) -> None:
        for live, event in events:
            live.stream.put(event)
        self._close([live for live, event in events if isinstance(event, Finished | Failed)])

    def _close(self, ended: Sequence[Live]) -> None:
        for live in ended:
            self._open -= 1
            self._open_of[live.sequence.queue] -= 1
            if not self._open_of[live.sequence.queue]:
                del self._open_of[live.sequence.queue]
            live.lease.release()


def _reads_cache(request: GenerationRequest) -> bool:
    """Whether positions may be taken from the prefix cache: not where something is wanted of every one of them."""
    return _fills_cache(request) and not request.embed


def _fills_cache(request: GenerationRequest) -> bool:
    """Whether others may take its positions: a probe's mixture has no name that could tell them apart."""
    return request.prompt_logprobs is None and not request.keep_logits and not request.return_routing


def queue_of(request: GenerationRequest) -> str:
    """Whose share of the service it uses: the adapters' names, whatever their versions and weights; empty: the base."""
    return PROBES if request.keep_logits else "+".join(sorted(_names(request.mixture)))


def course_of(lease: Lease, prompt: Sequence[int]) -> Course:
    """What each position of a request is computed with. Equal courses over equal tokens leave equal KV."""
    if lease.route is not None:  # nothing stands beside it
        return course([Term(lease.route.label(prompt))], prompt)
    terms = [
        Term(f"{graft.key}*{weight!r}" if weight and graft.sites else "", graft.reach) for graft, weight in lease.grafts
    ]
    before = ">".join(graft.digest for graft in prefixed(lease.grafts))
    return course(terms, prompt, virtual=lease.virtual_tokens, virtual_label=before)


def _names(mixture: Mixture) -> set[str]:
    """Of a routed request the router's, or where there is none its experts'."""
    experts = () if mixture.terms or mixture.routing is None else mixture.routing.experts
    return {term.name for term in (*mixture.terms, *experts)}


def _weight(request: GenerationRequest, shares: Sequence[tuple[str, float]]) -> float:
    """That of the first pattern that fits an adapter of the request."""
    names = _names(request.mixture)
    return next((weight for pattern, weight in shares if any(fnmatchcase(name, pattern) for name in names)), 1.0)


def _prompt_tokens(config: EngineConfig, device: torch.device) -> int:
    if config.prompt_tokens is not None:
        return config.prompt_tokens
    return PROMPT_TOKENS_ON_CPU if device.type == "cpu" else config.max_batch_tokens


def _check_reach(request: GenerationRequest, lease: Lease) -> None:
    """An adapter that would do nothing here is a mistake of the request, and the base's answer no substitute."""
    for graft, weight in lease.grafts:
        if weight and not graft.reach.ranges(request.prompt_ids):
            raise InvalidValue(f"{graft.label} {nowhere(graft.reach)}", param="prompt")


def _block_count(network: Network, config: EngineConfig, max_model_len: int) -> int:
    """Blocks that the memory budget holds, and no more than all running requests could ever fill."""
    one = block_bytes(network.facts.layers, config.block_size, network.facts.dtype)
    longest = -(-max_model_len // config.block_size)
    blocks = min(config.kv_bytes // one, 2 * longest * config.max_running)
    if blocks < longest:
        raise StartupRefused(
            f"a KV cache of {config.kv_bytes} bytes holds {blocks * config.block_size} tokens, one request may need "
            f"{max_model_len}: raise --kv-bytes to {longest * one} or lower --max-model-len"
        )
    return blocks


def _graph_runner(network: Network, cache: KvCache, config: EngineConfig, max_model_len: int) -> GraphRunner:
    # Only where it is asked for: torch for CPUs comes without Triton.
    from server.engine.graphs import SIZES, GraphConfig, GraphRunner

    widest = min(config.max_running, SIZES[-1])
    sizes = (*(size for size in SIZES if size < widest), widest)
    runner = GraphRunner(network, cache, GraphConfig(-(-max_model_len // config.block_size), sizes=sizes))
    runner.capture_all()
    return runner


def _scored(live: Live, logits_V: Tensor) -> Finished | Failed:
    """The end of a request that wants no token."""
    request = live.request
    logits = logits_V.float().cpu().numpy().tobytes() if request.keep_logits else None
    embedding = None
    if request.embed:
        assert live.summed_E is not None, "every chunk of it has been added up"
        embedding = tuple((live.summed_E / len(request.prompt_ids)).tolist())
        if not all(map(math.isfinite, embedding)):
            return Failed(_overflow(live))
    return replace(_finished(live, "length", None), logits=logits, embedding=embedding)


def _finished(live: Live, reason: str, stop: int | None) -> Finished:
    return Finished(
        reason="stop" if reason == "stop" else "length",
        prompt_tokens=live.sequence.prompt_len,
        completion_tokens=live.sequence.generated,
        cached_tokens=live.sequence.cached,
        stop_token_id=stop,
        routes=live.take_routes(),
    )


def _overflow(live: Live) -> AdapterUnavailable | EngineFailed:
    mixture = live.request.mixture
    experts = () if mixture.routing is None else mixture.routing.experts
    names = ", ".join(f"{term.name}@{term.version}" for term in (*mixture.terms, *experts))
    if names:
        return AdapterUnavailable(f"the numbers of {names} overflowed on this prompt")
    return EngineFailed("the base's numbers overflowed on this prompt")


def _trimmed(scored: TokenScore, top: int) -> TokenScore:
    return scored if len(scored.top) == top else TokenScore(scored.token_id, scored.logprob, scored.top[:top])
