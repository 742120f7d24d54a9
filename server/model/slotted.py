"""Linears whose adapters stand in slots: what a captured graph runs in place of the packed operands of a step.

The adapters' part comes between the base's product and the base's bias, where a Site has it. While no work is armed a
Linear computes as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from server.kernels.gpu.lowrank import Table, apply_gathered
from server.kernels.gpu.work import Work
from server.model.network import Network


@dataclass(slots=True)
class Armed:
    """The work of the step in hand, read by every Linear."""

    work: Work | None = None

    @contextmanager
    def with_work(self, work: Work) -> Iterator[None]:
        self.work = work
        try:
            yield
        finally:
            self.work = None


@dataclass(frozen=True, slots=True)
class SlottedProduct:
    """W x, and what the step's slots add to it."""

    product: Callable[[Tensor], Tensor]
    table: Table
    armed: Armed

    def __call__(self, x: Tensor) -> Tensor:
        y = self.product(x)
        if self.armed.work is not None:
            apply_gathered(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.armed.work, self.table)
        return y


def slot_linears(network: Network, tables: Mapping[str, Table]) -> Armed:
    """Give every Linear its table of slots."""
    armed = Armed()
    for linear in network.linears():
        linear.product = SlottedProduct(linear.product, tables[linear.name], armed)
    return armed
