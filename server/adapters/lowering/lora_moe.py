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

ROUTER_TENSOR = "router.weight"


def lower_lora_moe(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """s_e = w_e . h / rms(h) in every layer, in fp32."""
    experts = tuple(config["experts"])
    strange = sorted(tensors.keys() - {ROUTER_TENSOR})
    if strange or ROUTER_TENSOR not in tensors:
        raise AdapterIncompatible(f"a router has {ROUTER_TENSOR} and nothing else, this one has {sorted(tensors)}")
    if not target.decoder_layers:
        raise AdapterIncompatible("the decoder layers of this base could not be told apart, so no router can read them")
    weight = tensors[ROUTER_TENSOR]
    shape = (len(target.decoder_layers), len(experts), target.hidden_size)
    if tuple(weight.shape) != shape:
        raise AdapterIncompatible(f"{ROUTER_TENSOR} has shape {list(weight.shape)}, this base needs {list(shape)}")
    if not 1 <= config["top_k"] <= len(experts):
        raise AdapterIncompatible(f"top_k {config['top_k']} is outside of 1 to {len(experts)}, the experts")
    if not weight.isfinite().all():
        raise AdapterIncompatible(f"{ROUTER_TENSOR} holds values that are no finite numbers")
    placed = weight.to(device=target.device, dtype=torch.float32).contiguous()
    return Lowered(router=Router(placed, config["top_k"]), experts=experts)
