"""The routed tokens of a step: which rows of the batch they are, and what each may choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.expert_bank import ExpertBank
from server.policy.schedule import Chunk
from server.primitives.route import Routed, Routes
from server.primitives.routed_experts import Route
from server.records import RouteRow

SHARE_DIGITS = 4


@dataclass(frozen=True, slots=True)
class RoutedChunk:
    """Where a chunk's tokens stand: its first row of the step, and its first among those of its mode."""

    chunk: Chunk
    route: Route
    row: int
    first: int


@dataclass(frozen=True, slots=True)
class PackedRoutes:
    """The step's routes on the device, and what is needed to read back who got what."""

    routes: Routes
    chunks: tuple[RoutedChunk, ...]
    columns: Mapping[str, int]


def pack_routes(
    chunks: Sequence[Chunk], routes: Mapping[int, Route], bank: ExpertBank, *, device: torch.device, traced: bool
) -> PackedRoutes | None:
    """`chunks` in the order of the packed tokens; `routes` by a sequence's id. None when no token is routed."""
    if not routes:
        return None
    bank.activate(list(routes.values()))
    placed: list[RoutedChunk] = []
    row, counts = 0, {"arrow": 0, "gate": 0}
    for chunk in chunks:
        route = routes.get(chunk.sequence.id)
        if route is not None:
            placed.append(RoutedChunk(chunk, route, row, counts[route.mode]))
            counts[route.mode] += chunk.count
        row += chunk.count
    packed = Routes(
        bank.operands,
        tokens=row,
        experts=bank.size,
        by_arrow=_routed([one for one in placed if one.route.mode == "arrow"], bank, device),
        by_gate=_routed([one for one in placed if one.route.mode == "gate"], bank, device),
        space=bank.space,
        traced=traced,
    )
    return PackedRoutes(packed, tuple(placed), bank.columns)


def read_shares(packed: PackedRoutes, wanted: frozenset[int], layers: int) -> Mapping[int, tuple[RouteRow, ...]]:
    """For every wanted sequence of the step the shares of its tokens, in order: numbers of its own experts."""
    read: dict[int, tuple[RouteRow, ...]] = {}
    shares = dict.fromkeys(("arrow", "gate")) | {
        one.route.mode: packed.routes.shares(one.route.mode, layers)
        for one in packed.chunks
        if one.chunk.sequence.id in wanted
    }
    for one in packed.chunks:
        shares_RLE = shares[one.route.mode]
        if one.chunk.sequence.id not in wanted or shares_RLE is None:
            continue
        columns = [packed.columns[expert.digest] for expert in one.route.experts]
        own_TLE = shares_RLE[one.first : one.first + one.chunk.count][..., columns]
        best, numbers = own_TLE.topk(min(one.route.top_k, len(columns)), dim=-1)
        read[one.chunk.sequence.id] = tuple(
            tuple(_pairs(*layer) for layer in zip(*token, strict=True))
            for token in zip(numbers.tolist(), best.tolist(), strict=True)
        )
    return read


def _pairs(numbers: Sequence[int], shares: Sequence[float]) -> tuple[tuple[int, float], ...]:
    return tuple((n, round(share, SHARE_DIGITS)) for n, share in zip(numbers, shares, strict=True) if share > 0)


def _routed(placed: Sequence[RoutedChunk], bank: ExpertBank, device: torch.device) -> Routed | None:
    """Every chunk is one row of a small table, repeated for its tokens."""
    if not placed:
        return None
    width = bank.size if bank.space is None or placed[0].route.router is None else len(bank.space.expert_C)
    allowed = torch.zeros(len(placed), width, dtype=torch.bool)
    for line, one in enumerate(placed):
        allowed[line, _scores(one.route, bank)] = True
    counts = torch.tensor([one.chunk.count for one in placed])
    rows = [row for one in placed for row in range(one.row, one.row + one.chunk.count)]
    return Routed(
        rows_R=torch.tensor(rows, device=device),
        allowed_RC=allowed.repeat_interleave(counts, 0).to(device),
        top_k_R=torch.tensor([one.route.top_k for one in placed]).repeat_interleave(counts).to(device),
        temperature_R=torch.tensor([one.route.temperature for one in placed]).repeat_interleave(counts).to(device),
        most=max(one.route.top_k for one in placed),
        told_LRC=_told(placed, bank, counts, device),
    )


def _told(placed: Sequence[RoutedChunk], bank: ExpertBank, counts: Tensor, device: torch.device) -> Tensor | None:
    """What each token's prompt adds to its router's scores; the prompts of arrow tell nothing."""
    if placed[0].route.router is None:
        return None
    assert bank.space is not None
    layers, width, _ = bank.space.weight_LCH.shape
    told_LNC = torch.zeros(layers, len(placed), width, device=device)
    for line, one in enumerate(placed):
        assert one.route.router is not None and one.route.told_LE is not None, "a router that has not read the prompt"
        first = bank.first_score[one.route.router.digest]
        told_LNC[:, line, first : first + one.route.told_LE.shape[1]] = one.route.told_LE
    return told_LNC.repeat_interleave(counts.to(device), dim=1)


def _scores(route: Route, bank: ExpertBank) -> list[int]:
    """The scores that a request may choose among: columns of the bank, or places among all routers' rows."""
    if route.router is None:
        return [bank.columns[expert.digest] for expert in route.experts]
    first = bank.first_score[route.router.digest]
    return [first + route.router.experts.index(expert.digest) for expert in route.experts]
