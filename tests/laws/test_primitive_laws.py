"""What must hold of every primitive and of a Site as a whole, for any adapters, gates and tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.bank import Bank
from server.primitives import bias, delta, experts, gain, lowrank, rotate, scale
from server.primitives.bias import Bias
from server.primitives.delta import Delta
from server.primitives.experts import ExpertsLowRank, Group
from server.primitives.gain import Gain
from server.primitives.gates import Gates, gates_from_rows
from server.primitives.graft import Graft
from server.primitives.lowrank import LowRank
from server.primitives.rotate import Rotate
from server.primitives.scale import Scale
from server.primitives.site import SiteValue, apply_embedding, apply_norm, apply_site, pack_site

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
        lowrank=some_lowrank(rng, rank) if rank % 2 else None,
        bias=Bias(normal(OUT)) if rank % 4 else None,
        delta=some_delta(rng, rank) if rank > 2 else None,
        rotate_in=some_rotate(rng, IN, rank) if rank in (2, 3) else None,
        rotate_out=some_rotate(rng, OUT, rank) if rank > 3 else None,
    )


def some_lowrank(rng: torch.Generator, rank: int) -> LowRank:
    """In the dtype of its file, which need not be that of the activations, with its scaling beside it or inside."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[rank % 3]
    A_RI, B_OR = torch.randn(rank, IN, generator=rng), torch.randn(OUT, rank, generator=rng)
    return LowRank(A_RI.to(dtype), B_OR.to(dtype), (1.0, 0.7, -2.0)[rank // 2 % 3])


def some_rotate(rng: torch.Generator, features: int, seed: int) -> Rotate:
    """Blocks of any size that fits, or pairs half of everything apart."""
    if seed % 4 == 0:
        return Rotate(torch.randn(features // 2, 2, 2, generator=rng), stride=features // 2)
    size = [size for size in range(1, features + 1) if features % size == 0][seed % 3]
    return Rotate(torch.randn(features // size, size, size, generator=rng))


def some_delta(rng: torch.Generator, seed: int) -> Delta:
    """Dense, some rows of it, or sparse with about as many entries as a rank, of which some meet in one place."""
    if seed % 3 == 0:
        return Delta(torch.randn(OUT, IN, generator=rng))
    if seed % 3 == 1:
        return Delta(torch.randn(3, IN, generator=rng), torch.tensor([1, 4, OUT - 1]))
    rows, columns = (torch.randint(0, size, (2 * seed,), generator=rng) for size in (OUT, IN))
    return delta.sparse(rows, columns, torch.randn(2 * seed, generator=rng), shape=(OUT, IN))


def run_site(x: Tensor, gates: Tensor, values: list[SiteValue], weight: Tensor, base_bias: Tensor) -> Tensor:
    operand = pack_site(list(enumerate(values)), x.dtype)
    return apply_site(x, Gates(gates), operand, lambda z: F.linear(z, weight), base_bias)


@given(seeds, ranks, tokens)
@SETTINGS
def test_each_primitive_equals_its_plain_loop(seed: int, sizes: list[int], count: int) -> None:
    rng = random(seed)
    gates, x = some_gates(rng, count, len(sizes)), torch.randn(count, IN, generator=rng)
    y = torch.randn(count, OUT, generator=rng)
    lows = [(k, some_lowrank(rng, rank)) for k, rank in enumerate(sizes)]
    scales = [(k, Scale(torch.randn(IN, generator=rng))) for k in range(len(sizes))]
    biases = [(k, Bias(torch.randn(OUT, generator=rng))) for k in range(len(sizes))]
    deltas = [(k, some_delta(rng, size)) for k, size in enumerate(sizes)]
    turns = [(k, some_rotate(rng, OUT, size)) for k, size in enumerate(sizes)]
    other_y = torch.randn(count, OUT, generator=rng)
    pairs = [
        (rotate.apply(y, other_y, Gates(gates), rotate.pack(turns)), rotate.apply_loop(y, other_y, gates, turns)),
        (delta.apply(y, x, Gates(gates), delta.pack(deltas)), delta.apply_loop(y, x, gates, deltas)),
        (lowrank.apply(y, x, Gates(gates), lowrank.pack(lows, x.dtype)), lowrank.apply_loop(y, x, gates, lows)),
        (scale.apply(x, Gates(gates), scale.pack(scales)), scale.apply_loop(x, gates, scales)),
        (bias.apply(y, Gates(gates), bias.pack(biases)), bias.apply_loop(y, gates, biases)),
    ]
    for fast, plain in pairs:
        torch.testing.assert_close(fast, plain, atol=TOLERANCE * 10, rtol=TOLERANCE)


@given(seeds, ranks, tokens)
@SETTINGS
def test_a_site_equals_its_equation(seed: int, sizes: list[int], count: int) -> None:
    """y = T_out(W T_in(x)) + sum g B A x + sum g D x + sum g b + base bias, by the plain loops."""
    rng = random(seed)
    values = [some_site(rng, rank) for rank in sizes]
    x, weight = torch.randn(count, IN, generator=rng), torch.randn(OUT, IN, generator=rng)
    base_bias = torch.randn(OUT, generator=rng)
    gates = some_gates(rng, count, len(values))
    ins = [(k, v.scale_in) for k, v in enumerate(values) if v.scale_in]
    outs = [(k, v.scale_out) for k, v in enumerate(values) if v.scale_out]
    lows = [(k, v.lowrank) for k, v in enumerate(values) if v.lowrank]
    biases = [(k, v.bias) for k, v in enumerate(values) if v.bias]
    turns_in = [(k, v.rotate_in) for k, v in enumerate(values) if v.rotate_in]
    turns_out = [(k, v.rotate_out) for k, v in enumerate(values) if v.rotate_out]
    y = F.linear(rotate.apply_loop(scale.apply_loop(x, gates, ins), x, gates, turns_in), weight)
    y = rotate.apply_loop(scale.apply_loop(y, gates, outs), y, gates, turns_out)
    deltas = [(k, v.delta) for k, v in enumerate(values) if v.delta]
    y = delta.apply_loop(lowrank.apply_loop(y, x, gates, lows), x, gates, deltas)
    y = bias.apply_loop(y, gates, biases) + base_bias
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
    """Not even on one whose adapter overflows every product: its infinities stay with it, to the bit.

    Whole deltas of its own aside: those are products of as many rows as carry them, which round in another order.
    """
    rng = random(seed)
    values = [replace(some_site(rng, rank), delta=None) for rank in sizes]
    huge = LowRank(torch.full((2, IN), 3e38), torch.full((OUT, 2), 3e38))
    turns = Rotate(torch.full((IN, 1, 1), 3e38)), Rotate(torch.full((2, 5, 5), 3e38))
    values.append(SiteValue(None, None, huge, None, Delta(torch.full((OUT, IN), 3e38)), *turns))
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


@given(seeds, ranks, st.integers(2, 7))
@SETTINGS
def test_a_token_with_a_whole_delta_does_not_see_what_its_neighbours_carry(
    seed: int, sizes: list[int], count: int
) -> None:
    rng = random(seed)
    values = [SiteValue(delta=some_delta(rng, size)) for size in sizes]
    values += [SiteValue(delta=Delta(torch.full((OUT, IN), 3e38))), SiteValue(delta=infinite_sparse())]
    x, weight = torch.randn(count, IN, generator=rng), torch.randn(OUT, IN, generator=rng)
    x[1:] = x[1:].abs() + 2  # of one sign, so that no sum of them stays finite by chance
    gates = some_gates(rng, count, len(values))
    gates[0, -2:] = 0
    gates[1:] = 0
    calm = run_site(x, gates, values, weight, torch.zeros(OUT))
    gates[1:] = 100  # of random signs, 3e38 alone may cancel to what fp32 holds
    wild = run_site(x, gates, values, weight, torch.zeros(OUT))
    torch.testing.assert_close(calm[0], wild[0], atol=TOLERANCE * 10, rtol=TOLERANCE)
    assert not wild[1:].isfinite().all(), "the neighbours were meant to overflow"


def infinite_sparse() -> Delta:
    return delta.sparse(torch.arange(OUT), torch.arange(OUT) % IN, torch.full((OUT,), 3e38), shape=(OUT, IN))


def test_a_delta_costs_the_bytes_that_it_takes() -> None:
    places = torch.tensor([0, 3, 3]), torch.tensor([1, 2, 2])
    some = delta.sparse(*places, torch.ones(3), shape=(OUT, IN))
    assert some.bytes == 2 * 4 + 2 * 4 + (OUT + 1) * 4  # two values, their columns, the offsets of the rows
    assert Delta(torch.zeros(OUT, IN, dtype=torch.bfloat16)).bytes == OUT * IN * 2


@given(seeds, ranks, tokens)
@SETTINGS
def test_blocks_of_one_are_a_scale(seed: int, sizes: list[int], count: int) -> None:
    rng = random(seed)
    gates, x = some_gates(rng, count, len(sizes)), torch.randn(count, IN, generator=rng)
    scales = [(k, Scale(torch.randn(IN, generator=rng))) for k in range(len(sizes))]
    turns = [(k, Rotate(value.excess_F[:, None, None])) for k, value in scales]
    turned = rotate.apply(x, x, Gates(gates), rotate.pack(turns))
    torch.testing.assert_close(turned, scale.apply(x, Gates(gates), scale.pack(scales)), atol=TOLERANCE, rtol=TOLERANCE)


@given(seeds, ranks, tokens)
@SETTINGS
def test_a_fusion_is_the_weighted_sum_of_the_deltas(seed: int, sizes: list[int], count: int) -> None:
    """For adapters that transform one side: (fused - base) = sum of weight * (alone - base)."""
    rng = random(seed)
    values = [some_site(rng, rank) for rank in sizes]
    if seed % 2:
        values = [replace(v, scale_in=None, rotate_in=None) for v in values]
    else:
        values = [replace(v, scale_out=None, rotate_out=None) for v in values]
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
    old = Bank(torch.float32)
    for active in history:
        columns = old.activate([grafts[k] for k in active])
        fresh = Bank(torch.float32)
        fresh_columns = fresh.activate([grafts[k] for k in active])
        results = []
        for bank, places in ((old, columns), (fresh, fresh_columns)):
            first, last = (places[grafts[k].digest] for k in (active[0], active[-1]))
            rows = [(1, [(first, 1.0)]), (1, list[tuple[int, float]]()), (1, [(last, -2.0)])]
            gates = gates_from_rows(rows, bank.size, x)
            results.append(apply_site(x, gates, bank.operands["site"], lambda z: F.linear(z, weight), None))
        torch.testing.assert_close(results[0], results[1], atol=TOLERANCE * 100, rtol=TOLERANCE)
        assert torch.equal(results[0][1], F.linear(x, weight)[1])


def some_rows(rng: torch.Generator, size: int) -> SiteValue:
    """What adapters do at an embedding of OUT tokens and IN features."""
    low = LowRank(torch.randn(size, OUT, generator=rng), torch.randn(IN, size, generator=rng), 0.7)
    spread = Scale(torch.randn(IN, generator=rng)) if size % 3 == 0 else None
    whole = some_delta(rng, [0, 1, 3][size % 3]) if size % 2 else None  # an embedding has no sparse delta
    return SiteValue(scale_out=spread, lowrank=low if size % 4 else None, delta=whole)


def one_hot(ids: Tensor) -> Tensor:
    return F.one_hot(ids, OUT).float()


@given(seeds, ranks, tokens)
@SETTINGS
def test_an_embedding_is_a_linear_whose_input_is_one_hot(seed: int, sizes: list[int], count: int) -> None:
    rng = random(seed)
    values = [some_rows(rng, size) for size in sizes]
    table, ids = torch.randn(OUT, IN, generator=rng), torch.randint(0, OUT, (count,), generator=rng)
    gates = some_gates(rng, count, len(values))
    gates[0] = 0
    got = apply_embedding(ids, Gates(gates), pack_site(list(enumerate(values))), lambda z: table[z])
    outs = [(k, v.scale_out) for k, v in enumerate(values) if v.scale_out]
    lows = [(k, v.lowrank) for k, v in enumerate(values) if v.lowrank]
    wholes = [(k, v.delta) for k, v in enumerate(values) if v.delta]
    y = scale.apply_loop(one_hot(ids) @ table, gates, outs)
    y = delta.look_up_loop(lowrank.apply_loop(y, one_hot(ids), gates, lows), ids, gates, wholes)
    torch.testing.assert_close(got, y, atol=TOLERANCE * 100, rtol=TOLERANCE * 10)
    assert torch.equal(got[0], table[ids[0]])


@given(seeds, ranks, tokens, st.sampled_from([0, 1, 2]))
@SETTINGS
def test_a_norm_has_the_weighted_sum_of_the_weights_and_biases(
    seed: int, sizes: list[int], count: int, axis: int
) -> None:
    """Wherever the network lays the tokens, and heads beside them."""
    rng = random(seed)
    gains = [(k, Gain(torch.randn(IN, generator=rng))) for k in range(len(sizes))]
    values = [SiteValue(gain=g, bias=Bias(torch.randn(IN, generator=rng)) if k % 2 else None) for k, g in gains]
    shape = [2, 2, 2, IN]
    shape[axis] = count
    x, gates = torch.randn(shape, generator=rng), some_gates(rng, count, len(values))
    gates[0] = 0
    weight, own = torch.randn(IN, generator=rng), torch.randn(IN, generator=rng)
    y, n = F.layer_norm(x, (IN,), weight, own), F.layer_norm(x, (IN,))
    got = apply_norm(y, lambda: n, Gates(gates), pack_site(list(enumerate(values))), axis=axis)
    assert torch.equal(got.select(axis, 0), y.select(axis, 0))
    for token in range(count):
        weights = weight + sum(gates[token, k] * g.weight_F for k, g in gains)
        biases = own + sum(gates[token, k] * v.bias.bias_O for k, v in enumerate(values) if v.bias is not None)
        alone = F.layer_norm(x.select(axis, token), (IN,), weights, biases)
        torch.testing.assert_close(got.select(axis, token), alone, atol=TOLERANCE * 100, rtol=TOLERANCE * 10)
    operand = gain.pack(gains)
    fast, plain = (
        gain.apply(y, n, Gates(gates), operand, axis=axis),
        gain.apply_loop(y, n, gates, gains, axis=axis),
    )
    torch.testing.assert_close(fast, plain, atol=TOLERANCE * 10, rtol=TOLERANCE)


@given(seeds, st.integers(2, 7))
@SETTINGS
def test_an_overflow_at_an_embedding_or_a_norm_stays_with_its_token(seed: int, count: int) -> None:
    rng = random(seed)
    huge = torch.full((2, OUT), 3e38), torch.full((IN, 2), 3e38)
    value = SiteValue(
        lowrank=LowRank(*huge), delta=Delta(torch.full((OUT, IN), 3e38)), gain=Gain(torch.full((IN,), 3e38))
    )
    gates = torch.full((count, 1), 2.0)
    gates[0] = 0
    operand, ids = pack_site([(0, value)]), torch.randint(0, OUT, (count,), generator=rng)
    table, n = torch.randn(OUT, IN, generator=rng), torch.randn(count, IN, generator=rng) * 10
    rows = apply_embedding(ids, Gates(gates), operand, lambda z: table[z])
    normed = apply_norm(n, lambda: n, Gates(gates), operand, axis=0)
    assert torch.equal(rows[0], table[ids[0]])
    assert torch.equal(normed[0], n[0])
    assert not rows[1:].isfinite().any()
    assert not normed[1:].isfinite().all()


@given(
    st.lists(st.tuples(tokens, st.lists(st.tuples(st.integers(0, 2), st.sampled_from([-1.5, 0.25, 2.0])))), min_size=1)
)
@SETTINGS
def test_a_token_has_the_weights_of_its_own_chunk(rows: list[tuple[int, list[tuple[int, float]]]]) -> None:
    """An adapter that is written twice has the sum."""
    got = gates_from_rows(rows, 3, torch.zeros(1))
    expected = [
        [sum(weight for column, weight in terms if column == wanted) for wanted in range(3)]
        for count, terms in rows
        for _ in range(count)
    ]
    assert got.gates_TK.tolist() == expected == got.host_TK.tolist()


@given(seeds, tokens)
@SETTINGS
def test_the_gates_of_the_wanted_tokens_are_theirs(seed: int, count: int) -> None:
    rng = random(seed)
    gates = Gates(some_gates(rng, count, 3))
    wanted = torch.randint(0, count, (4,), generator=rng)
    kept = gates.at(wanted, wanted.tolist())
    assert torch.equal(kept.gates_TK, gates.gates_TK[wanted])
    for column in range(3):
        assert kept.carriers(column).tolist() == [row for row in range(4) if gates.gates_TK[wanted[row], column] != 0]


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
