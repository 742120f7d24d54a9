"""Whose turn it is: queues that share the engine's service by weight and virtual time; no tensor, no clock.

A queue holds the requests of one adapter or mixture. Its service is what has been computed for it, in tokens over its
weight; the queue that has had least goes next, and within a queue the first that came. A queue that had nothing to ask
for is owed nothing for that time but `CREDIT`, so that a rare request goes ahead of a flood at once; what a queue had
while nobody else asked is not held against it. A turn is finished before an equal queue's begins: their prompts are
computed one after the other, not all at the same slow pace.
Laws: one queue alone is strictly first come, first served; a queue that waits is passed over by at most `PATIENCE`
admissions and one for each other queue that waits; no operation looks at every waiting request or queue.
Source: Goyal, Vin, Cheng 1996 (start-time fair queueing); Sheng et al. 2024 (arXiv:2401.00588).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

TURN = 256  # tokens of prompts in one turn: most prompts whole, a long one in parts
CREDIT = 512  # tokens by which a queue that asks again may be ahead of the others: the prompt of a rare request
PATIENCE = 128  # admissions of others after which a waiting queue is next, whatever it has had
MAX_IDLE = 1024  # queues that are remembered without a request; one that is forgotten gains `CREDIT` at most


class Request(Protocol):
    @property
    def id(self) -> int: ...

    @property
    def queue(self) -> str: ...

    @property
    def weight(self) -> float: ...


R = TypeVar("R", bound=Request)


@dataclass(slots=True, eq=False)
class Queue(Generic[R]):
    """`tag` is the virtual time at which its turn began, `turn` what it has had in that turn."""

    name: str
    weight: float = 1.0
    tag: float = 0.0
    turn: float = 0.0
    passed_since: int = 0  # the count of admissions when it last had one, or began to wait
    listed: bool = False  # has an entry in the order of tags
    waiting: OrderedDict[int, R] = field(default_factory=OrderedDict)
    running: OrderedDict[int, R] = field(default_factory=OrderedDict)  # in order of admission

    @property
    def served(self) -> float:
        return self.tag + self.turn

    @property
    def head(self) -> R:
        return next(iter(self.waiting.values()))

    @property
    def left_in_turn(self) -> int:
        return max(1, TURN - round(self.turn * self.weight))

    def charge(self, tokens: int) -> None:
        """Tokens beside its turn: those that its running requests have generated."""
        self.tag += tokens / self.weight

    def charge_turn(self, tokens: int, *, ends: bool) -> None:
        """Tokens of a prompt; the turn ends with the prompt, or when it has been long enough."""
        self.turn += tokens / self.weight
        if ends or self.turn * self.weight >= TURN:
            self.tag, self.turn = self.served, 0.0


class Queues(Generic[R]):
    """Every request that waits or runs."""

    def __init__(self) -> None:
        self.running: dict[int, R] = {}  # in order of admission
        self.waiting = 0
        self.changes = 0  # grows whenever a request comes, goes, is admitted or preempted
        self._queues: dict[str, Queue[R]] = {}
        self._seated: dict[str, Queue[R]] = {}  # with a running request
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._starving: OrderedDict[str, Queue[R]] = OrderedDict()  # with a waiting one, the longest not admitted first
        self._order: list[tuple[float, int, Queue[R]]] = []  # a heap; a tag in it may be older, never larger than true
        self._admissions = 0
        self._clock = 0.0

    @property
    def seated(self) -> Collection[Queue[R]]:
        """Queues with a running request."""
        return self._seated.values()

    def of(self, request: R) -> Queue[R]:
        return self._queues[request.queue]

    def add(self, request: R) -> None:
        """To the end of its queue."""
        queue = self._queues.setdefault(request.queue, Queue(request.queue))
        self._idle.pop(queue.name, None)
        queue.weight = request.weight
        if not queue.waiting:
            self._advance()
            queue.tag = max(queue.tag, self._clock - CREDIT)
        queue.waiting[request.id] = request
        self._waits(queue)

    def admit(self, queue: Queue[R]) -> None:
        """The head of a queue begins to run."""
        id_, request = queue.waiting.popitem(last=False)
        queue.running[id_] = self.running[id_] = request
        self._seated[queue.name] = queue
        self._admissions += 1
        queue.passed_since = self._admissions
        self._starving.move_to_end(queue.name)
        self._no_longer_waits(queue)

    def give_back(self, request: R) -> None:
        """A running request goes to the head of its queue."""
        queue = self._queues[request.queue]
        self._no_longer_runs(queue, request)
        queue.waiting[request.id] = request
        queue.waiting.move_to_end(request.id, last=False)
        self._waits(queue)

    def remove(self, request: R) -> None:
        """It ends, wherever it is."""
        queue = self._queues.get(request.queue)
        if queue is None:
            return
        if request.id in queue.running:
            self._no_longer_runs(queue, request)
        elif request.id in queue.waiting:
            del queue.waiting[request.id]
            self._no_longer_waits(queue)
        if not queue.running and not queue.waiting:
            self._rest(queue)

    def next(self) -> Queue[R] | None:
        """Of the queues that wait the one that has had least; of equal ones that which began to wait first."""
        while self._order:
            tag, _, queue = self._order[0]
            if not queue.waiting:
                heapq.heappop(self._order)
                queue.listed = False
            elif tag == queue.tag:
                return queue
            else:
                heapq.heapreplace(self._order, self._entry(queue))
        return None

    def starving(self) -> Queue[R] | None:
        """The queue that has been passed over for too long, if any has."""
        queue = next(iter(self._starving.values()), None)
        return queue if queue is not None and self._admissions - queue.passed_since >= PATIENCE else None

    def _waits(self, queue: Queue[R]) -> None:
        self.changes += 1
        self.waiting += 1
        if queue.name not in self._starving:
            self._starving[queue.name] = queue
            queue.passed_since = self._admissions
        if not queue.listed:
            queue.listed = True
            heapq.heappush(self._order, self._entry(queue))

    def _no_longer_waits(self, queue: Queue[R]) -> None:
        self.changes += 1
        self.waiting -= 1
        if not queue.waiting:
            del self._starving[queue.name]

    def _no_longer_runs(self, queue: Queue[R], request: R) -> None:
        self.changes += 1
        del queue.running[request.id], self.running[request.id]
        if not queue.running:
            del self._seated[queue.name]

    def _rest(self, queue: Queue[R]) -> None:
        """It has no request: remember what it has had for a while."""
        queue.tag, queue.turn = queue.served, 0.0
        if not self.waiting:
            self._clock = max(self._clock, queue.tag + (0 if self.running else CREDIT))
        self._advance()
        self._idle[queue.name] = None
        if len(self._idle) > MAX_IDLE:
            del self._queues[self._idle.popitem(last=False)[0]]

    def _advance(self) -> None:
        """Virtual time: how far the least served of those that wait is; where nobody waits, nobody is owed anything."""
        first = self.next()
        now = first.tag if first else max((queue.served for queue in self._seated.values()), default=self._clock)
        self._clock = max(self._clock, now)

    def _entry(self, queue: Queue[R]) -> tuple[float, int, Queue[R]]:
        return queue.tag, queue.head.id, queue
