"""HRA: the base's weight times a chain of Householder reflections, W (I - 2 u_1 u_1') ... (I - 2 u_r u_r').

The chain is I - P U' with one column of P per reflection (its WY form), so the delta is -(W P) U', of rank r.
With Gram-Schmidt the u are made orthonormal first, and the reflections act beside each other.

r rank, I in, O out.
Source: Yuan et al. 2024 (arXiv:2405.17484); Bischof and Van Loan 1987; peft 0.21.2, tuners/hra/layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.linears import Change, Found, lower_linears
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible

DEPENDENT = 1e-6  # what is left of a unit vector: below it, fp32 training has left rounding and no direction


def lower_hra(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += -(W P) U' x, in fp64 until it is placed."""

    def change(found: Found) -> Change:
        rank = found.check_rank(int(config["r"]))
        U_Ir = found.take("hra_u", found.inputs, rank).double()
        U_Ir = U_Ir / U_Ir.norm(dim=0)
        if config.get("apply_GS"):
            U_Ir = _orthonormal(U_Ir, found.module)
            P_Ir = 2 * U_Ir
        else:
            P_Ir = _chain(U_Ir)
        weight = found.weight()
        return Change(U_Ir.t().float(), -(weight @ P_Ir.float().to(weight.device)))

    return lower_linears(config, tensors, target, change=change)


def _chain(U_Ir: Tensor) -> Tensor:
    """P with I - P U' = the product of the reflections: each new column is 2 (I - P U') u."""
    P_Ir = torch.empty_like(U_Ir)
    for index in range(U_Ir.shape[1]):
        u_I = U_Ir[:, index]
        P_Ir[:, index] = 2 * (u_I - P_Ir[:, :index] @ (U_Ir[:, :index].t() @ u_I))
    return P_Ir


def _orthonormal(U_Ir: Tensor, module: str) -> Tensor:
    """PEFT's order: from each column, what it has of those before it, one after the other."""
    Q_Ir = torch.empty_like(U_Ir)
    for index in range(U_Ir.shape[1]):
        u_I = U_Ir[:, index]
        for before in range(index):
            u_I = u_I - (Q_Ir[:, before] @ u_I) * Q_Ir[:, before]
        if u_I.norm() < DEPENDENT:
            raise AdapterIncompatible(f"hra_u of {module}: column {index} depends on those before it (apply_GS)")
        Q_Ir[:, index] = u_I / u_I.norm()
    return Q_Ir
