"""Linears whose adapters stand in slots: what a captured graph runs in place of the packed operands of a step.

The adapters' part comes between the base's product and the base's bias, where a Site has it. While no work is armed a
Linear computes as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from server.kernels.gpu.lowrank import Table, apply_gathered
from server.kernels.gpu.work import Work
from server.kernels.products import Product
from server.model.grafted import Joint


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
    """W x of a joint, and what the step's slots add to it."""

    product: Product
    table: Table
    armed: Armed

    @property
    def bytes(self) -> int:
        return self.product.bytes

    def __call__(self, x: Tensor) -> Tensor:
        y = self.product(x)
        if self.armed.work is not None:
            apply_gathered(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.armed.work, self.table)
        return y

    def weight(self) -> Tensor:
        return self.product.weight()


def slot_joints(joints: Sequence[Joint], tables: Sequence[Table]) -> Armed:
    """Give every joint its table of slots."""
    armed = Armed()
    for joint, table in zip(joints, tables, strict=True):
        joint.product = SlottedProduct(joint.product, table, armed)
    return armed
