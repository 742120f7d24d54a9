"""A product and its adapters in one native call, against the same one after the other in double precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.kernels import native
from server.kernels.adapted import Adapted, Native, activations_of
from server.kernels.changes import NOTHING, Change, SiteChange, tabulate_changes
from server.kernels.gathered import Gathered, Row, Runs, Term, tabulate
from server.kernels.products import Panels, Tiled
from server.kernels.quantized import Int8Panels, Int8Tiled, round_rows

# Relative to the largest: one rounding to bf16 of a sum of two, or of the sums apart; sums in fp32 in another order.
CLOSE = {torch.bfloat16: 2**-7, torch.float32: 2**-18}
WIDTHS = (20, 130, 64)

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason="no C compiler was at hand when this was installed")


HELD: dict[str, Callable[[Tensor], Native]] = {
    "whole": lambda weight_OI: Tiled(weight_OI, in_codes=False),
    "in codes": Tiled,
    "int8": lambda weight_OI: Int8Tiled(round_rows(weight_OI, 127)),
}
if native.has_panels():
    HELD |= {"panels": Panels, "int8 panels": lambda weight_OI: Int8Panels(round_rows(weight_OI, 127))}


@dataclass(frozen=True)
class Some:
    """An adapter: its low-rank terms, and by Linear what it changes."""

    terms: tuple[Term, ...]
    changes: Mapping[int, SiteChange]

    @property
    def row(self) -> Row:
        table = tabulate_changes(self.changes, len(WIDTHS)) if self.changes else None
        return tabulate([self.terms], table)


def some(
    rng: torch.Generator, rank: int, inputs: int, widths: Sequence[int], *, changes_in: torch.dtype | None = None
) -> Some:
    """Low-rank terms in bf16 at every Linear but one, and what changes the first one's input and the last one's output,
    in the type of the activations."""

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    terms = [
        Term(normal(rank, inputs), normal(rank, wide), 0.1, m)
        for m, wide in enumerate(widths)
        if (m + rank) % 3 or len(widths) == 1
    ]
    changes: dict[int, SiteChange] = {}
    if changes_in is not None:
        before, behind = Change(normal(inputs, dtype=changes_in)), Change(bias_F=normal(widths[-1], dtype=changes_in))
        changes = {0: SiteChange(before), len(widths) - 1: SiteChange(NOTHING, behind)}
        if len(widths) == 1:
            changes = {0: SiteChange(before, behind)}
    return Some(tuple(terms), changes)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    counts=st.lists(st.sampled_from([1, 1, 1, 5, 16, 17, 40, 70]), min_size=1, max_size=5),
    ranks=st.lists(st.sampled_from([1, 7, 8, 16, 33, 72]), min_size=2, max_size=3),
    members=st.integers(1, 3),
    held=st.sampled_from(sorted(HELD)),
    change=st.booleans(),
)
def test_a_product_with_its_adapters_is_the_sum_of_both(
    seed: int, counts: list[int], ranks: list[int], members: int, held: str, change: bool
) -> None:
    """Runs of many tokens from any place on, beside single tokens; some tokens carry none, some carry two."""
    rng = torch.Generator().manual_seed(seed)
    inputs, widths, tokens = 192, WIDTHS[:members], sum(counts)
    product = HELD[held](torch.randn(sum(widths), inputs, generator=rng).bfloat16())
    dtype = activations_of(product)
    adapters = [
        some(rng, rank, inputs, widths, changes_in=dtype if change and k == 1 else None) for k, rank in enumerate(ranks)
    ]
    gates = (0.5, -1.0, 2.0)
    carried = [
        [(k, gates[k]) for k in range(len(ranks)) if (n + k) % 3 != seed % 3 and n % 4 != 3] for n in range(len(counts))
    ]
    runs = Runs(list(zip(counts, carried, strict=True)))
    gathered = Gathered([one.row for one in adapters])
    x_TI = torch.randn(tokens, inputs, generator=rng).to(dtype)
    firsts = [sum(widths[:m]) for m in range(members + 1)]
    y_TO = Adapted(product, 0, 0, firsts)(x_TI, gathered, runs).double()
    per_token = [own for count, own in zip(counts, carried, strict=True) for _ in range(count)]
    base_TO = product(x_TI)
    for t, own in enumerate(per_token):
        expected = expected_row(product, [(gate, adapters[k]) for k, gate in own], x_TI[t : t + 1], firsts)
        close = CLOSE[dtype]
        torch.testing.assert_close(y_TO[t], expected, atol=close * expected.abs().max().item(), rtol=close)
        if not own:
            assert torch.equal(y_TO[t], base_TO[t].double())


def expected_row(product: Native, carried: Sequence[tuple[float, Some]], x_1I: Tensor, firsts: Sequence[int]) -> Tensor:
    """In double precision, but for the base's product of inputs that are of x's type."""
    x_I, made = x_1I[0].double(), []
    for m, (first, end) in enumerate(pairwise(firsts)):
        changed_I, added_O = x_I.clone(), torch.zeros(end - first, dtype=torch.double)
        for gate, one in carried:
            change = one.changes.get(m, SiteChange())
            if change.before.scale_F is not None:
                changed_I += gate * change.before.scale_F.double() * x_I
            if change.behind.bias_F is not None:
                added_O += gate * change.behind.bias_F.double()
            for term in one.terms:
                if term.member == m:
                    added_O += gate * term.scaling * (term.B_RO.double().t() @ (term.A_RI.double() @ x_I))
        made.append(product(changed_I.to(x_1I.dtype)[None])[0, first:end].double() + added_O)
    return torch.cat(made)


@pytest.mark.parametrize("held", sorted(HELD))
def test_what_overflows_in_a_run_of_many_stays_with_it(held: str) -> None:
    rng = torch.Generator().manual_seed(0)
    product = HELD[held](torch.randn(64, 64, generator=rng).bfloat16())
    huge, calm = (some(rng, 8, 64, (64,)) for _ in range(2))
    huge.terms[0].A_RI.fill_(3e38)
    x_TI = torch.randn(60, 64, generator=rng).to(activations_of(product))
    one, gathered = Adapted(product, 0, 0, [0, 64]), Gathered([huge.row, calm.row])
    beside = one(x_TI, gathered, Runs([(3, []), (20, [(0, 1.0)]), (30, [(1, 1.0)]), (7, [(0, 0.0)])]))
    alone = one(x_TI, gathered, Runs([(3, []), (20, []), (30, [(1, 1.0)]), (7, [])]))
    assert not beside[3:23].isfinite().any(1).all() and beside[23:].isfinite().all()
    assert torch.equal(beside[:3], alone[:3]) and torch.equal(beside[23:], alone[23:])


@pytest.mark.parametrize("bits", [6, 12, 20])
def test_middles_of_a_run_of_many_keep_their_24_bits(bits: int) -> None:
    """Two middles of so many bits, of which one is larger by one: their difference."""
    tokens, inputs = 20, 32
    x_TI = torch.zeros(tokens, inputs).bfloat16()
    x_TI[:, :3] = 1
    A_RI = torch.zeros(2, inputs).bfloat16()
    A_RI[:, 0], A_RI[:, 1], A_RI[0, 2] = 2.0**bits, 2.0 ** (bits // 2), 1
    B_RO = torch.tensor([1.0, -1.0]).bfloat16()[:, None].expand(2, 24).contiguous()
    gathered = Gathered([tabulate([[Term(A_RI, B_RO, 1.0, 0)]])])
    made = Adapted(Tiled(torch.zeros(24, inputs).bfloat16()), 0, 0, [0, 24])(
        x_TI, gathered, Runs([(tokens, [(0, 1.0)])])
    )
    assert (made == 1).all()
