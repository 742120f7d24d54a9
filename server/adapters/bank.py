"""The bank: which grafts the step in hand uses, laid side by side for the Sites.

Where the native kernels run, what they know stays where it is (`server.kernels.gathered`). What else there is is
packed: its tensors are copied once, when the set of active grafts changes, and not in every step. A graft that no
sequence uses any more stays packed until it would double the work, since its gates are zero and it may come back.
Law: a graft that was dropped leaves no trace: the operands equal those of a bank that never held it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from server.adapters.expert_bank import ExpertBank
from server.kernels.changes import Change, SiteChange, tabulate_changes
from server.kernels.gathered import Gathered, Row, Term, tabulate
from server.primitives.bias import Bias
from server.primitives.graft import Graft
from server.primitives.rotate import Rotate
from server.primitives.scale import Scale
from server.primitives.site import SiteOperand, SiteValue, pack_site

CHANGED = ("scale_in", "scale_out", "bias", "rotate_in", "rotate_out", "gain")


class _Split(NamedTuple):
    """What of a graft stays where it is, and everything else."""

    row: Row | None
    rest: Mapping[str, SiteValue]


class Bank:
    def __init__(
        self,
        dtype: torch.dtype | None = None,
        groups: Sequence[Sequence[str]] = (),
        numbers: Mapping[str, int] | None = None,
    ) -> None:
        """`dtype` is that of the activations; None: the grafts have it.

        `groups` are the names of Linears whose low-rank terms stay where they are, those that read the same input
        together; `numbers` are those of the Linears and norms where all else does that the kernels know. None where the
        kernels do not run (`server.kernels.native.serves`).
        """
        self._dtype = dtype
        self._grafts: dict[str, Graft] = {}
        self._splits: WeakKeyDictionary[Graft, _Split] = WeakKeyDictionary()
        self._groups = groups
        self._numbers = numbers or {}
        self._place = {name: (index, place) for index, group in enumerate(groups) for place, name in enumerate(group)}
        self.operands: Mapping[str, SiteOperand] = {}
        self.gathered: Gathered | None = None
        self.experts = ExpertBank(dtype)

    @property
    def size(self) -> int:
        """Columns of the gates."""
        return len(self._grafts)

    def activate(self, grafts: Sequence[Graft]) -> Mapping[str, int]:
        """Make every given graft part of what is packed; returns the column of each, by its key."""
        wanted = {graft.key: graft for graft in grafts if graft.sites}
        if not wanted.keys() <= self._grafts.keys() or len(self._grafts) > 2 * len(wanted):
            self._grafts = wanted
            splits = [self._split(graft) for graft in wanted.values()]
            self.operands = _pack([split.rest for split in splits], self._dtype)
            rows = [split.row for split in splits]
            self.gathered = Gathered(rows) if any(row is not None for row in rows) else None
        return {key: column for column, key in enumerate(self._grafts)}

    def _split(self, graft: Graft) -> _Split:
        found = self._splits.get(graft)
        if found is None:
            found = self._splits[graft] = self._make_split(graft)
        return found

    def _make_split(self, graft: Graft) -> _Split:
        terms: list[list[Term]] = [[] for _ in self._groups]
        changes: dict[int, SiteChange] = {}
        rest = {}
        for name, value in graft.sites.items():
            if name in self._place and value.lowrank is not None:
                group, member = self._place[name]
                low = value.lowrank
                terms[group].append(Term(low.A_RI.contiguous(), low.B_OR.t().contiguous(), low.scaling, member))
                value = replace(value, lowrank=None)
            change = _at_linear(value) if name in self._place else _at_norm(value)
            if name in self._numbers and change is not None:
                changes[self._numbers[name]] = change
                value = replace(value, **dict.fromkeys(CHANGED))
            if any(getattr(value, part.name) is not None for part in fields(value)):
                rest[name] = value
        table = tabulate_changes(changes, len(self._numbers)) if changes else None
        return _Split(tabulate(terms, table) if any(terms) or table is not None else None, rest)


def _at_linear(value: SiteValue) -> SiteChange | None:
    if all(getattr(value, name) is None for name in CHANGED):
        return None
    return SiteChange(
        _one_side(value.scale_in, None, value.rotate_in), _one_side(value.scale_out, value.bias, value.rotate_out)
    )


def _at_norm(value: SiteValue) -> SiteChange | None:
    """None where it has a bias, which the kernels do not know."""
    return None if value.gain is None or value.bias is not None else SiteChange(gain_F=value.gain.weight_F)


def _one_side(scale: Scale | None, bias: Bias | None, rotate: Rotate | None) -> Change:
    return Change(
        None if scale is None else scale.excess_F,
        None if bias is None else bias.bias_O,
        None if rotate is None else rotate.excess_BSS.transpose(1, 2).contiguous(),
        1 if rotate is None else rotate.stride,
    )


def _pack(sites: Sequence[Mapping[str, SiteValue]], dtype: torch.dtype | None) -> dict[str, SiteOperand]:
    by_site: dict[str, list[tuple[int, SiteValue]]] = {}
    for column, own in enumerate(sites):
        for name, value in own.items():
            by_site.setdefault(name, []).append((column, value))
    return {name: pack_site(values, dtype) for name, values in by_site.items()}
