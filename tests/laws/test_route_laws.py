"""What must hold of routing, for any experts, candidates, scores and tokens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.expert_bank import ExpertBank
from server.primitives import route
from server.primitives.graft import Graft
from server.primitives.lowrank import LowRank
from server.primitives.route import Routed, Router, Routes, Selection
from server.primitives.routed_experts import Expert, Route, make_prototypes
from server.primitives.site import SiteValue

IN, OUT = 6, 10
TOLERANCE = 1e-4  # fp32, sums of a few dozen terms of order one in another order
SETTINGS = settings(max_examples=60, deadline=None)

seeds = st.integers(0, 2**31)
ranks = st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any)  # zero: no term at this Linear
tokens = st.integers(1, 7)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_lows(rng: torch.Generator, sizes: list[int]) -> list[LowRank | None]:
    """Of the dtypes that files have, each with a scaling of its own; None for rank 0."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [
        LowRank(
            torch.randn(r, IN, generator=rng).to(dtypes[r % 3]),
            torch.randn(OUT, r, generator=rng).to(dtypes[r % 3]),
            (1.0, 0.7, -2.0)[r // 2],
        )
        if r
        else None
        for r in sizes
    ]


def some_routed(rng: torch.Generator, count: int, choices: int) -> Routed:
    """Every token with its own candidates, top_k and temperature."""
    top_k = torch.randint(1, choices + 1, (count,), generator=rng)
    return Routed(
        rows_R=torch.arange(count),
        allowed_RC=torch.rand(count, choices, generator=rng) < 0.7,
        top_k_R=top_k,
        temperature_R=0.1 + 3 * torch.rand(count, generator=rng),
        most=int(top_k.max()),
    )


def some_selection(rng: torch.Generator, count: int, experts: int) -> Selection:
    return route.select(
        torch.randn(count, experts, generator=rng), made := some_routed(rng, count, experts), made.allowed_RC
    )


@given(seeds, st.integers(1, 7), tokens)
@SETTINGS
def test_every_token_gets_the_softmax_over_its_own_best_candidates(seed: int, choices: int, count: int) -> None:
    rng = random(seed)
    routed, scores = some_routed(rng, count, choices), torch.randn(count, choices, generator=rng)
    got = route.select(scores, routed, routed.allowed_RC).dense(choices)
    for token in range(count):
        limits = int(routed.top_k_R[token]), float(routed.temperature_R[token])
        plain = route.select_loop(scores[token], routed.allowed_RC[token].tolist(), *limits)
        torch.testing.assert_close(got[token], plain, atol=TOLERANCE, rtol=TOLERANCE)


@given(seeds, ranks, tokens)
@SETTINGS
def test_computing_the_chosen_alone_equals_computing_all_and_masking(seed: int, sizes: list[int], count: int) -> None:
    rng = random(seed)
    lows, x = some_lows(rng, sizes), torch.randn(count, IN, generator=rng)
    chosen = some_selection(rng, count, len(sizes))
    operand = route.pack([None if low is None else (low, None) for low in lows], torch.float32)
    plain = route.apply_loop(x, chosen.dense(len(sizes)), lows)
    for got in (route.apply_dense(x, chosen, operand), route.apply_selected(x, chosen, operand)):
        torch.testing.assert_close(got, plain, atol=TOLERANCE, rtol=TOLERANCE)


@given(seeds, ranks, tokens)
@SETTINGS
def test_arrow_scores_by_the_length_along_each_direction_whatever_its_sign(
    seed: int, sizes: list[int], count: int
) -> None:
    """Among those that have a term at this Linear."""
    rng = random(seed)
    lows, x = some_lows(rng, sizes), torch.randn(count, IN, generator=rng)
    directions = [None if low is None else route.prototype(low) for low in lows]
    operand = route.pack(
        [None if low is None else (low, way) for low, way in zip(lows, directions, strict=True)], torch.float32
    )
    routed = some_routed(rng, count, len(sizes))
    got = route.arrow(x, routed, operand).dense(len(sizes))
    for token in range(count):
        scores = torch.tensor([0.0 if way is None else abs(float(x[token] @ way)) for way in directions])
        may = [a and low is not None for a, low in zip(routed.allowed_RC[token].tolist(), lows, strict=True)]
        plain = route.select_loop(scores, may, int(routed.top_k_R[token]), float(routed.temperature_R[token]))
        torch.testing.assert_close(got[token], plain, atol=TOLERANCE, rtol=TOLERANCE)


