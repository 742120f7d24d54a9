"""The experts of the step in hand, laid side by side for the Sites, apart from the grafts of static mixtures.

As in the bank beside it, packing copies tensors once, when the set of experts or routers changes, not in every step.
Law: an expert that was dropped leaves no trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from server.primitives import route
from server.primitives.graft import Graft
from server.primitives.lowrank import LowRank
from server.primitives.route import ExpertOperand, GateSpace
from server.primitives.routed_experts import Expert, Route


class ExpertBank:
    """`dtype` is the activations'; None: that of the experts."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._experts: dict[str, Expert] = {}
        self._routers: dict[str, Graft] = {}
        self.operands: Mapping[str, ExpertOperand] = {}
        self.space: GateSpace | None = None
        self.columns: Mapping[str, int] = {}  # of each expert, by digest
        self.first_score: Mapping[str, int] = {}  # of each router in `space`, by digest

    @property
    def size(self) -> int:
        return len(self._experts)

    def activate(self, routes: Sequence[Route]) -> None:
        """Make every given route's experts and router part of what is packed."""
        wanted: dict[str, Expert] = {}
        for one in routes:
            for expert in one.experts:
                if expert.digest not in wanted or expert.prototypes is not None:
                    wanted[expert.digest] = expert
        routers = {one.router.digest: one.router for one in routes if one.router is not None}
        if not self._has(wanted) or len(self._experts) > 2 * len(wanted):
            self._experts = wanted
            self.columns = {digest: column for column, digest in enumerate(wanted)}
            self.operands = _pack(list(wanted.values()), self._dtype)
            self._lay_out(routers)
        elif not routers.keys() <= self._routers.keys():
            self._lay_out(routers)

    def _has(self, wanted: Mapping[str, Expert]) -> bool:
        held = self._experts
        return all(
            digest in held and (expert.prototypes is None or held[digest].prototypes is not None)
            for digest, expert in wanted.items()
        )

    def _lay_out(self, routers: Mapping[str, Graft]) -> None:
        """All rows of all routers; those of experts that nobody asked for are never allowed, so any column will do."""
        self._routers = dict(routers)
        self.first_score, self.space = {}, None
        weights, owners = [], list[int]()
        first_score = {}
        for digest, graft in routers.items():
            assert graft.router is not None, f"{graft.label} is no router"
            first_score[digest] = len(owners)
            weights.append(graft.router.weight_LEH)
            owners += [self.columns.get(expert, 0) for expert in graft.experts]
        if weights:
            self.first_score = first_score
            self.space = GateSpace(torch.cat(weights, dim=1), torch.tensor(owners, device=weights[0].device))


def _pack(experts: Sequence[Expert], dtype: torch.dtype | None) -> dict[str, ExpertOperand]:
    names = dict.fromkeys(name for expert in experts for name in expert.graft.sites)
    return {name: route.pack([_term(expert, name) for expert in experts], dtype) for name in names}


def _term(expert: Expert, name: str) -> tuple[LowRank, Tensor | None] | None:
    value = expert.graft.sites.get(name)
    if value is None or value.lowrank is None:
        return None
    return value.lowrank, None if expert.prototypes is None else expert.prototypes[name]
