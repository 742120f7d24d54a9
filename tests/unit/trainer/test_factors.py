"""Low-rank algebra against the dense matrices, and the merges against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer import factors as lowrank
from trainer.factors import Factors
from trainer.merging import MERGES, Thinning, Vector, drop_at_random, keep_largest

ROUNDING = 1e-9  # fp64 throughout, over sums of a few dozen products
QUICK = settings(max_examples=25, deadline=None)


def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_factors(outputs: int, inputs: int, rank: int, seed: int) -> Factors:
    return Factors(matrix(rank, inputs, seed), matrix(outputs, rank, seed + 1))


sizes = st.tuples(st.integers(2, 9), st.integers(2, 9), st.lists(st.integers(1, 6), min_size=1, max_size=4))


@given(sizes, st.integers(0, 1000))
@QUICK
def test_a_concatenation_is_the_sum_and_its_norm_the_dense_one(shape: tuple[int, int, list[int]], seed: int) -> None:
    outputs, inputs, ranks = shape
    terms = [random_factors(outputs, inputs, rank, seed + 7 * number) for number, rank in enumerate(ranks)]
    total = lowrank.concatenate([lowrank.weighted(number - 1.5, term) for number, term in enumerate(terms)])
    dense = sum((number - 1.5) * term.dense() for number, term in enumerate(terms))
    torch.testing.assert_close(total.dense(), dense, atol=ROUNDING, rtol=0)
    assert lowrank.norm(total) == pytest.approx(float(torch.linalg.matrix_norm(dense)), abs=ROUNDING)
    apart = torch.linalg.matrix_norm(dense - terms[0].dense())
    assert lowrank.distance(total, terms[0]) == pytest.approx(float(apart), abs=1e-6)


@given(sizes, st.integers(1, 5), st.integers(0, 1000))
@QUICK
def test_a_truncation_is_the_nearest_matrix_of_its_rank(
    shape: tuple[int, int, list[int]], rank: int, seed: int
) -> None:
    outputs, inputs, ranks = shape
    whole = random_factors(outputs, inputs, sum(ranks), seed)
    dense = whole.dense()
    lost = torch.linalg.vector_norm(torch.linalg.svdvals(dense)[rank:])
    for found in (
        lowrank.compress(whole, lowrank.at_most(rank)),
        lowrank.compress_dense(dense, lowrank.at_most(rank)),
    ):
        assert found.rank <= rank
        error = torch.linalg.matrix_norm(found.dense() - dense)
        torch.testing.assert_close(error, lost, atol=1e-6 * float(torch.linalg.matrix_norm(dense)), rtol=0)


@given(st.integers(2, 9), st.integers(2, 9), st.floats(0.01, 1.0), st.integers(1, 9), st.integers(0, 1000))
@QUICK
def test_a_share_of_the_energy_is_kept_by_the_least_rank(
    outputs: int, inputs: int, share: float, limit: int, seed: int
) -> None:
    dense = matrix(outputs, inputs, seed)
    squares = torch.linalg.svdvals(dense).square()
    found = lowrank.compress_dense(dense, lowrank.share_of_energy(share, limit=limit))
    kept = float(squares[: found.rank].sum() / squares.sum())
    assert found.rank <= limit
    assert kept >= share - ROUNDING or found.rank == limit
    assert float(squares[: found.rank - 1].sum() / squares.sum()) < share


def test_factors_that_share_a_side_keep_the_rank_of_one() -> None:
    one = random_factors(9, 8, 3, 1)
    two = Factors(one.A_RI, matrix(9, 3, 5))
    total = lowrank.concatenate([one, two])
    found = lowrank.compress(total, lowrank.everything)
    assert found.rank == 3
    torch.testing.assert_close(found.dense(), total.dense(), atol=ROUNDING, rtol=0)
    assert lowrank.compress(lowrank.concatenate([one, lowrank.weighted(-1, one)]), lowrank.everything).rank == 0


def test_a_dense_matrix_is_factorised_only_at_its_rank() -> None:
    dense = random_factors(30, 20, 4, 3).dense().float()
    found = lowrank.factorise(dense, 4)
    assert found is not None and found.rank == 4
    torch.testing.assert_close(found.dense().float(), dense, atol=1e-5, rtol=0)
    assert lowrank.factorise(dense, 3) is None


def vectors(tensors: list[Tensor], weights: list[float]) -> list[Vector]:
    return [
        Vector(weight, lambda tensor=tensor: tensor, f"parent {number}")  # type: ignore[misc]
        for number, (tensor, weight) in enumerate(zip(tensors, weights, strict=True))
    ]


@pytest.mark.parametrize("method", MERGES)
def test_the_order_of_the_parents_changes_nothing(method: str) -> None:
    terms = vectors([matrix(5, 6, seed) for seed in range(3)], [0.7, -0.4, 1.2])
    thinning = Thinning(0.4, seed=3)
    merged = MERGES[method](terms, thinning)
    torch.testing.assert_close(MERGES[method](terms[::-1], thinning), merged, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("method", MERGES)
def test_a_negative_weight_is_the_weight_of_the_negated_delta(method: str) -> None:
    tensors = [matrix(5, 6, seed) for seed in range(3)]
    thinning = Thinning(0.6, seed=1)
    merged = MERGES[method](vectors(tensors, [0.7, -0.4, 1.2]), thinning)
    negated = MERGES[method](vectors([tensors[0], -tensors[1], tensors[2]], [0.7, 0.4, 1.2]), thinning)
    torch.testing.assert_close(negated, merged, atol=0, rtol=0)


@pytest.mark.parametrize("method", ["magnitude_prune", "dare_linear"])
def test_without_thinning_a_sum_is_the_weighted_sum(method: str) -> None:
    tensors = [matrix(5, 6, seed) for seed in range(3)]
    merged = MERGES[method](vectors(tensors, [0.7, -0.4, 1.2]), Thinning(1.0, seed=0))
    torch.testing.assert_close(merged, 0.7 * tensors[0] - 0.4 * tensors[1] + 1.2 * tensors[2], atol=ROUNDING, rtol=0)


def test_ties_takes_the_mean_of_those_that_agree_with_the_elected_sign() -> None:
    one, two, three = (torch.tensor(row, dtype=torch.float64) for row in ([3.0, 1, 0.1], [-1.0, 1, 0.2], [-1.0, 3, 4]))
    # Kept are two entries of each: [3, 1, 0], [-1, 1, 0], [0, 3, 4].
    merged = MERGES["ties"](vectors([one, two, three], [1.0, 1.0, 1.0]), Thinning(2 / 3, seed=0))
    torch.testing.assert_close(merged, torch.tensor([3.0, 5 / 3, 4.0], dtype=torch.float64))
    # With weights it is the weighted entries that vote: 3 * 0.2 loses against -1.
    merged = MERGES["ties"](vectors([one, two, three], [0.2, 1.0, 1.0]), Thinning(2 / 3, seed=0))
    torch.testing.assert_close(merged, torch.tensor([-1.0, (0.2 + 1 + 3) / 3, 4.0], dtype=torch.float64))


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 1000))
@QUICK
def test_the_largest_entries_are_those_that_stay(count: int, density: float, seed: int) -> None:
    vector = matrix(1, count, seed)[0]
    kept = keep_largest(vector, density)
    assert int((kept != 0).sum()) == max(1, int(density * count))
    assert torch.equal(kept[kept != 0], vector[kept != 0])
    if (kept == 0).any():
        assert vector[kept == 0].abs().max() <= kept[kept != 0].abs().min()


def test_dropped_entries_are_made_up_for_and_the_seed_decides_which() -> None:
    vector = torch.ones(40_000, dtype=torch.float64)
    once, again, other = (drop_at_random(vector, 0.25, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert set(once.unique().tolist()) == {0.0, 4.0}
    spread = 6 * (0.75 / 0.25 / 40_000) ** 0.5  # six standard deviations of the mean
    assert abs(float(once.mean()) - 1) < spread
