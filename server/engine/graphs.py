"""Decode steps as CUDA graphs: one graph for each size of batch, whatever mixture of adapters it carries.

B sequences of a step, S slots, V vocabulary. A graph is launched at once where the same step takes hundreds of
launches, which on a GPU take longer than the products of few tokens. What changes from step to step is data in buffers
of fixed addresses: ids, positions, cache rows, block tables, lengths, gates, the work list (`server.kernels.gpu.work`),
and the addresses of the adapters (`server.adapters.slots`).
A step of fewer sequences than the graph has repeats its first one, which writes the same values to the same place.
Everything else is computed without a graph: prompt chunks, routed requests, more sequences or blocks than were
captured, what could not be captured; and over the same buffers, but with the packed operands, adapters that have no
place in a slot. On a CPU there are no graphs, and the same buffers are computed with: that is how tests see them.
Law: the logits of a step are those of `Network.forward`. A graph shows it on the device where it is to serve: its first
step without adapters and its first with some are computed both ways, and one that differs does not serve again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from server.adapters.slots import Slots
from server.kernels.gpu.work import TILE, Work
from server.model.attention import AttentionPlan
from server.model.kv import KvCache
from server.model.network import Batch, Network
from server.model.slotted import Armed, slot_joints
from server.primitives.graft import Graft

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 32, 64)
# Of the largest logit: by how much a graph's first steps may be off. Sums have another order, which 16 bits amplify.
PROOF = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
WARM_UP = 2  # runs before a capture, in which kernels are compiled and libraries make their handles


@dataclass(frozen=True, slots=True)
class GraphConfig:
    """`blocks` of the widest table, so the longest context; `tiles` of 16 ranks that a token may carry on average."""

    blocks: int
    slots: int = 64
    sizes: tuple[int, ...] = SIZES
    tiles: int = 8


class GraphRunner:
    def __init__(self, network: Network, cache: KvCache, config: GraphConfig) -> None:
        self._network, self._cache, self._config = network, cache, config
        facts = network.facts
        joints = network.joints()
        groups = [{one.name: (one.first, one.end - one.first) for one in joint.members} for joint in joints]
        self.slots = Slots(groups, slots=config.slots, dtype=facts.dtype, device=facts.device)
        self._armed = slot_joints(joints, self.slots.tables)
        self._captured: dict[int, tuple[_StaticStep, Callable[[], Tensor]]] = {}
        self._proved: set[tuple[int, bool]] = set()  # sizes, and whether adapters were at work
        self._pool = torch.cuda.graph_pool_handle() if facts.device.type == "cuda" else None
        self.replays = 0  # steps that were served by a graph

    def capture_all(self) -> None:
        """The largest first: the others then live in its memory."""
        for size in sorted(self._config.sizes, reverse=True):
            self.capture(size)

    def capture(self, size: int) -> None:
        """Make the graph for steps of up to `size` sequences. What cannot be captured is logged and stays as it was."""
        step = _StaticStep(self._network, self._cache, self._armed, self._config, size)
        if self._pool is None:
            self._captured[size] = step, step.compute
            return
        kept = self._cache.read([0])  # the first row of the cache, where the empty step writes
        try:
            self._captured[size] = step, _capture(step, self._pool)
        except RuntimeError as error:
            log.warning("decode steps of %d run without a CUDA graph: %s", size, error)
        finally:
            self._cache.load(kept, (0, 1), [0])

    def run(self, batch: Batch, grafts: Sequence[Graft], columns: Mapping[str, int]) -> Tensor:
        """Logits (R, V), to be read before the next step.

        `grafts` are those at work in the batch; `columns` has the place of each in the batch's gates, by its key.
        """
        size = self._size_for(batch)
        if size is None:
            return self._network.forward(batch)
        step, replay = self._captured[size]
        step.fill(batch)
        slots = self.slots.activate(grafts)
        if slots is None or not self._fill_work(step.work, batch, slots, columns):
            return step.compute_packed(batch)[: len(batch.ids_T)]
        logits_RV = replay()[: len(batch.ids_T)]
        case = size, bool(slots)
        if case not in self._proved:
            plain_RV = self._network.forward(batch)
            finite_R = plain_RV.isfinite().all(1)
            if not finite_R.any():
                return plain_RV  # whatever overflowed says nothing about the graph
            if not _agree(logits_RV[finite_R], plain_RV[finite_R], PROOF[self._network.facts.dtype]):
                log.error("the graph for %d sequences differs from the plain step and does not serve", size)
                del self._captured[size]
                return plain_RV
            self._proved.add(case)
        self.replays += 1
        return logits_RV

    def _fill_work(self, work: Work, batch: Batch, slots: Mapping[str, int], columns: Mapping[str, int]) -> bool:
        sequences = len(batch.ids_T)
        gates_BS = torch.zeros(len(work.now.gates_NS), self.slots.size)
        if batch.gates is not None:
            for key, slot in slots.items():
                gates_BS[:sequences, slot] = batch.gates.host_TK[:, columns[key]].float()
        gates_BS[sequences:] = gates_BS[0]
        return work.fill(gates_BS, self.slots.tiles_S)

    def _size_for(self, batch: Batch) -> int | None:
        """The smallest graph that the step fits; None: it fits none."""
        blocks_BN = batch.plan.decode_blocks_BN
        if blocks_BN is None or batch.plan.spans or batch.routes is not None:
            return None
        sequences, width = blocks_BN.shape
        if len(batch.wanted_R) != sequences or width > self._config.blocks:
            return None
        return min((size for size in self._captured if size >= sequences), default=None)


class _StaticStep:
    """The buffers of one size, and the step over them."""

    def __init__(self, network: Network, cache: KvCache, armed: Armed, config: GraphConfig, size: int) -> None:
        self._network, self._cache, self._armed = network, cache, armed
        device = network.facts.device
        self.work = Work(tokens=size, slots=config.slots, units=size * config.tiles, rows=TILE, device=device)
        self._ids_B, self._positions_B, self._rows_B = torch.zeros(3, size, dtype=torch.long, device=device)
        self._lengths_B = torch.ones(size, dtype=torch.long, device=device)
        self._blocks_BN = torch.zeros(size, config.blocks, dtype=torch.long, device=device)
        self._wanted_B = torch.arange(size, device=device)

    def fill(self, batch: Batch) -> None:
        blocks_BN, lengths_B = batch.plan.decode_blocks_BN, batch.plan.decode_lengths_B
        assert blocks_BN is not None and lengths_B is not None
        # Columns behind the step's own are left as they were: no sequence is so long that they would be looked at.
        for own, given in (
            (self._ids_B, batch.ids_T),
            (self._positions_B, batch.positions_T),
            (self._rows_B, batch.plan.rows_T),
            (self._lengths_B, lengths_B),
            (self._blocks_BN[:, : blocks_BN.shape[1]], blocks_BN),
        ):
            own[: len(given)] = given
            own[len(given) :] = given[:1]

    def compute(self) -> Tensor:
        """Logits (size, V), adapters from their slots."""
        with self._armed.with_work(self.work):
            return self._network.forward(self._batch())

    def compute_packed(self, given: Batch) -> Tensor:
        """Logits (size, V), adapters from the given batch: the same shapes, so that the base has the same bits."""
        if given.gates is None:
            return self._network.forward(self._batch())
        count = len(given.ids_T)
        rows = [row if row < count else 0 for row in range(len(self._ids_B))]
        gates = given.gates.at(torch.tensor(rows, device=self._ids_B.device), rows)
        packed = replace(self._batch(), operands=given.operands, gathered=given.gathered)
        return self._network.forward(replace(packed, gates=gates, wanted_gates=gates))

    def _batch(self) -> Batch:
        plan = AttentionPlan(self._cache, self._rows_B, self._lengths_B, self._blocks_BN, [])
        return Batch(self._ids_B, self._positions_B, plan, self._wanted_B, None, {})


def _agree(logits_RV: Tensor, plain_RV: Tensor, share: float) -> bool:
    off = (logits_RV - plain_RV).abs().max()
    return bool(off <= share * plain_RV.abs().max())  # not so where one is no number


def _capture(step: _StaticStep, pool: Any) -> Callable[[], Tensor]:
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            step.compute()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits_BV = step.compute()

    def replay() -> Tensor:
        graph.replay()
        return logits_BV

    return replay
