"""The scheduler and its KV blocks under any sequence of arrivals, cancellations and steps."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.policy.blocks import BlockPool, block_key
from server.policy.queues import CREDIT, PATIENCE, TURN
from server.policy.reach import EVERYWHERE, FromLast, PromptEnds, Reach, Term, course
from server.policy.schedule import VIRTUAL_TOKEN, Scheduler, Sequence, Step

BLOCK_SIZE = 4
CONTEXT = 24  # the longest request: prompt, virtual and new tokens
VIRTUAL_OF = {"": 0, "a": 0, "b": 3, "c": 5, "activated": 0, "at-the-ends": 0}  # one mixture has one prefix
WEIGHT_OF = {"b": 2.0, "activated": 0.5}
REACH_OF: dict[str, Reach] = {"activated": FromLast((1, 0)), "at-the-ends": PromptEnds(2, 3)}

# (zeros that many prompts begin with, tokens of its own, mixture, new tokens, may reuse)
requests = st.tuples(
    st.sampled_from([0, 4, 8, 9]),
    st.lists(st.integers(0, 1), min_size=1, max_size=5),
    st.sampled_from(sorted(VIRTUAL_OF)),
    st.integers(1, 5),
    st.sampled_from([True, True, True, False]),
)


class SchedulerLaws(RuleBasedStateMachine):
    """Drives a small scheduler and keeps, beside it, what every block must hold if nobody reads a foreign one."""

    @initialize(
        blocks=st.integers(6, 12), budget=st.integers(1, 12), prompt=st.integers(1, 12), running=st.integers(1, 5)
    )
    def start(self, blocks: int, budget: int, prompt: int, running: int) -> None:
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(
            self.pool, block_size=BLOCK_SIZE, max_batch_tokens=budget, max_running=running, prompt_tokens=prompt
        )
        self.budget = budget
        self.prompt = prompt
        self.open: dict[int, Sequence] = {}
        self.next_id = 0
        self.content: dict[tuple[int, int], tuple[tuple[int, str], ...]] = {}  # (block, offset) -> the course so far

    @rule(requests=st.lists(requests, min_size=1, max_size=3))
    def arrive(self, requests: list[tuple[int, list[int], str, int, bool]]) -> None:
        for head, tail, salt, new, reuse in requests:
            virtual = VIRTUAL_OF[salt]
            prompt = [0] * head + tail
            assert virtual + len(prompt) + new <= CONTEXT
            self.next_id += 1
            reach = REACH_OF.get(salt, EVERYWHERE)
            phases = course([Term(salt, reach)] if salt else [], prompt, virtual=virtual, virtual_label=salt)
            sequence = Sequence(
                self.next_id,
                prompt,
                len(prompt),
                new,
                phases,
                virtual,
                reuse=reuse,
                queue=salt,
                weight=WEIGHT_OF.get(salt, 1.0),
            )
            self.open[sequence.id] = sequence
            self.scheduler.add(sequence)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(sorted(self.open)))
        self.scheduler.finish(self.open.pop(id_))

    @rule(token=st.integers(0, 1))
    def step(self, token: int) -> None:
        lengths = {id_: len(s.tokens) for id_, s in self.open.items()}
        decoding = {s.id for s in self.scheduler.running if s.missing == 1}
        eldest = next(iter(self.scheduler.running), None)
        computed = eldest.computed if eldest else 0
        step = self.scheduler.plan()
        assert step.tokens <= self.budget
        assert eldest is None or eldest.computed == computed, "what has run longest was preempted"
        decodes = sum(chunk.sequence.id in decoding for chunk in step.chunks)
        if len(self.open) > 1:
            assert step.tokens - decodes <= max(self.prompt, 2 * len(decoding)), "prompts hold up who decodes, or comes"
        assert all(chunk.count > 0 for chunk in step.chunks), "a chunk without a token has no logits to draw from"
        assert len(self.scheduler.running) <= self.scheduler.max_running
        assert bool(step.chunks) == bool(self.open), "open requests and nothing planned, or the other way round"
        self.write(step)
        drawn = {chunk.sequence.id: token for chunk in step.chunks if chunk.completes}
        for outcome in self.scheduler.commit(step, drawn):
            if outcome.finish is not None:
                self.scheduler.finish(self.open.pop(outcome.sequence.id))
        for chunk in step.chunks:
            id_ = chunk.sequence.id
            assert len(chunk.sequence.tokens) - lengths[id_] == (id_ in drawn)

    def write(self, step: Step) -> None:
        """What the KV cache would do: clear, load virtual positions, write; then check what each chunk would read."""
        for block in step.fresh_blocks:
            for offset in range(BLOCK_SIZE):
                self.content.pop((block, offset), None)
        for chunk in step.chunks:
            start = chunk.preload[0] if chunk.preload else chunk.start
            for position in range(start, chunk.start + chunk.count):
                self.content[self.place(chunk.sequence, position)] = self.expected(chunk.sequence, position)
        for chunk in step.chunks:
            for position in range(chunk.start + chunk.count):
                found = self.content.get(self.place(chunk.sequence, position))
                assert found == self.expected(chunk.sequence, position), "a sequence would read a foreign position"

    def place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        return sequence.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE

    def expected(self, sequence: Sequence, position: int) -> tuple[tuple[int, str], ...]:
        """KV at a position depends on the tokens up to it and on what each of them was computed with."""
        text = sequence.span(0, position + 1)
        works = [
            next(phase.salt for phase in reversed(sequence.course) if phase.start <= at) for at in range(len(text))
        ]
        return tuple(zip(text, works, strict=True))

    @invariant()
    def blocks_are_neither_lost_nor_owned_while_free(self) -> None:
        if not hasattr(self, "pool"):
            return
        owners = Counter(block for sequence in self.open.values() for block in sequence.blocks)
        free = [*self.pool._blank, *self.pool._cached]
        assert len(set(free)) == len(free), "a block is free twice"
        assert not set(free) & owners.keys(), "a block is free and owned"
        assert len(free) + len(owners) == self.pool.total, "a block is lost"
        assert all(self.pool._owners[block] == owners[block] for block in range(self.pool.total))

    @invariant()
    def every_request_waits_or_runs_once(self) -> None:
        if not hasattr(self, "pool"):
            return
        running = {sequence.id for sequence in self.scheduler.running}
        assert running <= self.open.keys()
        assert self.scheduler.waiting == len(self.open) - len(running)
        assert all(bool(sequence.blocks) == (id_ in running) for id_, sequence in self.open.items())


SchedulerLaws.TestCase.settings = settings(max_examples=250, stateful_step_count=60, deadline=None)
TestSchedulerLaws = SchedulerLaws.TestCase


def one_step(scheduler: Scheduler) -> Step:
    step = scheduler.plan()
    for outcome in scheduler.commit(step, {c.sequence.id: 1 for c in step.chunks if c.completes}):
        if outcome.finish is not None:
            scheduler.finish(outcome.sequence)
    return step


def run_out(scheduler: Scheduler) -> Iterator[Step]:
    """Steps until nothing is open."""
    while scheduler.running or scheduler.waiting:
        yield one_step(scheduler)


# (step at which it arrives, queue, prompt, new tokens)
traces = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from("abc"), st.integers(1, 10), st.integers(1, 14)),
    min_size=1,
    max_size=14,
)


@given(traces, st.integers(1, 9), st.integers(1, 9), st.integers(6, 9), st.integers(1, 8), st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_trace_of_requests_ends_in_a_bounded_number_of_steps(
    trace: list[tuple[int, str, int, int]], budget: int, prompt: int, blocks: int, running: int, reuse: bool
) -> None:
    """Each step computes something, what has run longest is never taken back, and what is computed again is bounded."""
    scheduler = Scheduler(
        BlockPool(blocks), block_size=BLOCK_SIZE, max_batch_tokens=budget, max_running=running, prompt_tokens=prompt
    )
    arriving = sorted((at, id_, queue, length, new) for id_, (at, queue, length, new) in enumerate(trace))
    work = sum(length + new for _, _, _, length, new in arriving)
    steps = 0
    while arriving or scheduler.running or scheduler.waiting:
        while arriving and arriving[0][0] <= steps:
            _, id_, queue, length, new = arriving.pop(0)
            scheduler.add(Sequence(id_, list(range(length)), length, new, reuse=reuse, queue=queue))
        eldest = next(iter(scheduler.running), None)
        decodes = eldest is not None and eldest.missing == 1
        open_before = len(scheduler.running) + scheduler.waiting
        step = one_step(scheduler)
        assert bool(step.chunks) == bool(open_before)
        if decodes:
            assert eldest in [chunk.sequence for chunk in step.chunks], "what has run longest gets a token every step"
        steps += 1
        assert steps <= 31 + work * (len(trace) + 1)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 14), st.integers(1, 6)), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(6, 12),
    st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_one_queue_alone_is_served_first_come_first_served(
    trace: list[tuple[int, int, int]], budget: int, blocks: int, running: int
) -> None:
    scheduler = Scheduler(BlockPool(blocks), block_size=BLOCK_SIZE, max_batch_tokens=budget, max_running=running)
    arriving = sorted((at, id_, length, new) for id_, (at, length, new) in enumerate(trace))
    came = [id_ for _, id_, *_ in arriving]
    first: list[int] = []
    for now in itertools.count():
        while arriving and arriving[0][0] <= now:
            _, id_, length, new = arriving.pop(0)
            scheduler.add(Sequence(id_, [id_] * length, length, new))
        if not (arriving or scheduler.running or scheduler.waiting):
            break
        step = one_step(scheduler)
        first += [c.sequence.id for c in step.chunks if c.sequence.generated == 1]
    assert first == came


@given(
    flood=st.lists(st.tuples(st.integers(1, 700), st.integers(2, 60)), min_size=20, max_size=60),
    length=st.integers(1, CREDIT - TURN // 2),
    running=st.integers(2, 12),
    prompt=st.integers(16, 128),
    before=st.integers(1, 60),
    blocks=st.integers(330, 2000),
    alone=st.integers(0, 8),
)
@example(flood=[(128, 16)] * 30, length=128, running=8, prompt=128, before=1, blocks=2000, alone=4)
@settings(max_examples=80, deadline=None)
def test_a_rare_requests_prompt_has_every_step_to_itself_under_a_flood(
    flood: list[tuple[int, int]], length: int, running: int, prompt: int, before: int, blocks: int, alone: int
) -> None:
    """Also when the flood holds every place in the batch and, but for a few blocks, the whole KV cache.

    The flood may have one turn before, where the rare adapter was served while nobody else asked for anything, and one
    for each of the rare one's, where it has just begun.
    """
    scheduler = Scheduler(
        BlockPool(blocks), block_size=BLOCK_SIZE, max_batch_tokens=256, max_running=running, prompt_tokens=prompt
    )
    scheduler.add(Sequence(-1, [0], 1, 1, queue="hot"))
    list(run_out(scheduler))
    for id_ in range(alone):
        scheduler.add(Sequence(1000 + id_, [1000 + id_] * TURN, TURN, 1, queue="rare"))
        list(run_out(scheduler))
    for id_, (size, new) in enumerate(flood):
        scheduler.add(Sequence(id_, [id_] * size, size, new, queue="hot"))
    had = sum(one_step(scheduler).tokens for _ in range(before))
    others = TURN * -(-length // TURN) if had < CREDIT else TURN if alone else 0
    rare = Sequence(len(flood), [1] * length, length, 1, queue="rare")
    scheduler.add(rare)
    steps = 0
    while rare.generated == 0:
        eldest = next(iter(scheduler.running), None)
        room = blocks - len(eldest.blocks) if eldest else blocks  # what the flood can be made to give back
        if -(-length // BLOCK_SIZE) + 2 > room:
            return  # it waits for the one that is never preempted
        one_step(scheduler)
        steps += 1
        assert steps <= -(-length // prompt) + -(-others // prompt)


@given(length=st.integers(1, 700), prompt=st.integers(8, 200), others=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_step_has_all_it_may_of_a_prompt_alone_and_is_short_from_the_first_of_a_flood_on(
    length: int, prompt: int, *, others: bool
) -> None:
    """Who comes while it is computed waits for it."""
    scheduler = Scheduler(
        BlockPool(800), block_size=BLOCK_SIZE, max_batch_tokens=256, max_running=8, prompt_tokens=prompt
    )
    for id_ in range(20 if others else 1):
        scheduler.add(Sequence(id_, [id_] * length, length, 1))
    assert one_step(scheduler).tokens == (min(8 * length, prompt) if others else min(length, 256))


@given(
    weights=st.fixed_dictionaries({"one": st.integers(1, 4), "late": st.integers(1, 4)}),
    running=st.integers(1, 12),
    length=st.integers(1, 300),
    prompt=st.integers(8, 200),
    before=st.integers(0, 60),
)
@settings(max_examples=30, deadline=None)
def test_queues_with_enough_to_do_share_the_service_by_weight_and_nobody_is_owed_for_when_it_asked_for_nothing(
    weights: dict[str, int], running: int, length: int, prompt: int, before: int
) -> None:
    scheduler = Scheduler(
        BlockPool(4000), block_size=BLOCK_SIZE, max_batch_tokens=256, max_running=running, prompt_tokens=prompt
    )
    ids = itertools.count()
    unanswered: dict[str, list[Sequence]] = {queue: [] for queue in weights}

    def fill(queue: str) -> None:
        unanswered[queue] = [sequence for sequence in unanswered[queue] if not sequence.generated]
        while len(unanswered[queue]) < running + 3:
            id_ = next(ids)
            unanswered[queue].append(Sequence(id_, [id_] * length, length, 3, queue=queue, weight=weights[queue]))
            scheduler.add(unanswered[queue][-1])

    had = dict.fromkeys(weights, 0)
    for at in range(before + 60):
        fill("one")
        if at >= before:
            fill("late")
        for chunk in one_step(scheduler).chunks:
            if at >= before:
                had[chunk.sequence.queue] += chunk.count
        ahead = had["late"] / weights["late"] - had["one"] / weights["one"]
        most = 2 * TURN + 3 * running  # each may be a turn, and the tokens of its running requests, ahead
        assert -most <= ahead <= most + CREDIT


@given(st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_a_queue_that_waits_is_passed_over_a_bounded_number_of_times(running: int, length: int) -> None:
    """New queues without end: each alone has a claim to go first, and still nobody waits for ever."""
    scheduler = Scheduler(BlockPool(60), block_size=BLOCK_SIZE, max_batch_tokens=64, max_running=running)
    ids = itertools.count()

    def add(queue: str) -> Sequence:
        id_ = next(ids)
        sequence = Sequence(id_, [id_] * length, length, 1, queue=queue)
        scheduler.add(sequence)
        return sequence

    for _ in range(3 * CREDIT // length):  # it has had more than anyone who is new
        add("old")
    list(run_out(scheduler))
    for _ in range(8):
        add(f"new {next(ids)}")
    waits = add("old")
    passed = 0
    while not waits.admitted:
        known = {s.id for s in scheduler.running}
        step = one_step(scheduler)
        arrived = sum(chunk.sequence.id not in known for chunk in step.chunks)
        passed += arrived
        for _ in range(arrived + 1):
            add(f"new {next(ids)}")
        assert passed <= PATIENCE + 9 + running


class Untouched(list[int]):
    """A prompt that nobody may look at."""

    def __len__(self) -> int:
        raise AssertionError("a waiting request was looked at")


def test_a_step_looks_at_no_waiting_request_but_the_first_of_a_queue() -> None:
    scheduler = Scheduler(BlockPool(100), block_size=BLOCK_SIZE, max_batch_tokens=64, max_running=2)
    for id_ in range(2):
        scheduler.add(Sequence(id_, [id_] * 3, 3, 40, queue="running"))
    behind = [Sequence(10 + id_, Untouched(), 3, 40, queue=f"queue {id_ % 3}") for id_ in range(300)]
    for id_, sequence in enumerate(behind):
        if id_ < 3:
            sequence.tokens = [id_] * 3
        scheduler.add(sequence)
    for _ in range(20):
        one_step(scheduler)
    for sequence in behind[3:]:
        scheduler.finish(sequence)
    assert scheduler.waiting + len(scheduler.running) <= 5


def test_a_block_key_depends_on_tokens_parent_and_mixture() -> None:
    keys = {
        block_key(b"", [1, 2, 3]),
        block_key(b"", [1, 2, 4]),
        block_key(b"mixture", [1, 2, 3]),
        block_key(block_key(b"", [1, 2, 3]), [1, 2, 3]),
        block_key(b"", [VIRTUAL_TOKEN, 2, 3]),
        block_key(b"", [1, 2, 3], [(0, "a")]),
        block_key(b"", [1, 2, 3], [(1, "a")]),
        block_key(b"", [1, 2, 3], [(0, "a"), (1, "b")]),
    }
    assert len(keys) == 8
