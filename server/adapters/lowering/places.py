"""What the families that edit the residual stream have in common: tensors by layer and part, the places of the base.

What the hub has validated is not trusted: every tensor must be there, fit, and be used, and every place must have been
found in this base. Tensor names are `layers.<number>.<part>`, the same on every architecture: decision 17.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import expect
from server.adapters.lowering.target import Target
from server.errors import AdapterIncompatible
from server.primitives.edit import ACTIVATIONS, IDENTITY, Edit, Part, place

_ALIASES = {"swish": "silu", "none": IDENTITY}


@dataclass(frozen=True, slots=True)
class FoundAt:
    """The tensors of one bottleneck, taken out one by one; `where` begins their names."""

    where: str
    tensors: dict[str, Tensor]
    target: Target

    @property
    def hidden(self) -> int:
        return self.target.hidden_size

    def take(self, part: str, *shape: int) -> Tensor:
        """In fp32. Raises: AdapterIncompatible when it is missing or of another shape."""
        tensor = self.tensors.pop(f"{self.where}.{part}", None)
        if tensor is None:
            raise AdapterIncompatible(f"{self.where} lacks {part}")
        expect(self.where, part, tensor, shape)
        return tensor.float()

    def check_width(self, width: int) -> int:
        """Before anything of that size is made. Raises: AdapterIncompatible."""
        if width > self.target.max_rank:
            raise AdapterIncompatible(f"width {width} of {self.where} is above max_rank {self.target.max_rank}")
        return width


def layers_of(config: Mapping[str, Any], target: Target) -> Sequence[int]:
    """The layers that the config means. Raises: AdapterIncompatible for one that the base does not have."""
    layers = config.get("layers")
    if layers is None:
        return range(len(target.layers))
    strange = [layer for layer in layers if layer not in range(len(target.layers))]
    if strange:
        raise AdapterIncompatible(f"layers has {strange[0]}, the base has {len(target.layers)} layers")
    return sorted(set(layers))


def found_place(target: Target, layer: int, sublayer: str, reads: str) -> str:
    """The name of the place. Raises: AdapterIncompatible where this base was not seen to have it."""
    name = place(layer, sublayer, reads)
    if name not in target.places:
        raise AdapterIncompatible(f"{name} was not found in this base: its layers do not add {sublayer} as it is")
    return name


def activation_of(name: str | None) -> str:
    """The primitive's name of a config's non_linearity. Raises: AdapterIncompatible."""
    found = IDENTITY if name is None else _ALIASES.get(name, name)
    if found not in ACTIVATIONS:
        raise AdapterIncompatible(f"non_linearity {name} is not served")
    return found


def check_used(tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        names = sorted(tensors)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise AdapterIncompatible(f"tensor {names[0][:100]}{more} is ruled out by the config")


def placed(edit: Edit, target: Target) -> Edit:
    """On the device, in its dtype."""
    parts = [
        Part(target.place(part.D_bH), target.place(part.d_b), target.place(part.U_Hb), part.activation, part.normed)
        for part in edit.parts
    ]
    return Edit(tuple(parts), None if edit.c_H is None else target.place(edit.c_H))
