"""Two questions, easily taken for one: is a version served as it is stored, and is what is stored what it stands for.

The first follows from its kind. The second is asked of fused and extracted versions only; what is told is what their
maker measured and recorded in metrics.json, which nobody has checked since.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hub.manifest import Manifest
from hub.methods import METHODS

# Changes of full rank: a server finds the closest of low rank, and measures how far off that is (docs/decisions/0019).
OF_FULL_RANK: frozenset[str] = frozenset(method.kind for method in METHODS.values() if method.full_rank)
ROUNDING = 1e-6  # of a sum in fp32; a merge or a cut that changes anything is far above
_STANDS_FOR = {  # by the record in the recipe
    "fusion": "the exact weighted sum of its parents",
    "extraction": "the difference of the two models at their Linears",
}


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far what is stored is from what it stands for, relative, in the Frobenius norm; None: not recorded.

    `whole_relative_error` counts also what an extraction left out.
    """

    stands_for: str
    relative_error: float | None
    worst_relative_error: float | None = None
    worst_linear: str | None = None
    whole_relative_error: float | None = None

    def __str__(self) -> str:
        if self.relative_error is None:
            return f"not recorded; it stands for {self.stands_for}"
        whole = self.relative_error if self.whole_relative_error is None else self.whole_relative_error
        if max(self.relative_error, whole) <= ROUNDING:
            return f"none from {self.stands_for} but rounding ({self.relative_error:.3g})"
        more = []
        if self.worst_relative_error is not None and self.worst_linear is not None:
            more.append(f"worst: {self.worst_relative_error:.3g} at {self.worst_linear}")
        if whole != self.relative_error:
            more.append(f"{whole:.3g} with what was left out")
        return f"{self.relative_error:.3g} of {self.stands_for}" + (f" ({'; '.join(more)})" if more else "")


def served_exactly(kind: str) -> bool:
    """Whether a server adds what is stored, and not something close to it."""
    return kind not in OF_FULL_RANK


def served_as(kind: str) -> str:
    if served_exactly(kind):
        return "exactly as it is stored"
    return "at low rank: a server measures the error, tells it in GET /v1/adapters, and limits it by --max-delta-error"


def deviation(manifest: Manifest) -> Deviation | None:
    """None for a version that stands for itself."""
    recipe, metrics = manifest.recipe or {}, manifest.metrics or {}
    made = next((key for key in _STANDS_FOR if isinstance(recipe.get(key), dict) and recipe[key]), None)
    if made is None:
        return None
    worst = metrics.get("worst_linear")
    return Deviation(
        _STANDS_FOR[made],
        _number(metrics, "relative_error"),
        _number(metrics, "worst_relative_error"),
        worst if isinstance(worst, str) else None,
        _number(metrics, "whole_relative_error"),
    )


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    """Of a record that anybody may have written."""
    value = metrics.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None
