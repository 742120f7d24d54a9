"""The laws of the order in which rows are trained on."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from trainer.order import order

lengths_of_rows = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths=lengths_of_rows, rows_per_step=st.integers(1, 8), steps=st.integers(1, 60), seed=st.integers(0, 9))
def test_every_row_comes_as_often_as_any_other(lengths: list[int], rows_per_step: int, steps: int, seed: int) -> None:
    numbers = order(lengths, rows_per_step=rows_per_step, steps=steps, seed=seed)
    assert len(numbers) == rows_per_step * steps
    counts = Counter(numbers)
    times = [counts[row] for row in range(len(lengths))]
    assert max(times) - min(times) <= 1


def test_the_order_depends_on_the_seed_alone() -> None:
    lengths = list(range(1, 101))
    one, same, other = (order(lengths, rows_per_step=4, steps=50, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_the_epochs_differ() -> None:
    numbers = order([5] * 64, rows_per_step=4, steps=32, seed=0)
    assert numbers[:64] != numbers[64:]


def test_rows_of_like_length_share_a_batch() -> None:
    lengths = [1 + i % 50 for i in range(1000)]
    numbers = order(lengths, rows_per_step=10, steps=100, seed=0)
    padded = sum(10 * max(lengths[row] for row in numbers[i : i + 10]) for i in range(0, 1000, 10))
    assert padded < 1.15 * sum(lengths)
