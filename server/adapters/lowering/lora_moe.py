"""lora-moe: a router becomes the rows by which every decoder layer scores its experts; the experts are grafts of their
own, which the store fetches by their digests.

L layers, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives.route import Router

TOKEN_ROWS, PROMPT_ROWS = "router.weight", "router.prompt_weight"


def lower_lora_moe(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """s_e = w_e . h / rms(h) + v_e . c in every layer, in fp32."""
    experts = tuple(config["experts"])
    if tensors.keys() != {TOKEN_ROWS, PROMPT_ROWS}:
        raise AdapterIncompatible(f"a router has {TOKEN_ROWS} and {PROMPT_ROWS} alone, this one has {sorted(tensors)}")
    if not target.decoder_layers:
        raise AdapterIncompatible("the decoder layers of this base could not be told apart, so no router can read them")
    width = None if target.embedding is None else target.embedding.features
    if width != target.hidden_size:
        raise AdapterIncompatible(
            f"a router reads embeddings of {target.hidden_size} features, this base's have {width}"
        )
    shape = (len(target.decoder_layers), len(experts), target.hidden_size)
    rows_LEH, prompt_LEH = (_rows(name, tensors[name], shape, target) for name in (TOKEN_ROWS, PROMPT_ROWS))
    if not 1 <= config["top_k"] <= len(experts):
        raise AdapterIncompatible(f"top_k {config['top_k']} is outside of 1 to {len(experts)}, the experts")
    return Lowered(router=Router(rows_LEH, prompt_LEH, config["top_k"]), experts=experts)


def _rows(name: str, weight: Tensor, shape: tuple[int, ...], target: Target) -> Tensor:
    if tuple(weight.shape) != shape:
        raise AdapterIncompatible(f"{name} has shape {list(weight.shape)}, this base needs {list(shape)}")
    if not weight.isfinite().all():
        raise AdapterIncompatible(f"{name} holds values that are no finite numbers")
    return weight.to(device=target.device, dtype=torch.float32).contiguous()
