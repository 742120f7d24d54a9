"""What the gathered low-rank kernels have to do in a step, as data in buffers of a fixed size.

T tokens of the step, S slots for adapters, N, U capacities for tokens and units.
Tokens that carry the same slots are put together into groups of at most `rows`; a unit is a group, one of its slots
and a tile of TILE of the slot's ranks, so that ranks are padded to a tile and never to the largest rank of the batch.
A group's units follow each other. Nothing here is of one Linear: the same plan serves all of them, and where an
adapter has a smaller rank or nothing, its units do nothing.
Gates and slots are data, not structure: a captured graph reads whatever mixture was filled in last.
Laws: every tile of every slot that a token carries is in exactly one unit of the token's group; a token that carries
nothing is in no group.
Source: the grouping by adapter is from Chen et al. 2023 (arXiv:2310.18547).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 16  # the smallest side of a product on tensor cores
NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class Plan:
    """The tokens in the order of their groups; groups as (first of its tokens, count, first of its units, end of its
    units); units as (group, slot, tile). On the host."""

    tokens: Tensor
    groups_4: Tensor
    units_3: Tensor


def plan_work(gates_TS: Tensor, tiles_S: Tensor, *, rows: int) -> Plan:
    """`tiles_S` counts the tiles of a slot's largest rank at any Linear, at least one: biases and scales have none."""
    carried_TS = gates_TS != 0
    tokens_n = carried_TS.any(1).nonzero().flatten()
    sets_CS, set_of_n = carried_TS[tokens_n].to(torch.uint8).unique(dim=0, return_inverse=True)
    counts_C = set_of_n.bincount(minlength=len(sets_CS))
    groups_C = (counts_C + rows - 1).div(rows, rounding_mode="floor")
    set_of_G, place_G = _spread(groups_C)
    pair_set_P, pair_slot_P = sets_CS.nonzero(as_tuple=True)
    pair_of_V, tile_V = _spread(tiles_S[pair_slot_P])  # V: the units of each set, once
    units_C = pair_set_P[pair_of_V].bincount(minlength=len(sets_CS))
    group_of_U, place_U = _spread(units_C[set_of_G])
    unit_U = _starts(units_C)[set_of_G[group_of_U]] + place_U
    first_unit_G = _starts(units_C[set_of_G])
    groups = [
        _starts(counts_C)[set_of_G] + place_G * rows,
        (counts_C[set_of_G] - place_G * rows).clamp(max=rows),
        first_unit_G,
        first_unit_G + units_C[set_of_G],
    ]
    return Plan(
        tokens_n[set_of_n.argsort(stable=True)],
        torch.stack(groups, 1),
        torch.stack([group_of_U, pair_slot_P[pair_of_V[unit_U]], tile_V[unit_U]], 1),
    )


class Work:
    """The plan on the device, as it is `now`. Filled before every step; its addresses never change."""

    def __init__(self, *, tokens: int, slots: int, units: int, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.units = units
        self._host = Buffers(tokens, slots, units, torch.device("cpu"), pinned=device.type == "cuda")
        self.now = Buffers(tokens, slots, units, device, pinned=False)
        self.fill(torch.zeros(0, slots), torch.ones(slots, dtype=torch.long))

    def fill(self, gates_TS: Tensor, tiles_S: Tensor) -> bool:
        """Take in a step's mixtures, given in the host's memory; False, and nothing changed, if they need more units.

        Whoever calls must have waited for the step before: its copy reads the same pinned memory.
        """
        plan = plan_work(gates_TS, tiles_S, rows=self.rows)
        if len(plan.units_3) > self.units:
            return False
        host = self._host
        assert len(gates_TS) <= len(host.gates_NS), "more tokens than the work was made for"
        host.gates_NS.zero_()
        host.gates_NS[: len(gates_TS)] = gates_TS
        host.tokens_N[: len(plan.tokens)] = plan.tokens
        host.groups_N4.zero_()
        host.groups_N4[: len(plan.groups_4)] = plan.groups_4
        host.units_U3.fill_(NO_SLOT)
        host.units_U3[: len(plan.units_3)] = plan.units_3
        self.now.ints.copy_(host.ints, non_blocking=True)
        self.now.gates_NS.copy_(host.gates_NS, non_blocking=True)
        return True


class Buffers:
    """Beside the plan's three, the gates (N, S) in fp32."""

    def __init__(self, tokens: int, slots: int, units: int, device: torch.device, *, pinned: bool) -> None:
        sizes = (tokens, 4 * tokens, 3 * units)
        self.ints = torch.zeros(sum(sizes), dtype=torch.int32, device=device, pin_memory=pinned)
        self.gates_NS = torch.zeros(tokens, slots, device=device, pin_memory=pinned)
        self.tokens_N, groups, work = self.ints.split(sizes)
        self.groups_N4, self.units_U3 = groups.view(-1, 4), work.view(-1, 3)


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


def _spread(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the things counted: whose it is, and the how manieth of them."""
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - _starts(counts)[owner]
