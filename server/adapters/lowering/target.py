"""What an adapter is lowered onto, and what comes out: the words that all families share.

V virtual tokens, E embedding size, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from server.errors import AdapterIncompatible
from server.primitives.prefix import LayerShape, Prefix
from server.primitives.route import Router
from server.primitives.site import SiteShape, SiteValue


@dataclass(frozen=True, slots=True)
class Target:
    """The base. `weight` gives a Linear's (O, I) weight by its name, in fp32, dequantised where it is quantised."""

    sites: Mapping[str, SiteShape]
    layers: tuple[LayerShape, ...]
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    max_rank: int
    max_virtual: int
    weight: Callable[[str], Tensor]
    decoder_layers: int = 0  # none where they could not be told apart

    def place(self, tensor: Tensor) -> Tensor:
        """On the device, in its dtype. An infinity here would reach every token of a batch: 0 * inf is no number."""
        placed = tensor.to(device=self.device, dtype=self.dtype).contiguous()
        if not placed.isfinite().all():
            largest = tensor.abs().max().item()
            raise AdapterIncompatible(f"a value of {largest:.2g} is no finite number in {self.dtype}")
        return placed


@dataclass(frozen=True, slots=True)
class Lowered:
    """Primitives, a soft prompt that the base must still turn into a prefix, or a router over other adapters."""

    sites: Mapping[str, SiteValue] = field(default_factory=dict)
    prefix: Prefix | None = None
    soft_prompt_VE: Tensor | None = None
    router: Router | None = None
    experts: tuple[str, ...] = ()  # of a router: references with whole digests


Lowering = Callable[[Mapping[str, Any], Mapping[str, Tensor], Target], Lowered]
