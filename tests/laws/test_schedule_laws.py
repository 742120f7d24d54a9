"""The scheduler and its KV blocks under any sequence of arrivals, cancellations and steps."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.policy.blocks import BlockPool, block_key
from server.policy.reach import EVERYWHERE, FromLast, PromptEnds, Reach, Term, course
from server.policy.schedule import VIRTUAL_TOKEN, Scheduler, Sequence, Step

BLOCK_SIZE = 4
CONTEXT = 24  # the longest request: prompt, virtual and new tokens
VIRTUAL_OF = {"": 0, "a": 0, "b": 3, "c": 5, "activated": 0, "at-the-ends": 0}  # one mixture has one prefix
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

    @initialize(blocks=st.integers(6, 12), budget=st.integers(1, 12), running=st.integers(1, 5))
    def start(self, blocks: int, budget: int, running: int) -> None:
        self.pool = BlockPool(blocks)
        self.scheduler = Scheduler(self.pool, block_size=BLOCK_SIZE, max_batch_tokens=budget, max_running=running)
        self.budget = budget
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
            sequence = Sequence(self.next_id, prompt, len(prompt), new, phases, virtual, reuse=reuse)
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
        step = self.scheduler.plan()
        assert step.tokens <= self.budget
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


SchedulerLaws.TestCase.settings = settings(max_examples=250, stateful_step_count=60, deadline=None)
TestSchedulerLaws = SchedulerLaws.TestCase


@given(st.lists(st.integers(1, 14), min_size=1, max_size=8), st.integers(1, 9), st.integers(6, 9))
@settings(max_examples=100, deadline=None)
def test_every_request_ends_in_a_bounded_number_of_steps(lengths: list[int], budget: int, blocks: int) -> None:
    scheduler = Scheduler(BlockPool(blocks), block_size=BLOCK_SIZE, max_batch_tokens=budget, max_running=8)
    for id_, length in enumerate(lengths):
        scheduler.add(Sequence(id_, list(range(length)), length, 6, reuse=False))
    steps = 0
    while scheduler.running or scheduler.waiting:
        step = scheduler.plan()
        for outcome in scheduler.commit(step, {c.sequence.id: 1 for c in step.chunks if c.completes}):
            if outcome.finish is not None:
                scheduler.finish(outcome.sequence)
        steps += 1
        assert steps < 2000


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
