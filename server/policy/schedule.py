"""What the next step computes: pure bookkeeping over sequences and KV blocks, with no tensor, clock or text.

There is no prefill phase and no decode phase. Each sequence has a count of computed positions that catches up with its
length; a chunk of a prompt, one new token and a prefix hit are the same case with other counts. Positions 0..V-1 of a
sequence are its adapter's virtual tokens (their KV is loaded, not computed), then come prompt and generated tokens.

`plan` serves sequences that need one token before those that need more, in order of arrival; when blocks run out the
youngest running sequence gives its blocks back and starts again later with the same text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from server.policy.blocks import BlockPool, Key, block_key
from server.policy.reach import BARE, Course, marks
from server.records import FinishReason

VIRTUAL_TOKEN = -1  # stands for a virtual token in block keys: no vocabulary has it


@dataclass(slots=True, eq=False)
class Sequence:
    """One request as the scheduler sees it. `tokens` is the prompt followed by what was generated."""

    id: int
    tokens: list[int]
    prompt_len: int
    max_tokens: int
    course: Course = BARE  # which terms of its mixture work where
    virtual: int = 0
    stop_ids: frozenset[int] = frozenset()
    reuse: bool = True  # may take cached blocks (not when something is wanted of every position)
    share: bool = True  # lets others take its blocks
    computed: int = 0
    cached: int = 0  # prompt tokens that came out of the prefix cache when it was first admitted
    blocks: list[int] = field(default_factory=list)
    published: int = 0
    last_key: Key = b""

    @property
    def length(self) -> int:
        return self.virtual + len(self.tokens)

    @property
    def missing(self) -> int:
        return self.length - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    def span(self, start: int, stop: int) -> list[int]:
        """Token ids of positions start..stop-1, virtual ones included."""
        virtual = max(0, min(stop, self.virtual) - start)
        return [VIRTUAL_TOKEN] * virtual + self.tokens[max(0, start - self.virtual) : max(0, stop - self.virtual)]

    def key(self, parent: Key, start: int, stop: int) -> Key:
        """The identity of the block of positions start..stop-1."""
        return block_key(parent, self.span(start, stop), marks(self.course, start, stop))


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of one sequence, from position `start` on; `preload` are virtual positions to be filled first."""

    sequence: Sequence
    start: int
    count: int
    preload: tuple[int, int] | None = None

    @property
    def completes(self) -> bool:
        """After this chunk the next token can be drawn."""
        return self.start + self.count == self.sequence.length


