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
from server.primitives.graft import Graft
from server.primitives.prefix import LayerShape, Prefix
from server.primitives.route import Router
from server.primitives.site import EmbeddingShape, NormShape, SiteShape, SiteValue


@dataclass(frozen=True, slots=True)
class Target:
    """The base. `weight` gives a Linear's (O, I) weight by its name, in fp32, dequantised where it is quantised.

    `sites` are its Linears, the output head among them. Norms and an embedding that the base does not compute as its
    adapters need are missing here.
    `places` are those on the residual stream that this base was seen to have.
    """

    sites: Mapping[str, SiteShape]
    layers: tuple[LayerShape, ...]
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    max_rank: int
    max_virtual: int
    weight: Callable[[str], Tensor]
    norms: Mapping[str, NormShape] = field(default_factory=dict)
    embedding: EmbeddingShape | None = None
    places: frozenset[str] = frozenset()
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
            return Delta(self.place(delta.matrix_OI), delta.rows_N)
        if not delta.matrix_OI.values().isfinite().all():
            raise AdapterIncompatible("a value of a sparse delta is no finite number in torch.float32")
        return Delta(delta.matrix_OI.to(self.device), delta.rows_N)


@dataclass(frozen=True, slots=True)
class Lowered:
    """Primitives and the tokens at which they work, or a soft prompt that the base must still turn into a prefix.

    `sites` holds edits by their place. `beside` are parts of the same adapter that work at other tokens. A `router`
    does nothing itself; `experts` are the adapters that it routes among, as references with whole digests.
    """

    sites: Mapping[str, SiteValue] = field(default_factory=dict)
    prefix: Prefix | None = None
    soft_prompt_VE: Tensor | None = None
    reach: Reach = EVERYWHERE
    beside: tuple[Lowered, ...] = ()
    router: Router | None = None
    experts: tuple[str, ...] = ()

    def graft(self, digest: str, label: str, prefix: Prefix | None) -> Graft:
        """The adapter whole; `prefix` is its own, or what the base made of its soft prompt."""
        beside = tuple(
            Graft(digest, label, other.sites, reach=other.reach, part=f"#{index}")
            for index, other in enumerate(self.beside)
        )
        return Graft(
            digest,
            label,
            self.sites,
            prefix,
            self.soft_prompt_VE,
            self.reach,
            beside=beside,
            router=self.router,
            experts=tuple(expert.partition("@")[2] for expert in self.experts),
        )


Lowering = Callable[[Mapping[str, Any], Mapping[str, Tensor], Target], Lowered]
