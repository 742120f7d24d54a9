"""What must hold of the edits of the residual stream, for any adapters, activations, gates and tokens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.bank import Bank
from server.primitives import edit
from server.primitives.edit import ACTIVATIONS, Edit, Part
from server.primitives.gates import Gates, gates_from_rows
from server.primitives.graft import Graft
from server.primitives.site import SiteValue

HIDDEN = 6
TOLERANCE = 1e-4  # fp32, sums of at most a few dozen terms of order one to ten in another order
SETTINGS = settings(max_examples=60, deadline=None)

seeds = st.integers(0, 2**31)
tokens = st.integers(1, 7)
kinds = st.tuples(st.integers(1, 4), st.sampled_from(sorted(ACTIVATIONS)), st.booleans())
adapters = st.lists(st.tuples(st.lists(kinds, min_size=1, max_size=2), st.booleans()), min_size=1, max_size=5)
Shape = tuple[list[tuple[int, str, bool]], bool]


def some_edit(rng: torch.Generator, shape: Shape) -> Edit:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=rng)

    parts, constant = shape
    made = [Part(normal(b, HIDDEN), normal(b), normal(HIDDEN, b), name, normed) for b, name, normed in parts]
    return Edit(tuple(made), normal(HIDDEN) if constant else None)


def some_case(seed: int, shapes: list[Shape], count: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, Edit]]]:
    """The stream, what is read, gates of which about half are zero, and an edit for each column."""
    rng = torch.Generator().manual_seed(seed)
    values = [(column, some_edit(rng, shape)) for column, shape in enumerate(shapes)]
    # Not two views of one tensor: a product's last bit depends on where in memory its rows begin.
    h, v = torch.randn(count, HIDDEN, generator=rng), torch.randn(count, HIDDEN, generator=rng)
    gates = torch.randn(count, len(shapes), generator=rng)
    return h, v, gates * (torch.rand(gates.shape, generator=rng) < 0.5), values


@given(seeds, adapters, tokens)
@SETTINGS
def test_the_edit_equals_its_plain_loop(seed: int, shapes: list[Shape], count: int) -> None:
    h, v, gates, values = some_case(seed, shapes, count)
    fast = edit.apply(h, v, Gates(gates), edit.pack(values))
    torch.testing.assert_close(fast, edit.apply_loop(h, v, gates, values), atol=TOLERANCE, rtol=TOLERANCE)


@given(seeds, adapters, tokens)
@SETTINGS
def test_a_zero_gate_is_bit_identical_to_no_adapter(seed: int, shapes: list[Shape], count: int) -> None:
    h, v, gates, values = some_case(seed, shapes, count)
    gates[0] = 0
    assert torch.equal(edit.apply(h, v, Gates(gates), edit.pack(values))[0], h[0])


@given(seeds, adapters, st.integers(2, 7))
@SETTINGS
def test_a_tokens_result_does_not_depend_on_its_neighbours(seed: int, shapes: list[Shape], count: int) -> None:
    """Not even on one whose adapter overflows every product: its infinities stay with it, to the bit."""
    h, v, gates, values = some_case(seed, shapes, count)
    huge = Edit((Part(torch.full((2, HIDDEN), 3e38), torch.zeros(2), torch.full((HIDDEN, 2), 3e38)),))
    values.append((len(values), huge))
    gates = torch.cat([gates, torch.zeros(count, 1)], dim=1)
    calm = edit.apply(h, v, Gates(gates), edit.pack(values))
    rng = torch.Generator().manual_seed(seed + 1)
    v, h, gates = v.clone(), h.clone(), gates.clone()
    v[1:] = torch.randn(count - 1, HIDDEN, generator=rng).abs() * 1e3 + 1
    h[1:] = torch.randn(count - 1, HIDDEN, generator=rng) * 1e3
    gates[1:, -1] = 1
    wild = edit.apply(h, v, Gates(gates), edit.pack(values))
    assert torch.equal(calm[0], wild[0])
    assert not wild[1:].isfinite().all(), "the neighbours were meant to overflow"


@given(seeds, adapters, tokens)
@SETTINGS
def test_a_fusion_is_the_weighted_sum_of_the_edits(seed: int, shapes: list[Shape], count: int) -> None:
    """All of them read the same value: (fused - h) = sum of weight * (alone - h)."""
    h, v, gates, values = some_case(seed, shapes, count)
    fused = edit.apply(h, v, Gates(gates), edit.pack(values))
    total = h.clone()
    for column, value in values:
        alone = edit.apply(h, v, Gates(torch.ones(count, 1)), edit.pack([(0, value)]))
        total += gates[:, column, None] * (alone - h)
    torch.testing.assert_close(fused, total, atol=TOLERANCE, rtol=TOLERANCE)


@given(seeds, adapters, tokens)
@SETTINGS
def test_the_order_of_a_tokens_adapters_does_not_matter(seed: int, shapes: list[Shape], count: int) -> None:
    h, v, gates, values = some_case(seed, shapes, count)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).tolist()
    moved = [(column, values[k][1]) for column, k in enumerate(order)]
    one = edit.apply(h, v, Gates(gates), edit.pack(values))
    other = edit.apply(h, v, Gates(gates[:, order]), edit.pack(moved))
    torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


@given(seeds, adapters)
@SETTINGS
def test_a_bank_that_dropped_an_edit_equals_one_that_never_held_it(seed: int, shapes: list[Shape]) -> None:
    rng = torch.Generator().manual_seed(seed)
    grafts = [
        Graft(f"digest-{k}", f"graft@{k}", {"place": SiteValue(edit=some_edit(rng, s))}) for k, s in enumerate(shapes)
    ]
    h, v = torch.randn(2, 2, HIDDEN, generator=rng)
    results = []
    for history in ([grafts, grafts[:1]], [grafts[:1]]):
        bank = Bank()
        for active in history:
            columns = bank.activate(active)
        gates = gates_from_rows([(1, [(columns["digest-0"], 1.0)]), (1, list[tuple[int, float]]())], bank.size, h)
        operand = bank.operands["place"].edit
        assert operand is not None
        results.append(edit.apply(h, v, gates, operand))
    torch.testing.assert_close(*results, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(results[0][1], h[1])
