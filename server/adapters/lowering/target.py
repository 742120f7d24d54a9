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
from server.primitives.experts import ParameterShape
from server.primitives.graft import Graft
from server.primitives.lowrank import LowRank
from server.primitives.prefix import LayerShape, Prefix
from server.primitives.route import Router
from server.primitives.site import EmbeddingShape, NormShape, SiteShape, SiteValue


@dataclass(frozen=True, slots=True)
class Target:
    """The base. `weight` gives a Linear's (O, I) weight by its name, in fp32, dequantised where it is quantised.

    `max_delta_error` is how far, of its norm, a change of full rank may be from the low-rank one that is served.
    `sites` are its Linears, the output head among them. Norms and an embedding that the base does not compute as its
    adapters need are missing here.
    `places` are those on the residual stream that this base was seen to have.
    `parameters` are the weights of routers and experts by their full names, those of one module in its own order.
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
    parameters: Mapping[str, ParameterShape] = field(default_factory=dict)
    max_delta_error: float = 0.0
    decoder_layers: tuple[str, ...] = ()  # module names; none where they could not be told apart

    def place(self, tensor: Tensor) -> Tensor:
        """On the device, in its dtype. An infinity here would reach every token of a batch: 0 * inf is no number.

        In memory of its own: a part of a file would keep all of it.
        """
        placed = tensor.to(device=self.device, dtype=self.dtype).contiguous()
        if placed.untyped_storage().nbytes() > placed.nbytes:
            placed = placed.clone()
        if not placed.isfinite().all():
            largest = tensor.abs().max().item()
            raise AdapterIncompatible(f"a value of {largest:.2g} is no finite number in {self.dtype}")
        return placed

    def place_stored(self, A_RI: Tensor, B_OR: Tensor, scaling: float = 1.0) -> LowRank:
        """A term of the file as it is stored there, on the device; in the base's dtype where that cannot hold it.

        That such a term is finite is seen for all of a file at once: `server.adapters.lowering.stored`.
        """
        if self._holds(A_RI.dtype) and self._holds(B_OR.dtype):
            A_RI, B_OR = (tensor.to(self.device).contiguous() for tensor in (A_RI, B_OR))
            return LowRank(A_RI, B_OR, scaling)
        return LowRank(self.place(A_RI), self.place(B_OR.float() * scaling))

    def _holds(self, dtype: torch.dtype) -> bool:
        """Whether every number of a dtype is one of the base's."""
        return dtype == self.dtype or (self.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16))

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

    `approximation` is the largest error, at any Linear, of a kind that is not served exactly.
    `sites` holds edits by their place. `beside` are parts of the same adapter that work at other tokens. A `router`
    does nothing itself; `experts` are the adapters that it routes among, as references with whole digests.
    """

    sites: Mapping[str, SiteValue] = field(default_factory=dict)
    prefix: Prefix | None = None
    soft_prompt_VE: Tensor | None = None
    reach: Reach = EVERYWHERE
    beside: tuple[Lowered, ...] = ()
    approximation: float | None = None
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
