"""Sparse changes (LT-SFT, diff pruning): as the hub's table tells them; and every module that is named must be there.

Source: docs/decisions/0018-the-format-of-sparse-changes.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hub.families.sparse import AT_LINEAR
from server.adapters.lowering.linears import lower_linears
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible


def lower_sparse(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """The config names modules whole, so that one without tensors is seen here."""
    lowered = lower_linears(config, tensors, target, at=AT_LINEAR)
    missing = next((module for module in config["entries"] if module not in lowered.sites), None)
    if missing is not None:
        raise AdapterIncompatible(f"{missing} lacks sparse_indices, but the config has entries for it")
    return lowered
