"""What must hold of every primitive and of a Site as a whole, for any adapters, gates and tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.bank import Bank
from server.primitives import bias, experts, lowrank, scale
from server.primitives.bias import Bias
from server.primitives.experts import ExpertsLowRank, Group
from server.primitives.gates import Gates, gates_from_rows
from server.primitives.graft import Graft
from server.primitives.lowrank import LowRank
from server.primitives.scale import Scale
from server.primitives.site import SiteValue, apply_site, pack_site

IN, OUT, EXPERTS = 6, 10, 3
TOLERANCE = 1e-5  # fp32, sums of at most a few dozen terms of order one in another order
SETTINGS = settings(max_examples=60, deadline=None)

seeds = st.integers(0, 2**31)
ranks = st.lists(st.integers(1, 5), min_size=1, max_size=5)
tokens = st.integers(1, 7)
row_counts = st.lists(st.integers(0, 4), min_size=EXPERTS, max_size=EXPERTS).filter(any)  # of each expert


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_gates(rng: torch.Generator, count: int, columns: int) -> Tensor:
    """About half of them zero, of either sign."""
    gates = torch.randn(count, columns, generator=rng)
    return gates * (torch.rand(count, columns, generator=rng) < 0.5)


def some_site(rng: torch.Generator, rank: int) -> SiteValue:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    return SiteValue(
        scale_in=Scale(normal(IN)) if rank % 3 == 0 else None,
        scale_out=Scale(normal(OUT)) if rank % 3 == 1 else None,
        lowrank=LowRank(normal(rank, IN), normal(OUT, rank)) if rank % 2 else None,
        bias=Bias(normal(OUT)) if rank % 4 else None,
    )


def run_site(x: Tensor, gates: Tensor, values: list[SiteValue], weight: Tensor, base_bias: Tensor) -> Tensor:
    operand = pack_site(list(enumerate(values)))
    return apply_site(x, Gates(gates), operand, lambda z: F.linear(z, weight), base_bias)


@given(seeds, ranks, tokens)
@SETTINGS
def test_each_primitive_equals_its_plain_loop(seed: int, sizes: list[int], count: int) -> None:
    rng = random(seed)
    gates, x = some_gates(rng, count, len(sizes)), torch.randn(count, IN, generator=rng)
    y = torch.randn(count, OUT, generator=rng)
    lows = [
        (k, LowRank(torch.randn(r, IN, generator=rng), torch.randn(OUT, r, generator=rng))) for k, r in enumerate(sizes)
    ]
    scales = [(k, Scale(torch.randn(IN, generator=rng))) for k in range(len(sizes))]
    biases = [(k, Bias(torch.randn(OUT, generator=rng))) for k in range(len(sizes))]
    pairs = [
        (lowrank.apply(y, x, Gates(gates), lowrank.pack(lows)), lowrank.apply_loop(y, x, gates, lows)),
        (scale.apply(x, Gates(gates), scale.pack(scales)), scale.apply_loop(x, gates, scales)),
        (bias.apply(y, Gates(gates), bias.pack(biases)), bias.apply_loop(y, gates, biases)),
    ]
    for fast, plain in pairs:
        torch.testing.assert_close(fast, plain, atol=TOLERANCE * 10, rtol=TOLERANCE)


@given(seeds, ranks, tokens)
@SETTINGS
def test_a_site_equals_its_equation(seed: int, sizes: list[int], count: int) -> None:
    """y = s_out * W (s_in * x) + sum g B A x + sum g b + base bias, by the plain loops."""
    rng = random(seed)
    values = [some_site(rng, rank) for rank in sizes]
    x, weight = torch.randn(count, IN, generator=rng), torch.randn(OUT, IN, generator=rng)
    base_bias = torch.randn(OUT, generator=rng)
    gates = some_gates(rng, count, len(values))
    ins = [(k, v.scale_in) for k, v in enumerate(values) if v.scale_in]
    outs = [(k, v.scale_out) for k, v in enumerate(values) if v.scale_out]
    lows = [(k, v.lowrank) for k, v in enumerate(values) if v.lowrank]
    biases = [(k, v.bias) for k, v in enumerate(values) if v.bias]
    y = scale.apply_loop(F.linear(scale.apply_loop(x, gates, ins), weight), gates, outs)
    y = bias.apply_loop(lowrank.apply_loop(y, x, gates, lows), gates, biases) + base_bias
    got = run_site(x, gates, values, weight, base_bias)
    torch.testing.assert_close(got, y, atol=TOLERANCE * 100, rtol=TOLERANCE * 10)


@given(seeds, ranks, tokens)
@SETTINGS
def test_a_zero_gate_is_bit_identical_to_no_adapter(seed: int, sizes: list[int], count: int) -> None:
    rng = random(seed)
    values = [some_site(rng, rank) for rank in sizes]
    x, weight = torch.randn(count, IN, generator=rng), torch.randn(OUT, IN, generator=rng)
    base_bias = torch.randn(OUT, generator=rng)
    gates = some_gates(rng, count, len(sizes))
    gates[0] = 0
    got = run_site(x, gates, values, weight, base_bias)
    assert torch.equal(got[0], (F.linear(x, weight) + base_bias)[0])


@given(seeds, ranks, tokens)
@SETTINGS
def test_the_order_of_a_tokens_adapters_does_not_matter(seed: int, sizes: list[int], count: int) -> None:
    rng = random(seed)
    values = [some_site(rng, rank) for rank in sizes]
    x, weight = torch.randn(count, IN, generator=rng), torch.randn(OUT, IN, generator=rng)
    gates = some_gates(rng, count, len(sizes))
    order = torch.randperm(len(sizes), generator=rng).tolist()
    one = run_site(x, gates, values, weight, torch.zeros(OUT))
    other = run_site(x, gates[:, order], [values[k] for k in order], weight, torch.zeros(OUT))
    torch.testing.assert_close(one, other, atol=TOLERANCE * 100, rtol=TOLERANCE * 10)


@given(seeds, ranks, st.integers(2, 7))
@SETTINGS
def test_a_tokens_result_does_not_depend_on_its_neighbours(seed: int, sizes: list[int], count: int) -> None:
    """Not even on one whose adapter overflows every product: its infinities stay with it, to the bit."""
    rng = random(seed)
    values = [some_site(rng, rank) for rank in sizes]
    huge = LowRank(torch.full((2, IN), 3e38), torch.full((OUT, 2), 3e38))
    values.append(SiteValue(lowrank=huge))
    x, weight = torch.randn(count, IN, generator=rng), torch.randn(OUT, IN, generator=rng)
    gates = some_gates(rng, count, len(values))
    gates[0, -1] = 0
    gates[1:, -1] = 0
    calm = run_site(x, gates, values, weight, torch.zeros(OUT))
    x[1:] = torch.randn(count - 1, IN, generator=rng) * 1e3
    gates[1:] = some_gates(rng, count - 1, len(values))
    gates[1:, -1] = 1
    wild = run_site(x, gates, values, weight, torch.zeros(OUT))
    assert torch.equal(calm[0], wild[0])
    assert not wild[1:].isfinite().all(), "the neighbours were meant to overflow"


@given(seeds, ranks, tokens)
@SETTINGS
def test_a_fusion_is_the_weighted_sum_of_the_deltas(seed: int, sizes: list[int], count: int) -> None:
    """For adapters that scale one side: (fused - base) = sum of weight * (alone - base)."""
    rng = random(seed)
    values = [some_site(rng, rank) for rank in sizes]
    values = [SiteValue(None, v.scale_out, v.lowrank, v.bias) for v in values]
    x, weight = torch.randn(count, IN, generator=rng), torch.randn(OUT, IN, generator=rng)
    weights = torch.randn(len(values), generator=rng)
    fused = run_site(x, weights.expand(count, -1), values, weight, torch.zeros(OUT))
    base = F.linear(x, weight)
    total = base.clone()
    for k, value in enumerate(values):
        alone = run_site(x, torch.ones(count, 1), [value], weight, torch.zeros(OUT))
        total += weights[k] * (alone - base)
    torch.testing.assert_close(fused, total, atol=TOLERANCE * 100, rtol=TOLERANCE * 10)


@given(seeds, st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=6))
@SETTINGS
def test_a_bank_that_dropped_grafts_equals_one_that_never_held_them(seed: int, history: list[list[int]]) -> None:
    rng = random(seed)
    grafts = [Graft(f"digest-{k}", f"graft@{k}", {"site": some_site(rng, k + 1)}) for k in range(7)]
    x, weight = torch.randn(3, IN, generator=rng), torch.randn(OUT, IN, generator=rng)
    old = Bank()
    for active in history:
        columns = old.activate([grafts[k] for k in active])
        fresh = Bank()
        fresh_columns = fresh.activate([grafts[k] for k in active])
        results = []
        for bank, places in ((old, columns), (fresh, fresh_columns)):
            first, last = (places[grafts[k].digest] for k in (active[0], active[-1]))
            rows = [(1, [(first, 1.0)]), (1, list[tuple[int, float]]()), (1, [(last, -2.0)])]
            gates = gates_from_rows(rows, bank.size, x)
            results.append(apply_site(x, gates, bank.operands["site"], lambda z: F.linear(z, weight), None))
        torch.testing.assert_close(results[0], results[1], atol=TOLERANCE * 100, rtol=TOLERANCE)
        assert torch.equal(results[0][1], F.linear(x, weight)[1])


def some_experts(rng: torch.Generator, sizes: list[int]) -> list[tuple[int, ExpertsLowRank]]:
    return [
        (k, ExpertsLowRank(torch.randn(EXPERTS, r, IN, generator=rng), torch.randn(EXPERTS, OUT, r, generator=rng)))
        for k, r in enumerate(sizes)
    ]


def groups_of(counts: list[int]) -> list[Group]:
    ends = [sum(counts[: expert + 1]) for expert in range(len(counts))]
    return [
        Group(expert, end - count, end) for expert, (count, end) in enumerate(zip(counts, ends, strict=True)) if count
    ]


@given(seeds, ranks, row_counts)
@SETTINGS
def test_experts_equal_their_plain_loop(seed: int, sizes: list[int], counts: list[int]) -> None:
    rng, groups = random(seed), groups_of(counts)
    values, rows = some_experts(rng, sizes), sum(counts)
    gates, x = some_gates(rng, rows, len(sizes)), torch.randn(rows, IN, generator=rng)
    y = torch.randn(rows, OUT, generator=rng)
    owners = [group.expert for group in groups for _ in range(group.end - group.first)]
    fast = experts.apply(y, x, Gates(gates), experts.pack(values), groups)
    plain = experts.apply_loop(y, x, gates, values, owners)
    torch.testing.assert_close(fast, plain, atol=TOLERANCE * 100, rtol=TOLERANCE * 10)
    whole = {k: [value.B_EOR[e] @ value.A_ERI[e] for e in range(EXPERTS)] for k, value in values}
    deltas = [
        sum((gates[row, k] * whole[k][e] for k, _ in values), torch.zeros(OUT, IN)) for row, e in enumerate(owners)
    ]
    fused = torch.stack([y[row] + delta @ x[row] for row, delta in enumerate(deltas)])
    torch.testing.assert_close(fast, fused, atol=TOLERANCE * 100, rtol=TOLERANCE * 10)


@given(seeds, ranks, row_counts)
@SETTINGS
def test_a_row_of_an_expert_is_its_own_to_the_bit(seed: int, sizes: list[int], counts: list[int]) -> None:
    """Zero gates leave it as it was, whatever overflows in the rows beside it and whoever else the expert gets."""
    rng, groups = random(seed), groups_of(counts)
    values, rows = some_experts(rng, sizes), sum(counts)
    huge = ExpertsLowRank(torch.full((EXPERTS, 2, IN), 3e38), torch.full((EXPERTS, OUT, 2), 3e38))
    values.append((len(sizes), huge))
    gates, x = some_gates(rng, rows, len(values)), torch.randn(rows, IN, generator=rng)
    y = torch.randn(rows, OUT, generator=rng)
    gates[:, -1], gates[0] = 1, 0
    wild = experts.apply(y, x, Gates(gates), experts.pack(values), groups)
    assert torch.equal(wild[0], y[0])
    assert rows == 1 or not wild[1:].isfinite().all(), "the neighbours were meant to overflow"