@dataclass(frozen=True, slots=True)
class Step:
    chunks: tuple[Chunk, ...]
    fresh_blocks: tuple[int, ...]  # handed out in this step: their old content must be cleared

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did for one sequence whose next token was drawn."""

    sequence: Sequence
    token: int
    finish: FinishReason | None
    stopped: bool  # the token is a stop token and not part of the text


class Scheduler:
    def __init__(self, pool: BlockPool, *, block_size: int, max_batch_tokens: int, max_running: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def plan(self) -> Step:
        """The chunks of the next step; none when nothing can run."""
        budget = self.max_batch_tokens
        chunks: list[Chunk] = []
        fresh: list[int] = []
        for sequence in sorted(self.running, key=lambda sequence: sequence.missing > 1):
            if budget == 0:
                break
            if sequence not in self.running:  # preempted for an older one
                continue
            count = min(sequence.missing, budget)
            if self._grow(sequence, sequence.computed + count, fresh, chunks):
                chunks.append(Chunk(sequence, sequence.computed, count))
                budget -= count
        while self.waiting and budget and len(self.running) < self.max_running:
            chunk = self._admit(self.waiting[0], budget, fresh)
            if chunk is None:
                break
            self.running.append(self.waiting.popleft())
            chunks.append(chunk)
            budget -= chunk.count
        return Step(tuple(chunks), tuple(fresh))

    def commit(self, step: Step, drawn: Mapping[int, int]) -> list[Outcome]:
        """Take in a step's results; `drawn` maps the id of every completed sequence to its next token."""
        outcomes = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence not in self.running:  # it ended in this step without a token
                continue
            self.settle(chunk)
            if sequence.id in drawn:
                outcomes.append(self._append(sequence, drawn[sequence.id]))
        return outcomes

    def settle(self, chunk: Chunk) -> None:
        """A chunk has been computed: its full blocks can be found from now on."""
        chunk.sequence.computed = chunk.start + chunk.count
        self._publish(chunk.sequence)

    def finish(self, sequence: Sequence) -> None:
        """Give back everything that the sequence holds; it may be running, waiting or already gone."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _append(self, sequence: Sequence, token: int) -> Outcome:
        sequence.tokens.append(token)
        stopped = token in sequence.stop_ids
        full = sequence.generated >= sequence.max_tokens
        return Outcome(sequence, token, "stop" if stopped else "length" if full else None, stopped)

    def _admit(self, sequence: Sequence, budget: int, fresh: list[int]) -> Chunk | None:
        """The first chunk of a waiting sequence, or None while there is no room for it."""
        hits, last_key = self._hits(sequence)
        computed = len(hits) * self.block_size
        start = max(computed, sequence.virtual)
        count = min(sequence.length - start, budget)
        wanted = self._blocks_for(start + count) - len(hits)
        if self.pool.available - sum(not self.pool.is_held(block) for block in hits) < wanted:
            return None
        for block in hits:
            self.pool.share(block)
        sequence.blocks = list(hits)
        sequence.published, sequence.last_key = len(hits), last_key
        if sequence.generated == 0:
            sequence.cached = max(0, computed - sequence.virtual)
        self._extend(sequence, wanted, fresh)
        sequence.computed = start
        preload = (computed, sequence.virtual) if computed < sequence.virtual else None
        return Chunk(sequence, start, count, preload)

    def _hits(self, sequence: Sequence) -> tuple[list[int], Key]:
        """The longest run of cached blocks; at least one token is left to compute, since its logits are wanted."""
        key, hits = b"", list[int]()
        if sequence.reuse:
            for start in range(0, sequence.length - self.block_size, self.block_size):
                following = sequence.key(key, start, start + self.block_size)
                block = self.pool.find(following)
                if block is None:
                    break
                hits.append(block)
                key = following
        return hits, key

    def _publish(self, sequence: Sequence) -> None:
        """Let others find the blocks that this sequence has filled."""
        while (sequence.published + 1) * self.block_size <= sequence.computed:
            start = sequence.published * self.block_size
            sequence.last_key = sequence.key(sequence.last_key, start, start + self.block_size)
            if sequence.share:
                self.pool.publish(sequence.blocks[sequence.published], sequence.last_key)
            sequence.published += 1

    def _grow(self, sequence: Sequence, length: int, fresh: list[int], chunks: list[Chunk]) -> bool:
        """Blocks for `length` positions, taken from the youngest if need be; False when it gave up its own."""
        wanted = self._blocks_for(length) - len(sequence.blocks)
        while self.pool.available < wanted:
            youngest = self.running[-1]
            self._preempt(youngest, chunks)
            if youngest is sequence:
                return False
        self._extend(sequence, wanted, fresh)
        return True

    def _preempt(self, sequence: Sequence, chunks: list[Chunk]) -> None:
        chunks[:] = [chunk for chunk in chunks if chunk.sequence is not sequence]
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _extend(self, sequence: Sequence, wanted: int, fresh: list[int]) -> None:
        taken = [self.pool.take() for _ in range(wanted)]
        sequence.blocks += taken
        fresh += taken

    def _release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks):  # the deepest first, so that the shared beginning is kept longest
            self.pool.release(block)
        sequence.blocks = []
        sequence.computed = sequence.published = 0
        sequence.last_key = b""

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)
