"""LoRA whole: at each Linear as the hub's table tells it, on the embedding, on routers and experts; activated LoRA.

Source: Hu et al. 2021 (arXiv:2106.09685); Greenewald et al. 2025 (arXiv:2504.12397); peft 0.21.2, tuners/lora/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from hub.families.linears import pattern_rank
from hub.families.lora import AT_LINEAR, scaling
from server.adapters.lowering import embedding
from server.adapters.lowering.linears import lower_linears
from server.adapters.lowering.parameters import lower_parameters
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.policy.reach import EVERYWHERE, FromLast


def lower_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """An activated one works from its last invocation on."""
    own, rest = embedding.split(tensors, target.embedding)
    fused, rest = lower_parameters(config, rest, target)
    lowered = lower_linears(config, rest, target, at=AT_LINEAR)
    lowered = replace(lowered, sites={**lowered.sites, **fused})
    invocation = config.get("alora_invocation_tokens")
    if invocation:
        lowered = replace(lowered, reach=FromLast(tuple(invocation)))
    return lowered if not own else _with_embedding(config, own, target, lowered=lowered)


def _with_embedding(
    config: Mapping[str, Any], tensors: dict[str, Tensor], target: Target, *, lowered: Lowered
) -> Lowered:
    assert target.embedding is not None
    name = target.embedding.name
    rank = pattern_rank(config, name)
    if lowered.reach != EVERYWHERE:
        raise AdapterIncompatible(f"{name} is adapted, and PEFT has no activated LoRA on an embedding")
    if rank > target.max_rank:
        raise AdapterIncompatible(f"rank {rank} of {name} is above max_rank {target.max_rank}")
    lower_rows = embedding.lower_dora_rows if config.get("use_dora") else embedding.lower_rows
    value = lower_rows(tensors, target, rank=rank, scaling=scaling(config, name, rank))
    return replace(lowered, sites={**lowered.sites, name: value})
