"""From a planned step to one packed batch on the device: decodes first, then prompt chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from server.adapters.bank import Bank
from server.engine.pack_routes import PackedRoutes, pack_routes
from server.model.attention import AttentionPlan, Span
from server.model.kv import KvCache
from server.model.network import Batch
from server.policy.reach import pieces
from server.policy.schedule import Chunk, Step
from server.primitives.gates import gates_from_rows
from server.primitives.graft import Graft
from server.primitives.routed_experts import Route

NO_ROUTES: Mapping[int, Route] = {}


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch, and which of its logit rows belong to which chunk: (chunk, first row, row count)."""

    batch: Batch
    rows: tuple[tuple[Chunk, int, int], ...]
    grafts: Sequence[Graft]  # at work in the batch
    columns: Mapping[str, int]  # of their keys in the batch's gates
    routed: PackedRoutes | None = None


def pack_step(
    step: Step,
    cache: KvCache,
    bank: Bank,
    grafts: Mapping[int, Sequence[tuple[Graft, float]]],
    scored: frozenset[int],
    *,
    routes: Mapping[int, Route] = NO_ROUTES,
    traced: frozenset[int] = frozenset(),
) -> Packed:
    """`grafts` maps a sequence's id to its mixture; `scored` are those that want the logits of every position.

    `routes` has the sequences that are routed; `traced` are those of them that want to know how.
    """
    chunks = sorted(step.chunks, key=lambda chunk: chunk.count > 1)
    decodes = [chunk for chunk in chunks if chunk.count == 1]
    spans = chunks[len(decodes) :]
    ids: list[int] = []
    positions: list[int] = []
    cache_rows: list[int] = []
    wanted: list[int] = []
    rows = []
    for chunk in chunks:
        first = len(wanted)
        if chunk.sequence.id in scored:
            wanted += range(len(ids), len(ids) + chunk.count)
        elif chunk.completes:
            wanted.append(len(ids) + chunk.count - 1)
        rows.append((chunk, first, len(wanted) - first))
        ids += chunk.sequence.span(chunk.start, chunk.start + chunk.count)
        positions += range(chunk.start, chunk.start + chunk.count)
        cache_rows += block_rows(chunk.sequence.blocks, chunk.start, chunk.start + chunk.count, cache.block_size)
    device = cache.keys[0].device
    plan = AttentionPlan(
        cache=cache,
        rows_T=torch.tensor(cache_rows, device=device),
        decode_lengths_B=torch.tensor([chunk.start + 1 for chunk in decodes], device=device) if decodes else None,
        decode_blocks_BN=torch.tensor(_padded(decodes, cache.block_size), device=device) if decodes else None,
        spans=[
            Span(
                chunk.count,
                chunk.start + chunk.count,
                torch.tensor([_used(chunk, cache.block_size)], device=device),
            )
            for chunk in spans
        ],
    )
    at_work = [graft for chunk in chunks for graft, weight in grafts[chunk.sequence.id] if weight]
    columns = bank.activate(at_work)
    gates = None
    if columns:
        table = [row for chunk in chunks for row in _gate_rows(chunk, grafts[chunk.sequence.id], columns)]
        gates = gates_from_rows(table, bank.size, cache.keys[0])
    routed = pack_routes(chunks, routes, bank.experts, device=device, traced=bool(traced))
    wanted_R = torch.tensor(wanted, device=device, dtype=torch.long)
    batch = Batch(
        ids_T=torch.tensor(ids, device=device),
        positions_T=torch.tensor(positions, device=device),
        plan=plan,
        wanted_R=wanted_R,
        gates=gates,
        operands=bank.operands if columns else {},
        gathered=bank.gathered if columns else None,
        wanted_gates=None if gates is None else gates.at(wanted_R, wanted),
        routes=routed.routes if routed else None,
    )
    return Packed(batch, tuple(rows), at_work, columns, routed)


def block_rows(blocks: Sequence[int], start: int, stop: int, block_size: int) -> list[int]:
    """Cache rows of positions start..stop-1."""
    return [blocks[p // block_size] * block_size + p % block_size for p in range(start, stop)]


def _gate_rows(
    chunk: Chunk, mixture: Sequence[tuple[Graft, float]], columns: Mapping[str, int]
) -> Iterable[tuple[int, list[tuple[int, float]]]]:
    """A row for each phase of the sequence that the chunk has a part in: (token count, [(column, weight), ...])."""
    for count, indices in pieces(chunk.sequence.course, chunk.start, chunk.start + chunk.count):
        at_work = [mixture[index] for index in indices]
        yield count, [(columns[graft.key], weight) for graft, weight in at_work if graft.key in columns]


def _used(chunk: Chunk, block_size: int) -> list[int]:
    return chunk.sequence.blocks[: -(-(chunk.start + chunk.count) // block_size)]


def _padded(decodes: Sequence[Chunk], block_size: int) -> list[list[int]]:
    """Block tables of one width; the padding repeats the sequence's own block, so nothing foreign is ever read."""
    tables = [_used(chunk, block_size) for chunk in decodes]
    width = max(map(len, tables))
    return [table + table[-1:] * (width - len(table)) for table in tables]
