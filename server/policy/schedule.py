"""What the next step computes: pure bookkeeping over sequences and KV blocks, with no tensor, clock or text.

There is no prefill phase and no decode phase. Each sequence has a count of computed positions that catches up with its
length; a chunk of a prompt, one new token and a prefix hit are the same case with other counts. Positions 0..V-1 of a
sequence are its adapter's virtual tokens (their KV is loaded, not computed), then come prompt and generated tokens.

`plan` serves sequences that need one token before those that need more. Prompts, and places in the batch, go round the
queues by what each has had (`server.policy.queues`); a prompt is admitted only where blocks for all of it are free.
When blocks run out the youngest running sequence gives its own back and starts again later with the same text; so does
the youngest of a queue that holds more than its share of a full batch, when one that holds less is next.
Law: the sequence that has run longest is never preempted, so something always ends.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from server.policy.blocks import BlockPool, Key, block_key
from server.policy.queues import Queue, Queues
from server.policy.reach import BARE, Course, marks
from server.records import FinishReason

VIRTUAL_TOKEN = -1  # stands for a virtual token in block keys: no vocabulary has it
PROMPT_PER_DECODE = 2  # prompt tokens for each that decodes, where that is more than `prompt_tokens`


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
    queue: str = ""  # whose share of the service it uses
    weight: float = 1.0  # of that queue
    computed: int = 0
    admitted: bool = False  # at some time; it may wait again
    cached: int = 0  # prompt tokens that came out of the prefix cache when it was first admitted
    blocks: list[int] = field(default_factory=list)
    published: int = 0
    keys: list[Key] = field(default_factory=list)  # of its full blocks, as far as they were asked for

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

    def key(self, index: int, block_size: int) -> Key:
        """The identity of a full block; neither preemption nor new tokens change it."""
        while len(self.keys) <= index:
            start = len(self.keys) * block_size
            stop = start + block_size
            parent = self.keys[-1] if self.keys else b""
            self.keys.append(block_key(parent, self.span(start, stop), marks(self.course, start, stop)))
        return self.keys[index]


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


@dataclass(slots=True)
class Draft:
    """A step in the making: how many tokens each sequence gets of it, in the order of its chunks."""

    left: int  # tokens
    counts: dict[int, int] = field(default_factory=dict)
    sequences: dict[int, Sequence] = field(default_factory=dict)
    prompts: dict[str, deque[Sequence]] = field(default_factory=dict)  # running ones that still need some, by queue
    preloads: dict[int, tuple[int, int]] = field(default_factory=dict)
    fresh: list[int] = field(default_factory=list)

    def give(self, sequence: Sequence, count: int) -> None:
        self.counts[sequence.id] = self.counts.get(sequence.id, 0) + count
        self.sequences[sequence.id] = sequence
        self.left -= count

    def drop(self, sequence: Sequence) -> None:
        self.counts.pop(sequence.id, None)
        prompts = self.prompts.get(sequence.queue)
        if prompts and sequence in prompts:
            prompts.remove(sequence)

    def missing(self, sequence: Sequence) -> int:
        return sequence.missing - self.counts.get(sequence.id, 0)

    def step(self) -> Step:
        chunks = [
            Chunk(self.sequences[id_], self.sequences[id_].computed, count, self.preloads.get(id_))
            for id_, count in self.counts.items()
        ]
        return Step(tuple(chunks), tuple(self.fresh))


@dataclass(frozen=True, slots=True)
class Need:
    """What admitting a sequence takes: `hits` are cached blocks that it can use, `wanted` blocks are to be taken."""

    hits: list[int]
    idle_hits: int  # hits that nobody holds: they are no longer available then
    wanted: int

    @property
    def blocks(self) -> int:
        return self.idle_hits + self.wanted


class Scheduler:
    """`prompt_tokens` is what prompts may have of a step while several requests are open, at least; none: all of it.

    So whoever comes next waits for no longer step, also when nobody decodes yet; a request alone has all of it.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_batch_tokens: int,
        max_running: int,
        prompt_tokens: int | None = None,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.prompt_tokens = max_batch_tokens if prompt_tokens is None else prompt_tokens
        self._queues: Queues[Sequence] = Queues()

    @property
    def running(self) -> Collection[Sequence]:
        """In order of admission."""
        return self._queues.running.values()

    @property
    def waiting(self) -> int:
        return self._queues.waiting

    @property
    def changes(self) -> int:
        """Grows whenever another set of sequences waits or runs."""
        return self._queues.changes

    def add(self, sequence: Sequence) -> None:
        most = sequence.virtual + sequence.prompt_len + sequence.max_tokens
        assert self._blocks_for(most) <= self.pool.total, "what can never fit is refused at the door"
        self._queues.add(sequence)

    def plan(self) -> Step:
        """The chunks of the next step; none when nothing can run."""
        draft = Draft(self.max_batch_tokens)
        self._plan_decodes(draft)
        if len(self.running) + self.waiting > 1:
            draft.left = min(draft.left, max(self.prompt_tokens, PROMPT_PER_DECODE * len(draft.counts)))
        self._plan_prompts(draft)
        return draft.step()

    def commit(self, step: Step, drawn: Mapping[int, int]) -> list[Outcome]:
        """Take in a step's results; `drawn` maps the id of every completed sequence to its next token."""
        outcomes = []
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence.id not in self._queues.running:  # it ended in this step without a token
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
        self._queues.remove(sequence)
        self._release(sequence)

    def _append(self, sequence: Sequence, token: int) -> Outcome:
        sequence.tokens.append(token)
        stopped = token in sequence.stop_ids
        full = sequence.generated >= sequence.max_tokens
        return Outcome(sequence, token, "stop" if stopped else "length" if full else None, stopped)

    def _plan_decodes(self, draft: Draft) -> None:
        """A token for each that needs only one, those that have run longest first."""
        for sequence in list(self.running):
            if draft.left == 0:
                return
            if sequence.missing > 1 or sequence.id not in self._queues.running:  # preempted for an older one
                continue
            if self._grow(sequence, draft):
                draft.give(sequence, 1)
                self._queues.of(sequence).charge(1)

    def _plan_prompts(self, draft: Draft) -> None:
        """The rest of the step goes round the queues; a queue has its own prompts computed one after the other."""
        for sequence in self.running:
            if sequence.missing > 1:
                draft.prompts.setdefault(sequence.queue, deque()).append(sequence)
        admitting = True
        while draft.left:
            queue = self._next(draft, admitting=admitting)
            if queue is None:
                return
            prompts = draft.prompts.setdefault(queue.name, deque())
            if not prompts:
                admitted = self._admit(queue, draft)
                if admitted is None:  # nobody overtakes it, or a large one would wait for ever
                    admitting = False
                    continue
                prompts.append(admitted)
            sequence = prompts[0]
            missing = draft.missing(sequence)
            count = min(missing, draft.left, queue.left_in_turn)
            draft.give(sequence, count)
            queue.charge_turn(count, ends=count == missing)
            if count == missing:
                prompts.popleft()

    def _next(self, draft: Draft, *, admitting: bool) -> Queue[Sequence] | None:
        """The queue that has had least, of those with a prompt in hand or, while `admitting`, a waiting one."""
        starving = self._queues.starving() if admitting and len(self.running) < self.max_running else None
        if starving is not None and not draft.prompts.get(starving.name):
            return starving
        inhand = [self._queues.of(prompts[0]) for prompts in draft.prompts.values() if prompts]
        first = min(inhand, key=lambda queue: queue.tag, default=None)
        waiting = self._queues.next() if admitting else None
        if first is None or (waiting is not None and waiting.tag < first.tag):
            return waiting
        return first

    def _admit(self, queue: Queue[Sequence], draft: Draft) -> Sequence | None:
        """Let the first of a queue run, with blocks for all that it has to compute, or None while there is no room."""
        if len(self.running) >= self.max_running and not self._above(queue):
            return None
        sequence = queue.head
        need = self._need(sequence)
        if not self._fits(need, free=self.pool.available, running=len(self.running)):
            victims = self._victims(queue, need, draft)
            for victim in victims:
                self._preempt(victim, draft)
            if not victims:
                return None
        self._queues.admit(queue)
        for block in need.hits:
            self.pool.share(block)
        sequence.blocks = list(need.hits)
        sequence.published = len(need.hits)
        hit = len(need.hits) * self.block_size
        if not sequence.admitted:
            sequence.admitted, sequence.cached = True, max(0, hit - sequence.virtual)
        self._extend(sequence, need.wanted, draft)
        sequence.computed = max(hit, sequence.virtual)
        if hit < sequence.virtual:
            draft.preloads[sequence.id] = (hit, sequence.virtual)
        return sequence

    def _need(self, sequence: Sequence) -> Need:
        hits = self._hits(sequence)
        idle = sum(not self.pool.is_held(block) for block in hits)
        return Need(hits, idle, self._blocks_for(sequence.length) - len(hits))

    def _fits(self, need: Need, *, free: int, running: int) -> bool:
        """Each running sequence may soon want one block more: without these, the next growth would preempt."""
        return running < self.max_running and need.blocks + running <= free

    def _victims(self, queue: Queue[Sequence], need: Need, draft: Draft) -> list[Sequence]:
        """Whom to preempt for the first of `queue`: the youngest of queues that hold more than their share and have had
        more; none where that would not make room.

        Law: every one brings the places of the queues nearer to their weights, so nobody is preempted to and fro.
        """
        heap = [(-len(one.running) / one.weight, one.name, list(one.running.values())) for one in self._above(queue)]
        heapq.heapify(heap)
        share = (len(queue.running) + 1) / queue.weight
        free, running, found = self.pool.available, len(self.running), list[Sequence]()
        hits = set(need.hits)
        while heap and not self._fits(need, free=free, running=running):
            _, name, members = heapq.heappop(heap)
            youngest = members.pop()
            if len(members) / youngest.weight < share:
                continue
            heapq.heappush(heap, (-len(members) / youngest.weight, name, members))
            if youngest.id in draft.counts and draft.counts[youngest.id] > 1:
                continue  # it has a part in this step already
            found.append(youngest)
            running -= 1
            free += sum(self.pool.is_sole(block) and block not in hits for block in youngest.blocks)
        return found if self._fits(need, free=free, running=running) else []

    def _above(self, queue: Queue[Sequence]) -> list[Queue[Sequence]]:
        """Queues that have had more and could give a place away without having less of them than `queue` then has."""
        share = (len(queue.running) + 1) / queue.weight
        return [
            other
            for other in self._queues.seated
            if other is not queue and other.tag > queue.tag and (len(other.running) - 1) / other.weight >= share
        ]

    def _hits(self, sequence: Sequence) -> list[int]:
        """The longest run of cached blocks; at least one token is left to compute, since its logits are wanted."""
        hits = list[int]()
        if sequence.reuse:
            for index in range((sequence.length - 1) // self.block_size):
                block = self.pool.find(sequence.key(index, self.block_size))
                if block is None:
                    break
                hits.append(block)
        return hits

    def _publish(self, sequence: Sequence) -> None:
        """Let others find the blocks that this sequence has filled."""
        full = sequence.computed // self.block_size
        if sequence.share:
            for index in range(sequence.published, full):
                self.pool.publish(sequence.blocks[index], sequence.key(index, self.block_size))
        sequence.published = max(sequence.published, full)

    def _grow(self, sequence: Sequence, draft: Draft) -> bool:
        """A block for its next position, taken from the youngest if need be; False when it gave up its own."""
        wanted = self._blocks_for(sequence.length) - len(sequence.blocks)
        while self.pool.available < wanted:
            youngest = next(reversed(self._queues.running.values()))
            self._preempt(youngest, draft)
            if youngest is sequence:
                return False
        self._extend(sequence, wanted, draft)
        return True

    def _preempt(self, sequence: Sequence, draft: Draft) -> None:
        draft.drop(sequence)
        self._release(sequence)
        self._queues.give_back(sequence)

    def _extend(self, sequence: Sequence, wanted: int, draft: Draft) -> None:
        taken = [self.pool.take() for _ in range(wanted)]
        sequence.blocks += taken
        draft.fresh += taken

    def _release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks):  # the deepest first, so that the shared beginning is kept longest
            self.pool.release(block)
        sequence.blocks = []
        sequence.computed = sequence.published = 0

    def _blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)
