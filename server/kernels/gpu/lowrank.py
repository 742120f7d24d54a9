"""The gathered low-rank product, in place: y = y * (1 + sum_k g_k e_k) + sum_k g_k (a_k B_k A_k x + b_k).

T tokens of the step, I in, O out, R rank of one adapter, S slots, H siblings (Linears that read the same x, whose
outputs are columns of the same y), G groups, U units of the work list (`server.kernels.gpu.work`), C parts into which
I is cut.
`_shrink` makes A x for one unit, in C partial sums; `_expand` takes a group's units one after the other, adds the
partial sums in their order, applies the gates, multiplies by B, adds the bias, multiplies y by the scale and writes
once. There are no atomics, and how sums are cut depends on the Linear's shape alone.
An adapter is found through a table of addresses, not in a slab of slots: nothing is padded to the largest rank, an
adapter is copied once and never packed, and any set of adapters is the same captured graph. It costs one dependent
load per program. Both factors have their features last (A as (R, I), B as (R, O)), so that loads are contiguous for
any rank.
Laws: a token whose gates are zero is not written; an overflow in one adapter stays with the tokens that carry it; a
row of a product never meets another row, so neighbours change nothing.
Source: shrink and expand: Chen et al. 2023 (arXiv:2310.18547).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gpu.operand import operand_of
from server.kernels.gpu.work import NO_SLOT, TILE, Work

ALIGNMENT = 16  # bytes: what the kernels assume of every address in a table
BLOCK_I = 128
BLOCK_O = 128
MOST_PARTS = 8
_NO_SLOT = tl.constexpr(NO_SLOT)
_ALIGNMENT = tl.constexpr(ALIGNMENT)


@dataclass(frozen=True, slots=True)
class Terms:
    """What one adapter does at one Linear, features last and contiguous; `scaling` is of B A alone."""

    A_RI: Tensor | None = None
    B_RO: Tensor | None = None
    bias_O: Tensor | None = None
    excess_O: Tensor | None = None  # a scale minus one
    scaling: float = 1.0


class Entries:
    """Where the adapters' tensors are, for H Linears in S slots. An address of zero is nothing.

    A slot is written between steps, all its Linears at once; a graph reads it when it runs. Whoever frees a tensor
    clears its slot first.
    """

    def __init__(self, linears: int, slots: int, device: torch.device) -> None:
        self.addresses_4SH = torch.zeros(4, slots, linears, dtype=torch.int64, device=device)
        self.ranks_SH = torch.zeros(slots, linears, dtype=torch.int32, device=device)
        self.scalings_SH = torch.zeros(slots, linears, device=device)

    def put(self, slot: int, terms: Mapping[int, Terms]) -> None:
        """What stands in the slot from now on, by the Linear's number; whoever calls keeps the tensors alive."""
        addresses_4H = torch.zeros(4, self.ranks_SH.shape[1], dtype=torch.int64)
        ranks_H = torch.zeros(self.ranks_SH.shape[1], dtype=torch.int32)
        scalings_H = torch.zeros(self.ranks_SH.shape[1])
        for linear, own in terms.items():
            tensors = (own.A_RI, own.B_RO, own.bias_O, own.excess_O)
            for tensor in tensors:
                assert tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0), "misaligned"
            addresses_4H[:, linear] = torch.tensor([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
            ranks_H[linear] = 0 if own.A_RI is None else own.A_RI.shape[0]
            scalings_H[linear] = own.scaling
        self.addresses_4SH[:, slot] = addresses_4H.to(self.addresses_4SH.device)
        self.ranks_SH[slot] = ranks_H.to(self.ranks_SH.device)
        self.scalings_SH[slot] = scalings_H.to(self.scalings_SH.device)

    def clear(self, slot: int) -> None:
        self.addresses_4SH[:, slot] = 0
        self.ranks_SH[slot] = 0


class Table:
    """The entries of siblings: Linears that follow each other there, read one x and write columns of one y."""

    def __init__(self, entries: Entries, first: int, columns: Sequence[tuple[int, int]]) -> None:
        """`first` is the first Linear's number; `columns` has (first, width) in y of every sibling."""
        device = entries.ranks_SH.device
        self.siblings = len(columns)
        self.widest = max(width for _, width in columns)
        self.multiple = math.gcd(ALIGNMENT, *(number for pair in columns for number in pair))
        self.columns_H2 = torch.tensor(columns, dtype=torch.int32, device=device)
        self.slots, self.linears = entries.ranks_SH.shape  # rows of an entry, and from one row to the next
        own = slice(first, first + len(columns))
        self.a_SH, self.b_SH, self.bias_SH, self.excess_SH = entries.addresses_4SH[..., own]
        self.ranks_SH, self.scalings_SH = entries.ranks_SH[:, own], entries.scalings_SH[:, own]


def parts(features: int) -> int:
    """Into how many sums I is cut: enough programs for a GPU when few tokens decode."""
    return min(MOST_PARTS, triton.cdiv(features, 4 * BLOCK_I))


def apply_gathered(y_TO: Tensor, x_TI: Tensor, work: Work, table: Table) -> Tensor:
    """y, changed in place. Everything has the dtype of y, gates apart."""
    assert x_TI.stride(1) == y_TO.stride(1) == 1 and x_TI.dtype == y_TO.dtype
    now, features = work.now, x_TI.shape[1]
    cuts = parts(features)
    shape = (table.siblings, cuts, work.units, work.rows, TILE)
    middle = torch.empty(shape, dtype=torch.float32, device=x_TI.device)
    operand = operand_of(x_TI.dtype)
    _shrink[(work.units, cuts, table.siblings)](
        x_TI,
        now.tokens_N,
        now.groups_N4,
        now.units_U3,
        table.a_SH,
        table.ranks_SH,
        middle,
        x_TI.stride(0),
        features,
        table.linears,
        work.units,
        ROWS=work.rows,
        TILE=TILE,
        BLOCK=BLOCK_I,
        PARTS=cuts,
        OPERAND=operand,
    )
    _expand[(len(now.groups_N4), triton.cdiv(table.widest, BLOCK_O), table.siblings)](
        y_TO,
        now.tokens_N,
        now.groups_N4,
        now.units_U3,
        now.gates_NS,
        table.b_SH,
        table.bias_SH,
        table.excess_SH,
        table.ranks_SH,
        table.scalings_SH,
        table.columns_H2,
        middle,
        y_TO.stride(0),
        table.slots,
        table.linears,
        work.units,
        ROWS=work.rows,
        TILE=TILE,
        BLOCK=BLOCK_O,
        PARTS=cuts,
        MULTIPLE=table.multiple,
        OPERAND=operand,
    )
    return y_TO


def apply_gathered_loop(
    y_TO: Tensor,
    x_TI: Tensor,
    gates_TS: Tensor,
    columns: Sequence[tuple[int, int]],
    terms_HS: Sequence[Sequence[Terms]],
) -> Tensor:
    """The same, token by token, sibling by sibling and slot by slot: what tests compare `apply_gathered` with."""
    y_TO = y_TO.clone()
    for token in range(len(y_TO)):
        for (first, width), terms_S in zip(columns, terms_HS, strict=True):
            own = y_TO[token, first : first + width]
            factor, added = torch.ones(width), torch.zeros(width)
            for gate, terms in zip(gates_TS[token].tolist(), terms_S, strict=True):
                if gate == 0:
                    continue
                if terms.A_RI is not None and terms.B_RO is not None:
                    added += gate * terms.scaling * (terms.A_RI.float() @ x_TI[token].float()) @ terms.B_RO.float()
                if terms.bias_O is not None:
                    added += gate * terms.bias_O.float()
                if terms.excess_O is not None:
                    factor += gate * terms.excess_O.float()
            y_TO[token, first : first + width] = (own.float() * factor + added).to(y_TO.dtype)
    return y_TO


@triton.jit
def _shrink(
    x_ptr,
    tokens_ptr,
    groups_ptr,
    units_ptr,
    a_ptr,
    ranks_ptr,
    middle_ptr,
    x_stride,
    features,
    linears,
    units,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One unit, one part of I, one sibling."""
    unit, part, sibling = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(units_ptr + unit * 3 + 1)
    if slot == _NO_SLOT:
        return
    rank = tl.load(ranks_ptr + slot * linears + sibling)
    rank_of = tl.load(units_ptr + unit * 3 + 2) * TILE + tl.arange(0, TILE)
    if tl.load(units_ptr + unit * 3 + 2) * TILE >= rank:
        return
    group = tl.load(units_ptr + unit * 3)
    row = tl.arange(0, ROWS)
    live = row < tl.load(groups_ptr + group * 4 + 1)
    token = tl.load(tokens_ptr + tl.load(groups_ptr + group * 4) + row, mask=live, other=0)
    a = tl.load(a_ptr + slot * linears + sibling).to(tl.pointer_type(x_ptr.dtype.element_ty))
    a = tl.multiple_of(a, _ALIGNMENT)
    total = tl.zeros([ROWS, TILE], dtype=tl.float32)
    for start in range(part * BLOCK, features, PARTS * BLOCK):
        feature = start + tl.arange(0, BLOCK)
        inside = feature < features
        x = tl.load(
            x_ptr + token[:, None] * x_stride + feature[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        a_tile = tl.load(
            a + rank_of[None, :] * features + feature[:, None],
            mask=(rank_of < rank)[None, :] & inside[:, None],
            other=0.0,
        )
        total = tl.dot(x.to(OPERAND), a_tile.to(OPERAND), total, input_precision="ieee")
    base = middle_ptr + ((sibling * PARTS + part) * units + unit) * ROWS * TILE
    tl.store(base + row[:, None] * TILE + tl.arange(0, TILE)[None, :], total)


@triton.jit
def _expand(
    y_ptr,
    tokens_ptr,
    groups_ptr,
    units_ptr,
    gates_ptr,
    b_ptr,
    bias_ptr,
    excess_ptr,
    ranks_ptr,
    scalings_ptr,
    columns_ptr,
    middle_ptr,
    y_stride,
    slots,
    linears,
    units,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    MULTIPLE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One group, one block of O, one sibling."""
    group, block, sibling = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(groups_ptr + group * 4 + 1)
    width = tl.multiple_of(tl.load(columns_ptr + sibling * 2 + 1), MULTIPLE)
    first = tl.multiple_of(tl.load(columns_ptr + sibling * 2), MULTIPLE)
    if (count == 0) | (block * BLOCK >= width):
        return
    row = tl.arange(0, ROWS)
    live = row < count
    token = tl.load(tokens_ptr + tl.load(groups_ptr + group * 4) + row, mask=live, other=0)
    feature = block * BLOCK + tl.arange(0, BLOCK)
    inside = feature < width
    within = tl.arange(0, TILE)
    element = y_ptr.dtype.element_ty
    added = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    factor = tl.full([ROWS, BLOCK], 1.0, dtype=tl.float32)
    touched = row < 0
    for unit in range(tl.load(groups_ptr + group * 4 + 2), tl.load(groups_ptr + group * 4 + 3)):
        slot = tl.load(units_ptr + unit * 3 + 1)
        tile = tl.load(units_ptr + unit * 3 + 2)
        entry = slot * linears + sibling
        gate = tl.load(gates_ptr + token * slots + slot, mask=live, other=0.0)
        carries = gate != 0
        rank = tl.load(ranks_ptr + entry)
        if tile * TILE < rank:
            middle = tl.zeros([ROWS, TILE], dtype=tl.float32)
            for part in range(PARTS):
                base = middle_ptr + ((sibling * PARTS + part) * units + unit) * ROWS * TILE
                middle += tl.load(base + row[:, None] * TILE + within[None, :])
            # Not a bare product: 0 * inf.
            middle = tl.where(carries[:, None], middle * (gate * tl.load(scalings_ptr + entry))[:, None], 0.0)
            b = tl.load(b_ptr + entry).to(tl.pointer_type(element))
            b = tl.multiple_of(b, _ALIGNMENT)
            rank_of = tile * TILE + within
            b_tile = tl.load(
                b + rank_of[:, None] * width + feature[None, :],
                mask=(rank_of < rank)[:, None] & inside[None, :],
                other=0.0,
            )
            added = tl.dot(middle.to(element).to(OPERAND), b_tile.to(OPERAND), added, input_precision="ieee")
            touched = touched | carries
        if tile == 0:
            bias_address = tl.load(bias_ptr + entry)
            if bias_address != 0:
                bias_at = tl.multiple_of(bias_address.to(tl.pointer_type(element)), _ALIGNMENT)
                bias = tl.load(bias_at + feature, mask=inside, other=0.0)
                added += tl.where(carries[:, None], gate[:, None] * bias.to(tl.float32)[None, :], 0.0)
                touched = touched | carries
            excess_address = tl.load(excess_ptr + entry)
            if excess_address != 0:
                excess_at = tl.multiple_of(excess_address.to(tl.pointer_type(element)), _ALIGNMENT)
                excess = tl.load(excess_at + feature, mask=inside, other=0.0)
                factor += tl.where(carries[:, None], gate[:, None] * excess.to(tl.float32)[None, :], 0.0)
                touched = touched | carries
    place = y_ptr + token[:, None] * y_stride + first + feature[None, :]
    mask = (live & touched)[:, None] & inside[None, :]
    y = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, (y * factor + added).to(element), mask=mask)
