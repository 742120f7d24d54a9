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
from server.policy.reach import EVERYWHERE, Reach
from server.primitives.delta import Delta
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
    decoder_layers: tuple[str, ...] = ()  # module names; none where they could not be told apart

    def place(self, tensor: Tensor) -> Tensor:
        """On the device, in its dtype. An infinity here would reach every token of a batch: 0 * inf is no number."""
        placed = tensor.to(device=self.device, dtype=self.dtype).contiguous()
        if not placed.isfinite().all():
            largest = tensor.abs().max().item()
            raise AdapterIncompatible(f"a value of {largest:.2g} is no finite number in {self.dtype}")
        return placed

    def place_delta(self, delta: Delta) -> Delta:
        """On the device: a dense one in its dtype, a sparse one in fp32."""
        if delta.matrix_OI.layout != torch.sparse_csr:
            return Delta(self.place(delta.matrix_OI))
        if not delta.matrix_OI.values().isfinite().all():
            raise AdapterIncompatible("a value of a sparse delta is no finite number in torch.float32")
        return Delta(delta.matrix_OI.to(self.device))


@dataclass(frozen=True, slots=True)
class Lowered:
    """Primitives and the tokens at which they work, a soft prompt that the base must still turn into a prefix, or a
    router over other adapters."""

    sites: Mapping[str, SiteValue] = field(default_factory=dict)
    prefix: Prefix | None = None
    soft_prompt_VE: Tensor | None = None
    reach: Reach = EVERYWHERE
    router: Router | None = None
    experts: tuple[str, ...] = ()  # of a router: references with whole digests


Lowering = Callable[[Mapping[str, Any], Mapping[str, Tensor], Target], Lowered]
