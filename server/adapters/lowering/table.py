"""Lowering: a file in PEFT's format becomes primitives, by one function per kind of adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from server.adapters.lowering.adalora import lower_adalora
from server.adapters.lowering.beft import lower_beft
from server.adapters.lowering.bitfit import lower_bitfit
from server.adapters.lowering.boft import lower_boft
from server.adapters.lowering.bottleneck import lower_bottleneck
from server.adapters.lowering.c3a import lower_c3a
from server.adapters.lowering.delora import lower_delora
from server.adapters.lowering.fourierft import lower_fourierft
from server.adapters.lowering.hira import lower_hira
from server.adapters.lowering.hra import lower_hra
from server.adapters.lowering.ia3 import lower_ia3
from server.adapters.lowering.ln_tuning import lower_ln_tuning
from server.adapters.lowering.loha import lower_loha
from server.adapters.lowering.lokr import lower_lokr
from server.adapters.lowering.lora import lower_lora
from server.adapters.lowering.lora_moe import lower_lora_moe
from server.adapters.lowering.loreft import lower_loreft
from server.adapters.lowering.miss import lower_miss
from server.adapters.lowering.oft import lower_oft
from server.adapters.lowering.prompts import lower_multitask_prompt, lower_prefix, lower_soft_prompt
from server.adapters.lowering.road import lower_road
from server.adapters.lowering.shira import lower_shira
from server.adapters.lowering.sparse import lower_sparse
from server.adapters.lowering.target import Lowered, Lowering, Target
from server.adapters.lowering.trainable_tokens import lower_trainable_tokens
from server.adapters.lowering.vera import lower_vera
from server.adapters.lowering.whole import take_whole
from server.errors import AdapterIncompatible
from server.policy.reach import EVERYWHERE

LOWERINGS: Mapping[str, Lowering] = {
    "lora": lower_lora,
    "adalora": lower_adalora,
    "vera": lower_vera,
    "loha": lower_loha,
    "hra": lower_hra,
    "miss": lower_miss,
    "delora": lower_delora,
    "ia3": lower_ia3,
    "beft": lower_beft,
    "oft": lower_oft,
    "boft": lower_boft,
    "road": lower_road,
    "shira": lower_shira,
    "sparse": lower_sparse,
    "lokr": lower_lokr,
    "fourierft": lower_fourierft,
    "c3a": lower_c3a,
    "hira": lower_hira,
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


def lower(kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Raises: AdapterIncompatible, naming the field or tensor and both values."""
    lowering = LOWERINGS.get(kind)
    if lowering is None:
        raise AdapterIncompatible(f"kind {kind} is not served; served are {', '.join(sorted(LOWERINGS))}")
    shared, own = take_whole(config, tensors, target)
    lowered = lowering(config, own, target)
    if shared and lowered.reach != EVERYWHERE:
        raise AdapterIncompatible(f"{min(shared)} is replaced at every token, the rest works at some tokens alone")
    twice = sorted(shared.keys() & lowered.sites.keys())
    if twice:
        raise AdapterIncompatible(f"{twice[0]} is adapted and replaced by one adapter")
    return replace(lowered, sites={**lowered.sites, **shared})
