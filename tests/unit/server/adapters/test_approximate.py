"""A change of full rank as the closest of low rank: how its rank is chosen, and that the error is true."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.adapters.lowering.approximate import ROUNDING, check_errors, closest
from server.adapters.lowering.table import lower
from server.adapters.lowering.target import Target
from server.errors import AdapterIncompatible
from server.primitives.site import SiteShape

OUT, IN = 12, 20
VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])


def target(limit: float, max_rank: int = 64) -> Target:
    cpu = torch.device("cpu")
    return Target({}, (), IN, torch.float32, cpu, max_rank, 64, lambda name: torch.empty(0), max_delta_error=limit)


def with_singular_values(values: Tensor) -> Tensor:
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(OUT, len(values)))
    V, _ = torch.linalg.qr(torch.randn(IN, len(values)))
    return U @ (values[:, None] * V.t())


@pytest.mark.parametrize("rank", range(6))
def test_the_rank_is_the_smallest_that_keeps_the_limit_and_the_error_is_measured(rank: int) -> None:
    delta = with_singular_values(VALUES)
    error = float(VALUES[rank:].norm() / VALUES.norm())
    A, B, told = closest(delta, "q", target(min(error * 1.001, 1.0)))
    assert A.shape[0] == B.shape[1] == rank
    assert told == pytest.approx(error, abs=1e-6)
    assert (delta - B @ A).norm() / delta.norm() == pytest.approx(told, abs=1e-6)
    if rank:
        assert len(closest(delta, "q", target(float(VALUES[rank - 1 :].norm() / VALUES.norm()) * 0.999))[0]) == rank


def test_a_limit_of_zero_takes_what_is_of_low_rank_and_nothing_else() -> None:
    A, _, error = closest(with_singular_values(VALUES), "q", target(0.0))
    assert len(A) == len(VALUES)
    assert error < ROUNDING
    assert check_errors({"q": error}, target(0.0)) == error
    *_, cut = closest(with_singular_values(VALUES), "q", target(0.0, max_rank=4))
    with pytest.raises(
        AdapterIncompatible, match=r"its change of v has full rank: of rank 4 .*above max_delta_error 0$"
    ):
        check_errors({"q": error, "v": cut}, target(0.0, max_rank=4))


def test_no_change_at_all_has_no_rank_and_no_error() -> None:
    A, _, error = closest(torch.zeros(OUT, IN), "q", target(0.0))
    assert (len(A), error) == (0, 0.0)
    assert check_errors({}, target(0.0)) is None


def test_what_is_no_finite_number_is_refused() -> None:
    with pytest.raises(AdapterIncompatible, match="the change of q is no finite number"):
        closest(torch.full((OUT, IN), torch.nan), "q", target(0.5))


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.9])
def test_a_kronecker_product_is_as_close_as_its_whole_would_be(limit: float) -> None:
    torch.manual_seed(1)
    w1, w2 = torch.randn(3, 4), torch.randn(4, 5)
    tensors = {"base_model.model.q.lokr_w1": w1, "base_model.model.q.lokr_w2": w2}
    onto = replace(target(limit), sites={"q": SiteShape(IN, OUT, None)})
    lowered = lower("lokr", {"r": 5, "alpha": 10}, tensors, onto)
    A, B, error = closest(2 * torch.kron(w1, w2), "q", onto)
    found = lowered.sites["q"].lowrank
    assert found is not None
    assert found.A_RI.shape == A.shape
    assert torch.allclose(found.B_OR @ found.A_RI, B @ A, atol=1e-4)
    assert lowered.approximation == pytest.approx(error, abs=1e-5)
