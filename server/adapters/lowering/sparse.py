"""Sparse changes (LT-SFT, diff pruning): entries of the weight, at places that are named row by row.

O out, I in, N entries.
Source: docs/decisions/0018-the-format-of-sparse-changes.md; Ansell et al. 2022 (arXiv:2110.07560); Guo et al. 2021
(arXiv:2012.07463).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import Change, Found, check_places, lower_linears
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives import delta


def lower_sparse(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += D x, D[p // I, p % I] = value for each place p."""
    entries: Mapping[str, int] = config["entries"]

    def change(found: Found) -> Change:
        count = int(entries.get(found.module, 0))
        places_N = found.take_places("sparse_indices", count)
        check_places(found.module, places_N, found.inputs * found.outputs)
        if not (places_N.diff() > 0).all():
            raise AdapterIncompatible(f"sparse_indices of {found.module} do not ascend strictly")
        values_N = found.take("sparse_values", count)
        rows_N, columns_N = places_N // found.inputs, places_N % found.inputs
        return Change(delta=delta.sparse(rows_N, columns_N, values_N, shape=(found.outputs, found.inputs)))

    lowered = lower_linears(config, tensors, target, change=change)
    missing = next((module for module in entries if module not in lowered.sites), None)
    if missing is not None:
        raise AdapterIncompatible(f"{missing} lacks sparse_indices, but the config has entries for it")
    return lowered
