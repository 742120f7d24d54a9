"""The merges of whole task vectors: magnitude pruning, DARE and TIES, on one tensor of all parents at a time.

A task vector is what an adapter adds to a weight, the delta, never its factors apart. Each is thinned out to `density`
of its entries, by size or at random, and the thinned ones are summed with their weights or merged by elected signs.
A thinned vector is made when it is needed and dropped again: memory does not grow with the number of parents.

Laws: at density 1 magnitude_prune and dare_linear are the weighted sum; a weight of -w is a weight of w on the negated
vector; the order of the parents changes nothing.
Source: Yadav et al. 2023 (arXiv:2306.01708), trim, elect, disjoint mean; Yu et al. 2023 (arXiv:2311.03099), drop and
rescale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Vector:
    """One parent's task vector: its weight, how to make it, and a name of its own, from which its dice are thrown."""

    weight: float
    make: Callable[[], Tensor]
    name: str


@dataclass(frozen=True, slots=True)
class Thinning:
    density: float
    seed: int


# Makes every weighted, thinned vector anew each time that it is asked.
Thinned = Callable[[], Iterable[Tensor]]
Merge = Callable[[Sequence[Vector], Thinning], Tensor]


def keep_largest(vector: Tensor, density: float) -> Tensor:
    """The share `density` of the entries with the largest magnitudes; whatever equals the last of them stays, too."""
    magnitudes = vector.abs()
    kept = max(1, int(density * vector.numel()))
    threshold = magnitudes.flatten().kthvalue(vector.numel() - kept + 1).values
    return torch.where(magnitudes >= threshold, vector, 0)


def drop_at_random(vector: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry stays with probability `density`, divided by it; the dice are the same on every device."""
    kept = torch.rand(vector.shape, generator=generator) < density
    return torch.where(kept.to(vector.device), vector / density, 0)


def weighted_sum(thinned: Thinned) -> Tensor:
    total: Tensor | None = None
    for vector in thinned():
        total = vector if total is None else total + vector
    assert total is not None
    return total


def elected_mean(thinned: Thinned) -> Tensor:
    """Per entry: the sign of the sum is elected, and the mean taken of those vectors that have it."""
    elected = weighted_sum(thinned).sign()
    total, voters = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector in thinned():
        agrees = (vector.sign() == elected) & (elected != 0)
        total += torch.where(agrees, vector, 0)
        voters += agrees
    return total / voters.clamp_min(1)


def _by_size(vectors: Sequence[Vector], thinning: Thinning) -> Iterable[Tensor]:
    for vector in vectors:
        yield vector.weight * keep_largest(vector.make(), thinning.density)


def _at_random(vectors: Sequence[Vector], thinning: Thinning) -> Iterable[Tensor]:
    for vector in vectors:
        seed = hashlib.sha256(f"{thinning.seed}/{vector.name}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        yield vector.weight * drop_at_random(vector.make(), thinning.density, generator)


def _merge(
    thin: Callable[[Sequence[Vector], Thinning], Iterable[Tensor]], combine: Callable[[Thinned], Tensor]
) -> Merge:
    return lambda vectors, thinning: combine(partial(thin, vectors, thinning))


MERGES: Final[Mapping[str, Merge]] = {
    "magnitude_prune": _merge(_by_size, weighted_sum),
    "dare_linear": _merge(_at_random, weighted_sum),
    "ties": _merge(_by_size, elected_mean),
    "dare_ties": _merge(_at_random, elected_mean),
}
