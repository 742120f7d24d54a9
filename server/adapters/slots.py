"""The slots: adapters on a GPU where a captured graph finds them, by addresses that it reads when it runs.

An adapter is laid out once in pinned memory, factors with their features last, in the activations' dtype. To join, it
is copied in one piece on a stream of its own, while the step before still computes; the next step waits for the copy on
the device, and nobody waits on the host. It leaves when another needs its slot, the least recently used first.
Only low-rank terms, biases and output scales of Linears have a place here, which is what most kinds are lowered to; a
step with anything else is computed without a graph. Virtual tokens are rows of the cache and need none.
Law: a slot that was cleared is as if it had never been filled.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from server.kernels.gpu.lowrank import ALIGNMENT, Entries, Table, Terms
from server.kernels.gpu.work import TILE
from server.primitives.graft import Graft
from server.primitives.site import SiteValue

HELD = frozenset({"lowrank", "bias", "scale_out"})


@dataclass(frozen=True, slots=True)
class Staged:
    """One adapter in one piece. `terms` are views of it, by the Linear's number."""

    flat: Tensor
    terms: Mapping[int, Terms]

    @property
    def tiles(self) -> int:
        ranks = [0 if own.A_RI is None else own.A_RI.shape[0] for own in self.terms.values()]
        return max(1, -(-max(ranks) // TILE))

    def at(self, flat: Tensor) -> Staged:
        """The same layout over a copy of `flat`."""

        def moved(view: Tensor | None) -> Tensor | None:
            if view is None:
                return None
            first = view.storage_offset()
            return flat[first : first + view.numel()].view(view.shape)

        return Staged(
            flat,
            {
                linear: replace(
                    own,
                    A_RI=moved(own.A_RI),
                    B_RO=moved(own.B_RO),
                    bias_O=moved(own.bias_O),
                    excess_O=moved(own.excess_O),
                )
                for linear, own in self.terms.items()
            },
        )


class Slots:
    def __init__(
        self,
        groups: Sequence[Mapping[str, tuple[int, int]]],
        *,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`groups` of Linears that read the same input: (first, width) of each one's columns in their common output."""
        self._numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
        self._dtype, self._device = dtype, device
        self._entries = Entries(len(self._numbers), slots, device)
        self.tables = [
            Table(self._entries, self._numbers[next(iter(group))], tuple(group.values())) for group in groups
        ]
        self.tiles_S = torch.ones(slots, dtype=torch.long)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staged: WeakKeyDictionary[Graft, Staged] = WeakKeyDictionary()
        self._resident: dict[str, tuple[int, Staged]] = {}  # by the graft's key, the least recently used first

    @property
    def size(self) -> int:
        return len(self.tiles_S)

    def activate(self, grafts: Sequence[Graft]) -> Mapping[str, int] | None:
        """The slot of every given graft that changes anything, by its key; None where they have no place here.

        Call it on the stream that computes: it will wait for what is being copied.
        """
        wanted = {graft.key: graft for graft in grafts if graft.sites}
        if len(wanted) > self.size or not all(has_place(graft, self._numbers) for graft in wanted.values()):
            return None
        for key in wanted.keys() & self._resident.keys():
            self._resident[key] = self._resident.pop(key)
        joining = [graft for key, graft in wanted.items() if key not in self._resident]
        for graft in joining:
            self._join(graft, wanted)
        if joining and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return {key: self._resident[key][0] for key in wanted}

    def stage(self, graft: Graft) -> Staged:
        """Lay it out in the host's memory; whoever loads adapters beside the loop may do so ahead of the first step."""
        staged = self._staged.get(graft)
        if staged is None:
            parts = {self._numbers[name]: _parts(value) for name, value in graft.sites.items()}
            staged = self._staged[graft] = _lay_out(parts, self._dtype, pinned=self._stream is not None)
        return staged

    def _join(self, graft: Graft, wanted: Mapping[str, Graft]) -> None:
        slot = len(self._resident)
        if slot == self.size:
            leaving = next(key for key in self._resident if key not in wanted)
            slot, _ = self._resident.pop(leaving)
            self._entries.clear(slot)
        staged = self.stage(graft)
        there = staged.at(self._copied(staged.flat))
        self._entries.put(slot, there.terms)
        self.tiles_S[slot] = there.tiles
        self._resident[graft.key] = slot, there

    def _copied(self, flat: Tensor) -> Tensor:
        if self._stream is None:
            return flat.clone()
        with torch.cuda.stream(self._stream):
            copy = flat.to(self._device, non_blocking=True)
        # Memory of one stream that another reads: freed while a step still runs, it must not be given away before.
        copy.record_stream(torch.cuda.current_stream(self._device))
        return copy


def has_place(graft: Graft, linears: Container[str]) -> bool:
    """Whether all that it does is done at these Linears, and has a place in a slot."""
    return all(
        name in linears and all(part.name in HELD or getattr(value, part.name) is None for part in fields(SiteValue))
        for name, value in graft.sites.items()
    )


def _parts(value: SiteValue) -> Terms:
    low = value.lowrank
    return Terms(
        None if low is None else low.A_RI,
        None if low is None else low.B_OR.t(),
        None if value.bias is None else value.bias.bias_O,
        None if value.scale_out is None else value.scale_out.excess_F,
        1.0 if low is None else low.scaling,
    )


def _lay_out(parts: Mapping[int, Terms], dtype: torch.dtype, *, pinned: bool) -> Staged:
    step = ALIGNMENT // dtype.itemsize
    size = 0
    places: dict[int, dict[str, int]] = {}
    for linear, own in parts.items():
        places[linear] = {}
        for name, tensor in _tensors(own).items():
            places[linear][name] = size
            size += -(-tensor.numel() // step) * step
    flat = torch.zeros(size, dtype=dtype, pin_memory=pinned)
    terms = {}
    for linear, own in parts.items():
        views = {}
        for name, tensor in _tensors(own).items():
            first = places[linear][name]
            views[name] = flat[first : first + tensor.numel()].view(tensor.shape)
            views[name].copy_(tensor)
        terms[linear] = Terms(
            views.get("A_RI"), views.get("B_RO"), views.get("bias_O"), views.get("excess_O"), own.scaling
        )
    return Staged(flat, terms)


def _tensors(own: Terms) -> dict[str, Tensor]:
    named = {"A_RI": own.A_RI, "B_RO": own.B_RO, "bias_O": own.bias_O, "excess_O": own.excess_O}
    return {name: tensor for name, tensor in named.items() if tensor is not None}