@given(seeds, st.integers(1, 5))
@SETTINGS
def test_a_prototype_is_the_input_that_the_delta_stretches_most(seed: int, rank: int) -> None:
    rng = random(seed)
    low = LowRank(torch.randn(rank, IN, generator=rng), torch.randn(OUT, rank, generator=rng), -0.5)
    found = route.prototype(low)
    delta = low.scaling * low.B_OR @ low.A_RI
    most = torch.linalg.matrix_norm(delta, ord=2)
    torch.testing.assert_close(found.norm(), torch.tensor(1.0))
    torch.testing.assert_close((delta @ found).norm(), most, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_expert_that_changes_nothing_has_no_direction() -> None:
    assert not route.prototype(LowRank(torch.randn(3, IN), torch.zeros(OUT, 3))).any()


@given(seeds, ranks, st.integers(2, 7))
@SETTINGS
def test_a_routed_token_does_not_depend_on_its_neighbours(seed: int, sizes: list[int], count: int) -> None:
    """Not even on one whose expert overflows: its infinities stay with it."""
    rng = random(seed)
    lows: list[LowRank | None] = [
        *some_lows(rng, sizes),
        LowRank(torch.full((2, IN), 3e38), torch.full((OUT, 2), 3e38)),
    ]
    operand = route.pack([None if low is None else (low, None) for low in lows], torch.float32)
    x = torch.randn(count, IN, generator=rng)
    own = some_selection(rng, 1, len(sizes))
    slots = own.columns_RK.shape[1]
    columns = torch.cat([own.columns_RK, torch.full((count - 1, slots), len(sizes))])
    wild = torch.zeros(count - 1, slots)
    wild[:, 0] = 1
    chosen = Selection(columns, torch.cat([own.weights_RK, wild]))
    for way in (route.apply_dense, route.apply_selected):
        got, alone = way(x, chosen, operand), way(x[:1], own, operand)
        torch.testing.assert_close(got[:1], alone, atol=TOLERANCE, rtol=TOLERANCE)
        assert not got[1:].isfinite().all(), "the neighbours were meant to overflow"


def some_experts(rng: torch.Generator, count: int) -> list[Expert]:
    grafts = [Graft(f"digest-{k}", f"expert@{k}", {"site": some_value(rng, k + 1)}) for k in range(count)]
    return [Expert(graft, make_prototypes(graft)) for graft in grafts]


def some_value(rng: torch.Generator, rank: int) -> SiteValue:
    return SiteValue(lowrank=LowRank(torch.randn(rank, IN, generator=rng), torch.randn(OUT, rank, generator=rng)))


def run_arrow(bank: ExpertBank, route_: Route, x: Tensor, rows: list[int]) -> Tensor:
    """y of a step in which only `rows` are routed, from a y of ones."""
    bank.activate([route_])
    allowed = torch.zeros(len(rows), bank.size, dtype=torch.bool)
    allowed[:, [bank.columns[expert.digest] for expert in route_.experts]] = True
    routed = Routed(
        torch.tensor(rows), allowed, torch.full((len(rows),), route_.top_k), torch.ones(len(rows)), route_.top_k
    )
    y = torch.ones(len(x), OUT)
    Routes(
        bank.operands, tokens=len(x), experts=bank.size, by_arrow=routed, by_gate=None, space=None, traced=False
    ).add("site", x, y)
    return y


@given(seeds, st.integers(2, 8))
@SETTINGS
def test_tokens_that_are_not_routed_are_left_to_the_bit(seed: int, count: int) -> None:
    rng = random(seed)
    x = torch.randn(count, IN, generator=rng)
    rows = list(range(0, count, 2))
    y = run_arrow(ExpertBank(), Route(tuple(some_experts(rng, 4)), 2, 1.0), x, rows)
    assert torch.equal(y[1::2], torch.ones(len(y[1::2]), OUT))
    assert not torch.equal(y[0], torch.ones(OUT))


@given(seeds, st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4, unique=True), min_size=1, max_size=6))
@SETTINGS
def test_a_bank_that_dropped_experts_equals_one_that_never_held_them(seed: int, history: list[list[int]]) -> None:
    rng = random(seed)
    experts, x = some_experts(rng, 7), torch.randn(3, IN, generator=rng)
    old = ExpertBank()
    for active in history:
        asked = Route(tuple(experts[k] for k in active), min(2, len(active)), 1.0)
        results = [run_arrow(bank, asked, x, [0, 2]) for bank in (old, ExpertBank())]
        torch.testing.assert_close(*results, atol=TOLERANCE, rtol=TOLERANCE)


@given(seeds, st.integers(2, 5))
@SETTINGS
def test_two_routers_over_the_same_experts_keep_their_own_scores(seed: int, count: int) -> None:
    """Together in the bank they choose for their tokens what each chooses alone, among the experts asked for."""
    rng = random(seed)
    experts, hidden, layers = some_experts(rng, count), 4, 2
    graft = [
        Graft(
            f"router-{n}",
            f"router@{n}",
            router=Router(rows, torch.randn(rows.shape, generator=rng), 2),
            experts=tuple(expert.digest for expert in experts),
        )
        for n, rows in enumerate(torch.randn(2, layers, count, hidden, generator=rng))
    ]
    h = torch.randn(2, hidden, generator=rng)
    asked = [Route(tuple(experts), 2, 1.0, graft[0]), Route(tuple(experts[1:]), 1, 1.0, graft[1])]
    bank = ExpertBank()
    bank.activate(asked)
    assert bank.space is not None
    allowed = torch.zeros(2, 2 * count, dtype=torch.bool)
    allowed[0, :count] = True
    allowed[1, count + 1 :] = True
    told = torch.randn(layers, 2, 2 * count, generator=rng)
    routed = Routed(torch.arange(2), allowed, torch.tensor([2, 1]), torch.ones(2), 2, told)
    got = route.gate(h, routed, bank.space, layer=1).dense(bank.size)
    for token, one in enumerate(asked):
        assert one.router is not None and one.router.router is not None
        normed = h[token] / (h[token].square().mean() + route.RMS_EPSILON).sqrt()
        scores = one.router.router.weight_LEH[1] @ normed + told[1, token, token * count : (token + 1) * count]
        may = [expert in one.experts for expert in experts]
        plain = route.select_loop(scores, may, one.top_k, 1.0)
        torch.testing.assert_close(got[token], plain, atol=TOLERANCE, rtol=TOLERANCE)
