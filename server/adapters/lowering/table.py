"""Lowering: a file in PEFT's format becomes primitives, by one function per kind of adapter.

A kind that is a change of each Linear by itself says in the hub's table what it computes, and needs no row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from hub.methods import METHODS
from server.adapters.lowering.bitfit import lower_bitfit
from server.adapters.lowering.bottleneck import lower_bottleneck
from server.adapters.lowering.fourierft import lower_fourierft
from server.adapters.lowering.linears import lower_linears
from server.adapters.lowering.ln_tuning import lower_ln_tuning
from server.adapters.lowering.lora import lower_lora
from server.adapters.lowering.lora_moe import lower_lora_moe
from server.adapters.lowering.loreft import lower_loreft
from server.adapters.lowering.prompts import lower_multitask_prompt, lower_prefix, lower_soft_prompt
from server.adapters.lowering.sparse import lower_sparse
from server.adapters.lowering.stored import check_finite, check_scaled, laid_out
from server.adapters.lowering.target import Lowered, Lowering, Target
from server.adapters.lowering.trainable_tokens import lower_trainable_tokens
from server.adapters.lowering.vera import lower_vera
from server.adapters.lowering.whole import take_whole
from server.errors import AdapterIncompatible
from server.policy.reach import EVERYWHERE

# Kinds that reach beyond single Linears, or need functions of torch's.
OWN: Mapping[str, Lowering] = {
    "lora": lower_lora,
    "vera": lower_vera,
    "sparse": lower_sparse,
    "fourierft": lower_fourierft,
    "bitfit": lower_bitfit,
    "ln-tuning": lower_ln_tuning,
    "trainable-tokens": lower_trainable_tokens,
    "prefix": lower_prefix,
    "prompt": lower_soft_prompt,
    "multitask-prompt": lower_multitask_prompt,
    "p-tuning": lower_soft_prompt,
    "lora-moe": lower_lora_moe,
    "bottleneck": lower_bottleneck,
    "loreft": lower_loreft,
}
LOWERINGS: Mapping[str, Lowering] = {
    **{row.kind: partial(lower_linears, at=row.at_linear) for row in METHODS.values() if row.at_linear is not None},
    **OWN,
}


def lower(kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Raises: AdapterIncompatible, naming the field or tensor and both values."""
    lowering = LOWERINGS.get(kind)
    if lowering is None:
        raise AdapterIncompatible(f"kind {kind} is not served; served are {', '.join(sorted(LOWERINGS))}")
    largest = check_finite(tensors)
    shared, own = take_whole(config, tensors, target)
    lowered = lowering(config, own, target)
    if shared and lowered.reach != EVERYWHERE:
        raise AdapterIncompatible(f"{min(shared)} is replaced at every token, the rest works at some tokens alone")
    twice = sorted(shared.keys() & lowered.sites.keys())
    if twice:
        raise AdapterIncompatible(f"{twice[0]} is adapted and replaced by one adapter")
    check_scaled(lowered, largest, target)
    return laid_out(replace(lowered, sites={**lowered.sites, **shared}))
