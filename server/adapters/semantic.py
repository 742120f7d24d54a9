"""Which adapter a prompt is nearest to: the embedding of the prompt against the centroids of every candidate.

E embedding size, C centroids of one adapter. A candidate's score is the largest cosine of (embedding - mean) / scale
with any of its centroids, with its own mean and scale. It answers instead of the base only where the score reaches its
own threshold, which was calibrated when it was trained, plus the server's margin.
Law: the order of the candidates changes nothing but which of two equal ones is chosen: the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from server.records import PromptChoice

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Centroids:
    """What an adapter's training prompts left behind; fp32, on the CPU."""

    mean_E: Tensor
    scale_E: Tensor
    units_CE: Tensor  # each of length one
    threshold: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter that a prompt may be for, by the reference that it is asked for with."""

    ref: str
    centroids: Centroids


@dataclass(frozen=True, slots=True)
class Scored:
    candidate: Candidate
    score: float
    threshold: float

    @property
    def reached(self) -> bool:
        return self.score >= self.threshold


def score(centroids: Centroids, embedding_E: Tensor) -> float:
    direction_E = normalize((embedding_E - centroids.mean_E) / centroids.scale_E, dim=-1)
    return float((centroids.units_CE @ direction_E).max())


def rank(candidates: Sequence[Candidate], embedding: Sequence[float], margin: float) -> list[Scored]:
    """All candidates, the nearest first."""
    embedding_E = torch.tensor(embedding, dtype=torch.float32)
    scored = [Scored(one, score(one.centroids, embedding_E), one.centroids.threshold + margin) for one in candidates]
    return sorted(scored, key=lambda one: -one.score)


def tell(ranked: Sequence[Scored], chosen: Scored | None) -> PromptChoice:
    """What was chosen, and why, in numbers and in words."""
    nearest = tuple((one.candidate.ref, one.score) for one in ranked[:SHOWN])
    if not ranked:
        return PromptChoice(None, None, None, (), "no adapter here has centroids: the base answers")
    if chosen is None:
        best = ranked[0]
        why = f"{best.candidate.ref} is the nearest, but its score is below its threshold: the base answers"
        if best.reached:
            why = "no adapter that is near enough can be served: the base answers"
        return PromptChoice(None, best.score, best.threshold, nearest, why)
    ref = chosen.candidate.ref
    why = f"{ref} is the nearest, and its score reaches its threshold"
    if chosen is not ranked[0]:
        why = f"{ref} is the nearest whose score reaches its threshold and that can be served"
    equal = [one.candidate.ref for one in ranked if one is not chosen and one.score == chosen.score]
    if equal:
        why += f"; {equal[0]} is as near: nothing tells their prompts apart"
    return PromptChoice(ref, chosen.score, chosen.threshold, nearest, why)
