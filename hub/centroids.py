"""Where the prompts that an adapter was trained on lie: what centroids.json may say.

A prompt is embedded by the bare base: the mean, over the prompt's tokens, of the hidden states that enter the middle
layer. Hidden states are anisotropic, so centroids.safetensors holds beside the centroids the mean and the scale of each
dimension over texts of every kind: what is compared are directions of (embedding - mean) / scale.
See docs/decisions/0021-prompts-are-embedded-by-the-base.md.
"""

from __future__ import annotations

import math
from typing import Any, Final

from hub.base import Base
from hub.errors import Problem
from hub.manifest import CENTROIDS_FILE

SCHEMA_VERSION: Final = 1
POOLING: Final = "mean"
MAX_CENTROIDS: Final = 256
FIELDS: Final = ("schema_version", "base", "layer", "pooling", "prompts", "centroids", "threshold")


def embedding_layer(layers: int) -> int:
    """How many of the base's layers have run when its hidden states are read: half of them, rounded down."""
    return layers // 2


def centroids_problems(value: Any, base: Base | None) -> list[Problem]:
    """Check centroids.json by itself, and against the base where that is known."""
    if not isinstance(value, dict) or set(value) != set(FIELDS) or value["schema_version"] != SCHEMA_VERSION:
        reason = f"must be an object of {', '.join(FIELDS)}, with schema_version {SCHEMA_VERSION}"
        return [Problem(CENTROIDS_FILE, None, reason)]
    reasons = []
    if not _is_natural(value["centroids"]) or value["centroids"] > MAX_CENTROIDS:
        reasons.append(("centroids", f"must be 1 to {MAX_CENTROIDS}"))
    if not _is_natural(value["prompts"]):
        reasons.append(("prompts", "must be a number of prompts, at least 1"))
    if value["pooling"] != POOLING:
        reasons.append(("pooling", f'must be "{POOLING}", the one that servers compute'))
    if not _is_cosine(value["threshold"]):
        reasons.append(("threshold", "must be a number from -1 to 1"))
    if base is not None and value["base"] != base.fingerprint:
        reasons.append(("base", f"must be {base.fingerprint}, the fingerprint of the base"))
    if base is not None and (type(value["layer"]) is not int or value["layer"] != embedding_layer(base.layers)):
        reasons.append(("layer", f"must be {embedding_layer(base.layers)}, the middle of the base"))
    return [Problem(CENTROIDS_FILE, field, reason) for field, reason in reasons]


def _is_natural(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**53


def _is_cosine(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and -1 <= value <= 1
