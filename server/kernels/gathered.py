"""The gathered low-rank product on a CPU: y_m += sum_k g_k B_km A_km x, each token with the terms of its own adapters;
and beside it what else adapters do (`server.kernels.changes`).

Nothing is copied or laid side by side: an adapter's row of a table says where its tensors lie, a step's table has the
rows of its adapters, and so a change of adapters costs a few microseconds. Linears that read the same input are one
call.

J groups of Linears that read the same input, K adapters active in the step, T tokens, R rank of a term, I in, O out.
Law: what the plain loop of `server.primitives.lowrank` gives, for any mixture.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from server.kernels.changes import Changes, ChangeTable
from server.kernels.native import LIBRARY, MEMBERS, TYPES

# As term_t, terms_t, run_t and pair_t in native.c.
TERM = np.dtype(
    [
        *((name, "u8") for name in ("A", "B")),
        *((name, "i8") for name in ("rank", "outputs", "member")),
        *((name, "i4") for name in ("A_type", "B_type")),
        ("scaling", "f4"),
        ("unused", "i4"),
    ]
)
TERMS = np.dtype([("terms", "u8"), ("count", "i8")])
RUN = np.dtype([("first", "i8"), ("count", "i8"), ("first_pair", "i8"), ("pairs", "i8")])
PAIR = np.dtype([("column", "i8"), ("gate", "f4"), ("unused", "i4")])

_POINTERS = [ctypes.c_void_p * members for members in range(MEMBERS + 1)]
_INTEGERS = [ctypes.c_int64 * members for members in range(MEMBERS + 1)]

Table = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter at one Linear, the `member`-th of those that read the same input. B_RO is stored row by row."""

    A_RI: Tensor
    B_RO: Tensor
    scaling: float
    member: int


@dataclass(frozen=True, slots=True)
class Row:
    """Where one adapter's terms lie, group by group: (J) of TERMS, and its changes. It keeps them alive."""

    groups: Table
    terms: Table
    held: tuple[Term, ...]
    changes: ChangeTable | None


class Runs:
    """Which tokens carry which adapters: neighbours with the same ones are one run."""

    def __init__(self, rows: Sequence[tuple[int, Sequence[tuple[int, float]]]]) -> None:
        """`rows` are (token count, [(column, gate), ...]) in the order of the tokens."""
        pairs = [pair for _, carried in rows for pair in carried]
        self.pairs = np.zeros(len(pairs), PAIR)
        self.runs = np.zeros(len(rows), RUN)
        if pairs:
            self.pairs["column"], self.pairs["gate"] = zip(*pairs, strict=True)
        counts = [count for count, _ in rows]
        carried = [len(own) for _, own in rows]
        self.runs["count"], self.runs["pairs"] = counts, carried
        self.runs["first"], self.runs["first_pair"] = np.cumsum(counts) - counts, np.cumsum(carried) - carried

    @cached_property
    def places(self) -> tuple[int, int, int]:
        """Where the runs lie, how many they are, and where the pairs lie."""
        return self.runs.ctypes.data, len(self.runs), self.pairs.ctypes.data

    @property
    def tokens(self) -> int:
        return int(self.runs["count"].sum())

    def at(self, tokens: Sequence[int]) -> Runs:
        """The same for some of the tokens, each by itself."""
        of_token = np.repeat(np.arange(len(self.runs)), self.runs["count"])
        picked = Runs(())
        picked.pairs, picked.runs = self.pairs, self.runs[of_token[list(tokens)]].copy()
        picked.runs["first"], picked.runs["count"] = np.arange(len(tokens)), 1
        return picked


def tabulate(groups: Sequence[Sequence[Term]], changes: ChangeTable | None = None) -> Row:
    """The row of an adapter with these terms in each group, and with these changes."""
    held = tuple(term for group in groups for term in group)
    assert all(term.A_RI.is_contiguous() and term.B_RO.is_contiguous() for term in held)
    terms = np.zeros(len(held), TERM)
    for entry, term in zip(terms, held, strict=True):
        entry["A"], entry["B"] = term.A_RI.data_ptr(), term.B_RO.data_ptr()
        entry["rank"], entry["outputs"] = term.B_RO.shape
        entry["A_type"], entry["B_type"] = TYPES[term.A_RI.dtype], TYPES[term.B_RO.dtype]
        entry["scaling"], entry["member"] = term.scaling, term.member
    rows = np.zeros(len(groups), TERMS)
    rows["count"] = counts = [len(group) for group in groups]
    rows["terms"] = terms.ctypes.data + (np.cumsum(counts) - counts) * TERM.itemsize
    return Row(rows, terms, held, changes)


class Gathered:
    """The terms of the step's adapters; one row for each column of the gates, None where it has none."""

    def __init__(self, rows: Sequence[Row | None]) -> None:
        self._rows = rows
        groups = max((len(row.groups) for row in rows if row is not None), default=0)
        self._table = np.zeros((groups, len(rows)), TERMS)
        for column, row in enumerate(rows):
            if row is not None:
                self._table[:, column] = row.groups
        self._used = [bool(row.any()) for row in self._table["count"]]
        self._stride = len(rows) * TERMS.itemsize
        self._start = self._table.ctypes.data
        tables = [None if row is None else row.changes for row in rows]
        self.changes = Changes(tables) if any(table is not None for table in tables) else None

    @property
    def places(self) -> tuple[int, int, int]:
        """Where its table lies, and how many groups and columns it has."""
        return self._start, *self._table.shape

    def acts(self, group: int) -> bool:
        """Whether any of the adapters has a term in this group."""
        return group < len(self._used) and self._used[group]

    def add(self, group: int, x_TI: Tensor, y_TO: Tensor, firsts: Sequence[int], runs: Runs) -> None:
        """In place, to the members' outputs, which are columns of y, each from its first on.

        x and y are of one dtype. Raises: MemoryError.
        """
        assert LIBRARY is not None
        members = len(firsts)
        places = _POINTERS[members](*(y_TO.data_ptr() + first * y_TO.element_size() for first in firsts))
        strides = _INTEGERS[members](*[y_TO.stride(0)] * members)
        x_TI = x_TI.contiguous()
        failed = LIBRARY.mg_lowrank(
            x_TI.data_ptr(),
            x_TI.stride(0),
            x_TI.shape[0],
            x_TI.shape[1],
            TYPES[x_TI.dtype],
            places,
            strides,
            members,
            *runs.places,
            self._start + group * self._stride,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory for the low-rank terms of {x_TI.shape[0]} tokens")
