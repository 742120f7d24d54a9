"""The bank: which grafts the step in hand uses, laid side by side for the Sites.

Packing copies the grafts' tensors once, when the set of active grafts changes, and not in every step. A graft that no
sequence uses any more stays packed until it would double the work, since its gates are zero and it may come back.
Law: a graft that was dropped leaves no trace: the operands equal those of a bank that never held it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from server.adapters.expert_bank import ExpertBank
from server.primitives.graft import Graft
from server.primitives.site import SiteOperand, SiteValue, pack_site


class Bank:
    """`dtype` is the activations'; None: that of the grafts."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._grafts: dict[str, Graft] = {}
        self.operands: Mapping[str, SiteOperand] = {}
        self.experts = ExpertBank(dtype)

    @property
    def size(self) -> int:
        """Columns of the gates."""
        return len(self._grafts)

    def activate(self, grafts: Sequence[Graft]) -> Mapping[str, int]:
        """Make every given graft part of `operands`; returns the column of each, by its key."""
        wanted = {graft.key: graft for graft in grafts if graft.sites}
        if not wanted.keys() <= self._grafts.keys() or len(self._grafts) > 2 * len(wanted):
            self._grafts = wanted
            self.operands = _pack(list(wanted.values()), self._dtype)
        return {key: column for column, key in enumerate(self._grafts)}


def _pack(grafts: Sequence[Graft], dtype: torch.dtype | None) -> dict[str, SiteOperand]:
    by_site: dict[str, list[tuple[int, SiteValue]]] = {}
    for column, graft in enumerate(grafts):
        for name, value in graft.sites.items():
            by_site.setdefault(name, []).append((column, value))
    return {name: pack_site(values, dtype) for name, values in by_site.items()}
