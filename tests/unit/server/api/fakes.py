"""A second implementation of the two protocols behind the API: real asyncio, no model. What it says is set by the test.

The engine answers with the tokens of `reply`, then ends as a base does; everything taken is counted, so that a test can
see it given back.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from server.contract import AdapterStatus, Embed, EngineSnapshot, HubStatus, Lease, Servable
from server.errors import (
    AdapterIncompatible,
    AdapterUnavailable,
    InvalidValue,
    ModelNotFound,
    QueueFull,
    ServerError,
)
from server.primitives.graft import Graft
from server.primitives.routed_experts import Route
from server.records import (
    AdapterTerm,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Mixture,
    PromptChoice,
    PromptScored,
    Routing,
    RoutingOrder,
    Sampled,
    TokenScore,
)
from server.text.tokenizer import Tokenizer

END_ID = 1
BLOCK_SIZE, BLOCKS = 16, 1000


class FakeLease:
    def __init__(self, adapters: FakeAdapters, mixture: Mixture) -> None:
        self._adapters = adapters
        self._held = True
        self._mixture = mixture
        adapters.held += 1

    @property
    def mixture(self) -> Mixture:
        return self._mixture

    @property
    def grafts(self) -> Sequence[tuple[Graft, float]]:
        return ()

    @property
    def route(self) -> Route | None:
        return None

    @property
    def prefix(self) -> None:
        return None

    @property
    def virtual_tokens(self) -> int:
        return self._adapters.virtual_tokens if self._mixture.terms else 0

    def release(self) -> None:
        if self._held:
            self._held = False
            self._adapters.held -= 1


class FakeStream:
    def __init__(self, engine: FakeEngine, request: GenerationRequest, lease: Lease) -> None:
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._run(engine, request, lease))
        self._task.add_done_callback(lambda _: engine.end(lease))

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, Finished | Failed):
                return

    def cancel(self) -> None:
        self._task.cancel()

    async def _run(self, engine: FakeEngine, request: GenerationRequest, lease: Lease) -> None:
        cached = engine.cached(request)
        if request.prompt_logprobs is not None:
            scores = [engine.score(token_id, request.prompt_logprobs) for token_id in request.prompt_ids[1:]]
            self._events.put_nowait(PromptScored(tuple(scores)))
        reply = engine.reply_to(request)
        count = 0
        while True:
            await asyncio.sleep(engine.step_s)
            if engine.failure is not None and count == engine.fail_after:
                self._events.put_nowait(Failed(engine.failure))
                return
            if request.embed:
                finished = Finished("length", len(request.prompt_ids), 0, 0, embedding=engine.embedding)
                self._events.put_nowait(finished)
                return
            if count == request.max_tokens:
                self._events.put_nowait(Finished("length", len(request.prompt_ids), count, cached))
                return
            token_id = reply[count] if count < len(reply) else END_ID
            if token_id == END_ID and request.ignore_eos:
                token_id = reply[count % len(reply)]
            stops = request.stop_token_ids | {END_ID}
            if token_id in stops:
                self._events.put_nowait(Finished("stop", len(request.prompt_ids), count + 1, cached, token_id))
                return
            score = None if request.logprobs is None else engine.score(token_id, request.logprobs)
            told = len(request.prompt_ids) if count == 0 else 1
            routes = ((((1, 0.75), (0, 0.25)),),) * told if request.return_routing else ()
            self._events.put_nowait(Sampled(token_id, score, cached, routes))
            count += 1


class FakeEngine:
    def __init__(self, tokenizer: Tokenizer, *, max_model_len: int = 256) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.alive = True
        self.reply: str | tuple[int, ...] = "Graft the apple onto the quince."
        self.embedding: tuple[float, ...] = (0.5,)
        self.step_s = 0.0
        self.failure: ServerError | None = None
        self.fail_after = 0
        self.bug: Exception | None = None  # raised by submit, as only a bug would
        self.max_open = 1000
        self.open = 0
        self.requests: list[GenerationRequest] = []
        self.leased: list[Mixture] = []
        self._seen: set[tuple[frozenset[tuple[str, float]], tuple[int, ...]]] = set()

    def submit(self, request: GenerationRequest, lease: Lease) -> FakeStream:
        if self.bug is not None:
            raise self.bug
        if self.open >= self.max_open:
            lease.release()
            raise QueueFull(f"{self.open} requests are open, the limit is {self.max_open}", retry_after_s=2.0)
        self.open += 1
        self.requests.append(request)
        self.leased.append(lease.mixture)
        return FakeStream(self, request, lease)

    def end(self, lease: Lease) -> None:
        self.open -= 1
        lease.release()

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(self.open, 0, self.open, BLOCKS, BLOCK_SIZE, (), ())

    def reply_to(self, request: GenerationRequest) -> tuple[int, ...]:
        reply = self.reply
        return reply if isinstance(reply, tuple) else self.tokenizer.encode(reply, add_special_tokens=False)

    def score(self, token_id: int, count: int) -> TokenScore:
        rivals = [(token_id, -0.5), *((rival, -float("inf")) for rival in range(300, 300 + count - 1))]
        return TokenScore(token_id, -0.5, tuple(rivals[:count]))

    def cached(self, request: GenerationRequest) -> int:
        """A prompt that was seen before under the same mixture is in the cache, but for its last token."""
        key = (frozenset((term.digest, term.weight) for term in request.mixture.terms), request.prompt_ids)
        known = key in self._seen
        self._seen.add(key)
        return len(request.prompt_ids) - 1 if known else 0


@dataclass
class FakeAdapters:
    """A hub of names, each with versions 1..n; `latest` is the last, `prod` the first."""

    versions: dict[str, int] = field(default_factory=lambda: {"pirate": 2, "team/legal": 3, "soft": 1})
    virtual_tokens: int = 8
    load_s: float = 0.0
    routed: tuple[str, ...] = ()  # names with centroids
    moving: str | None = None  # a name that gets a new version after every acquire
    held: int = 0
    resident_digests: dict[str, AdapterStatus] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    loads: int = 0
    status: HubStatus = field(default_factory=lambda: HubStatus(True, 7, None))

    async def acquire(self, terms: Sequence[tuple[str, float]], routing: RoutingOrder | None = None) -> Lease:
        found = [await self._term(reference, weight) for reference, weight in terms]
        routed = None
        if routing is not None:
            experts = tuple([await self._term(reference, 1.0) for reference in routing.candidates])
            mode: Literal["arrow", "gate"] = "gate" if routing.mode == "gate" else "arrow"
            routed = Routing(mode, experts, routing.top_k or 2, routing.temperature or 1.0)
        if self.moving is not None:
            self.versions[self.moving] += 1
        return FakeLease(self, Mixture(tuple(found), routed))

    def given_names(self) -> Collection[str]:
        return self.named.keys()

    def hub(self) -> HubStatus:
        return self.status

    async def nearest(self, candidates: Sequence[str], embed: Embed) -> PromptChoice:
        """The first candidate where the prompt's embedding is above 0, the base elsewhere."""
        refs = candidates or self.routed
        for reference in refs:
            self._resolve(reference)
        if not refs:
            return PromptChoice(None, None, None, (), "no adapter here has centroids: the base answers")
        (score,) = await embed()
        chosen = refs[0] if score > 0 else None
        return PromptChoice(chosen, score, 0.0, ((refs[0], score),), "the fake says so")

    async def routable(self) -> bool:
        return bool(self.routed)

    async def known(self, reference: str) -> Servable | None:
        try:
            name, version = self._resolve(reference)
        except (ModelNotFound, InvalidValue):
            return None
        return Servable(reference, version, digest_of(name, version), "lora", 1_700_000_000)

    async def servable(self) -> Sequence[Servable]:
        found = [await self.known(name) for name in (*self.versions, *self.named)]
        return [servable for servable in found if servable is not None]

    def resident(self) -> Sequence[AdapterStatus]:
        return list(self.resident_digests.values())

    async def load(self, name: str, reference: str) -> AdapterStatus:
        status = await self._load(reference)
        self.named[name] = reference
        return status

    async def unload(self, name: str) -> None:
        if name not in self.named:
            raise ModelNotFound(f"{name} is not loaded")
        del self.named[name]

    async def pin(self, reference: str) -> AdapterStatus:
        return await self._load(reference)

    async def warm(self, reference: str) -> AdapterStatus:
        return await self._load(reference)

    async def evict(self, reference: str) -> AdapterStatus:
        name, version = self._resolve(reference)
        return self.resident_digests.pop(digest_of(name, version))

    async def _term(self, reference: str, weight: float) -> AdapterTerm:
        status = await self._load(reference)
        kind = "prompt" if status.name == "soft" else "lora"
        return AdapterTerm(reference, status.name, status.version, status.digest, kind, weight)

    async def _load(self, reference: str) -> AdapterStatus:
        name, version = self._resolve(reference)
        if self.load_s:
            await asyncio.sleep(self.load_s)
        self.loads += 1
        digest = digest_of(name, version)
        names = (name, f"{name}@{version}")
        status = AdapterStatus(name, version, digest, "lora", "device", 1000, 0, False, 8, names)
        return self.resident_digests.setdefault(digest, status)

    def _resolve(self, reference: str) -> tuple[str, int]:
        reference = self.named.get(reference, reference)
        name, _, selector = reference.partition("@")
        if name == "corrupt":
            raise AdapterUnavailable("corrupt@1: adapter_model.safetensors does not match its digest")
        if name == "foreign":
            raise AdapterIncompatible("foreign@1: hidden_size is 896, this base has 64", param="model")
        if not name or not all(c.isalnum() or c in "._-/" for c in name) or ".." in name:
            raise InvalidValue(f"{reference[:80]!r} is not a reference", param="model")
        if name not in self.versions:
            raise ModelNotFound(f"The model `{reference[:80]}` does not exist", param="model")
        last = self.versions[name]
        for version in range(1, last + 1):
            if selector in (str(version), digest_of(name, version)):
                return name, version
        if selector in ("", "latest"):
            return name, last
        if selector == "prod":
            return name, 1
        raise ModelNotFound(f"The model `{reference[:80]}` does not exist", param="model")


def digest_of(name: str, version: int) -> str:
    return "sha256:" + hashlib.sha256(f"{name}@{version}".encode()).hexdigest()
