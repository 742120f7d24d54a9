"""Prefix: keys and values that stand ahead of a sequence, per layer and KV head.

L layers, KH KV heads, V virtual tokens, D head dimension. The keys are cache entries: already normed and rotated, at
positions 0..V-1, so that real tokens start at position V. Weights cannot apply to a prefix (its effect is not a sum),
so its gate is one, or zero, and then it is left out rather than masked.
Source: Li and Liang 2021 (arXiv:2101.00190); prompt tuning: Lester et al. 2021 (arXiv:2104.08691).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer caches of a token."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """`keys[l]`, `values[l]` are (KH, V, D) of layer l, in the cache's dtype and on its device."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]

    def then(self, following: Prefix) -> Prefix:
        """Both, one after the other."""
        pairs = zip((*self.keys, *self.values), (*following.keys, *following.values), strict=True)
        joined = tuple(torch.cat(pair, dim=1) for pair in pairs)
        return Prefix(joined[: len(self.keys)], joined[len(self.keys) :])

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in (*self.keys, *self.values))
