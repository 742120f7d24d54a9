"""What must hold of the gathered low-rank product for any adapters, mixtures and tokens.

In Triton's interpreter, or on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.primitives import lowrank
from server.primitives.lowrank import LowRank

pytest.importorskip("triton", reason="triton has wheels for Linux on x86_64 only")

from server.kernels.gpu.lowrank import Entries, Table, Terms, apply_gathered, apply_gathered_loop
from server.kernels.gpu.work import TILE, Work, plan_work

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest value: a few roundings
PLANS = settings(max_examples=80, deadline=None)
KERNELS = settings(max_examples=8, deadline=None)  # the interpreter takes a third of a millisecond for an empty program
SPARE = 2  # units more than there is work for

seeds = st.integers(0, 2**31)
rank_lists = st.lists(st.sampled_from([0, 1, 7, 16, 17, 40]), min_size=1, max_size=3)
columns = st.sampled_from([((0, 24),), ((0, 24), (24, 8), (32, 130))])


def some_gates(rng: torch.Generator, tokens: int, slots: int) -> Tensor:
    gates = torch.randn(tokens, slots, generator=rng)
    return gates * (torch.rand(tokens, slots, generator=rng) < 0.4)


def tiles_of(ranks: list[int]) -> Tensor:
    return torch.tensor([max(1, -(-rank // TILE)) for rank in ranks])


@given(seeds, st.integers(0, 40), rank_lists, st.sampled_from([1, 3, 16]))
@PLANS
def test_every_tile_of_what_a_token_carries_is_done_once(seed: int, count: int, ranks: list[int], rows: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    gates, tiles = some_gates(rng, count, len(ranks)), tiles_of(ranks)
    plan = plan_work(gates, tiles, rows=rows)
    done: list[tuple[int, int, int]] = []
    for group, (first, size, start, end) in enumerate(plan.groups_4.tolist()):
        assert 0 < size <= rows
        for of, slot, tile in plan.units_3[start:end].tolist():
            assert of == group
            done += [(token, slot, tile) for token in plan.tokens[first : first + size].tolist()]
    wanted = [(t, s, n) for t, s in gates.nonzero().tolist() for n in range(int(tiles[s]))]
    assert sorted(done) == sorted(wanted)
    assert sorted(plan.tokens.tolist()) == gates.any(1).nonzero().flatten().tolist()


def work_for(mixtures: list[Tensor], tiles_S: Tensor) -> Work:
    """With room for each of them, and some to spare."""
    units = max(len(plan_work(gates, tiles_S, rows=16).units_3) for gates in mixtures) + SPARE
    tokens = max(map(len, mixtures)) + 1
    return Work(tokens=tokens, slots=len(tiles_S), units=units, rows=16, device=DEVICE)


def some_terms(rng: torch.Generator, rank: int, inputs: int, width: int, dtype: torch.dtype) -> Terms:
    """Every third has a bias, every other a scale; one of rank 0 may have nothing at all."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(DEVICE, dtype)

    return Terms(
        normal(rank, inputs) if rank else None,
        normal(rank, width) / max(rank, 1) if rank else None,
        normal(width) if rank % 3 == 0 else None,
        normal(width) if rank % 2 == 0 else None,
        scaling=0.5 + rank % 2,
    )


def table_of(terms: list[Terms], width: int) -> Table:
    """One Linear, a slot for each."""
    entries = Entries(1, len(terms), DEVICE)
    for slot, own in enumerate(terms):
        entries.put(slot, {0: own})
    return Table(entries, 0, ((0, width),))


def room(columns: tuple[tuple[int, int], ...]) -> int:
    return sum(width for _, width in columns)


@given(
    seeds,
    st.integers(1, 7),
    rank_lists,
    columns,
    st.sampled_from([8, 65, 520]),
    st.sampled_from(list(TOLERANCE)),
)
@example(0, 3, [256, 3], ((0, 130),), 24, torch.bfloat16)
@KERNELS
def test_the_kernels_equal_the_plain_loop(
    seed: int, count: int, ranks: list[int], columns: tuple[tuple[int, int], ...], inputs: int, dtype: torch.dtype
) -> None:
    """Mixed ranks, several adapters a token, siblings, biases and scales; then other mixtures in the same buffers."""
    rng = torch.Generator().manual_seed(seed)
    terms = [[some_terms(rng, rank, inputs, width, dtype) for rank in ranks] for _, width in columns]
    entries = Entries(len(columns) + 2, len(ranks), DEVICE)
    table = Table(entries, 1, columns)
    for slot in range(len(ranks)):
        entries.put(slot, {1 + sibling: own[slot] for sibling, own in enumerate(terms)})
    mixtures = [some_gates(rng, count, len(ranks)) for _ in range(2)]
    work = work_for(mixtures, tiles_of(ranks))
    addresses = [work.now.tokens_N.data_ptr(), work.now.units_U3.data_ptr(), work.now.gates_NS.data_ptr()]
    for gates in mixtures:
        x, y = (torch.randn(count, size, generator=rng).to(DEVICE, dtype) for size in (inputs, room(columns)))
        assert work.fill(gates, tiles_of(ranks))
        fast = apply_gathered(y.clone(), x, work, table)
        plain = apply_gathered_loop(y, x, gates, columns, terms)
        scale = plain.abs().max().item() + 1
        torch.testing.assert_close(fast, plain, atol=TOLERANCE[dtype] * scale, rtol=0)
        bare = gates.any(1).logical_not().to(DEVICE)
        assert torch.equal(fast[bare], y[bare])
    assert addresses == [work.now.tokens_N.data_ptr(), work.now.units_U3.data_ptr(), work.now.gates_NS.data_ptr()]


