"""What the kinds that edit the residual stream have in common: which layers, which activation.

Tensors are named `layers.<number>.<part>`, the same on every architecture. Format: decision 17.
"""

from __future__ import annotations

from typing import Any

from hub import fields
from hub.base import Base
from hub.families.method import Complaint, Config, Field
from hub.ref import printable

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "swish", "tanh", "leakyrelu", "none", "identity")
NON_LINEARITY = Field(fields.one_of(*ACTIVATIONS))
MAX_LAYERS = 4096


def _layers(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(type(item) is int and item >= 0 for item in value):
        return f"must be a list of layer numbers or null, not {fields.shown(value)}"
    return f"{len(value)} layers are above the limit of {MAX_LAYERS}" if len(value) > MAX_LAYERS else None


LAYERS = Field(_layers, shapes_tensors=True)


def meant_layers(config: Config, base: Base) -> tuple[list[int], list[Complaint]]:
    """The layers of this base that the config means, and those that it does not have."""
    meant = config.get("layers")
    if meant is None:
        return list(range(base.layers)), []
    return sorted({layer for layer in meant if layer < base.layers}), beyond("layers", meant, base)


def beyond(key: str, layers: list[int], base: Base) -> list[Complaint]:
    strange = [layer for layer in layers if layer >= base.layers]
    if not strange:
        return []
    return [(key, f"has layer {strange[0]}, but base {printable(base.name)} has {base.layers} layers")]