@given(seeds, st.integers(1, 7), st.lists(st.integers(1, 40), min_size=1, max_size=3))
@KERNELS
def test_the_kernels_equal_the_primitive(seed: int, count: int, ranks: list[int]) -> None:
    """The one that serves everywhere else, adapter by adapter."""
    rng = torch.Generator().manual_seed(seed)
    values = [
        (slot, LowRank(torch.randn(rank, 12, generator=rng), torch.randn(9, rank, generator=rng), 1.5 - slot))
        for slot, rank in enumerate(ranks)
    ]
    kept = [
        Terms(value.A_RI.to(DEVICE), value.B_OR.t().contiguous().to(DEVICE), scaling=value.scaling)
        for _, value in values
    ]
    table = table_of(kept, 9)
    x, y, gates = (
        torch.randn(count, 12, generator=rng),
        torch.randn(count, 9, generator=rng),
        some_gates(rng, count, len(ranks)),
    )
    work = work_for([gates], tiles_of(ranks))
    assert work.fill(gates, tiles_of(ranks))
    fast = apply_gathered(y.clone().to(DEVICE), x.to(DEVICE), work, table).cpu()
    plain = lowrank.apply_loop(y, x, gates, values)
    torch.testing.assert_close(fast, plain, atol=TOLERANCE[torch.float32] * (plain.abs().max().item() + 1), rtol=0)


@given(seeds, st.integers(2, 18))
@settings(KERNELS, max_examples=4)
def test_a_token_is_its_own_to_the_bit(seed: int, count: int) -> None:
    """An overflow stays with those that carry it, also in a group that a token of gate zero shares, and no neighbour
    changes a token: alone it gets the same bits."""
    rng = torch.Generator().manual_seed(seed)
    huge = Terms(torch.full((2, 20), 3e38, device=DEVICE), torch.full((2, 6), 3e38, device=DEVICE))
    calm = some_terms(rng, 6, 20, 6, torch.float32)
    table = table_of([huge, calm], 6)
    x, y = (torch.randn(count, size, generator=rng).to(DEVICE) for size in (20, 6))
    gates = torch.zeros(count, 2)
    gates[1:, 0], gates[0, 1] = 1, 0.5
    work = Work(tokens=count, slots=2, units=8, rows=16, device=DEVICE)
    assert work.fill(gates, tiles_of([2, 6]))
    got = apply_gathered(y.clone(), x, work, table)
    assert work.fill(gates[:1], tiles_of([2, 6]))
    alone = apply_gathered(y[:1].clone(), x[:1], work, table)
    assert torch.equal(got[0], alone[0])
    assert not got[1:].isfinite().any(), "the neighbours were meant to overflow"
    assert work.fill(torch.ones(count, 2), tiles_of([2, 6]))
    work.now.gates_NS.copy_(gates.to(DEVICE))  # a plan for more than the gates let through, as a router would use it
    shared = apply_gathered(y.clone(), x, work, table)
    assert torch.equal(shared[0], got[0])
    work.now.gates_NS.zero_()
    assert torch.equal(apply_gathered(y.clone(), x, work, table), y)


def test_a_cleared_slot_is_as_if_it_had_never_been_filled() -> None:
    rng = torch.Generator().manual_seed(0)
    entries = Entries(1, 1, DEVICE)
    entries.put(0, {0: some_terms(rng, 6, 20, 6, torch.float32)})
    entries.clear(0)
    table = Table(entries, 0, ((0, 6),))
    work = Work(tokens=3, slots=1, units=4, rows=16, device=DEVICE)
    assert work.fill(torch.ones(3, 1), tiles_of([6]))
    x, y = (torch.randn(3, size, generator=rng).to(DEVICE) for size in (20, 6))
    assert torch.equal(apply_gathered(y.clone(), x, work, table), y)


def test_more_work_than_there_is_room_for_is_not_taken() -> None:
    work = Work(tokens=3, slots=1, units=4, rows=16, device=DEVICE)
    assert work.fill(torch.ones(3, 1), torch.tensor([4]))
    kept = work.now.units_U3.clone()
    assert not work.fill(torch.ones(3, 1), torch.tensor([5]))
    assert torch.equal(work.now.units_U3, kept)
