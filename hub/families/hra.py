"""HRA: the base's weight times a chain of Householder reflections, W (I - 2 u_1 u_1') ... (I - 2 u_r u_r').

The chain is I - P U' with one column of P per reflection (its WY form), so the delta is -(W P) U', of rank r.
With Gram-Schmidt the u are made orthonormal first, and the reflections act beside each other.

r rank, I in, O out.
Source: Yuan et al. 2024 (arXiv:2405.17484); Bischof and Van Loan 1987; peft 0.21.2, tuners/hra/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hub import fields
from hub.base import Linear
from hub.errors import TensorsUnusable
from hub.families.change import Change, Found
from hub.families.linears import TARGETS, bias_field, linear_method, pattern_ranks
from hub.families.method import Config, Field, Part

if TYPE_CHECKING:
    from torch import Tensor

DEPENDENT = 1e-6  # what is left of a unit vector: below it, fp32 training has left rounding and no direction

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "r": Field(fields.positive, shapes_tensors=True),
    "apply_GS": Field(fields.boolean),
    "bias": bias_field("hra_only"),
    "init_weights": Field(fields.boolean),  # inert
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"hra_u": (linear.inputs, config["r"])}, config["r"])


def _change(config: Config, found: Found) -> Change:
    """y += -(W P) U' x, in fp64 until the end."""
    U_Ir = found.tensors["hra_u"].double()
    U_Ir = U_Ir / U_Ir.norm(dim=0)
    if config.get("apply_GS"):
        U_Ir = _orthonormal(U_Ir)
        P_Ir = 2 * U_Ir
    else:
        P_Ir = _chain(U_Ir)
    weight_OI = found.weight()
    return Change(U_Ir.t().float(), -(weight_OI @ P_Ir.float().to(weight_OI.device)))


def _chain(U_Ir: Tensor) -> Tensor:
    """P with I - P U' = the product of the reflections: each new column is 2 (I - P U') u."""
    P_Ir = U_Ir.clone()
    for index in range(U_Ir.shape[1]):
        u_I = U_Ir[:, index]
        P_Ir[:, index] = 2 * (u_I - P_Ir[:, :index] @ (U_Ir[:, :index].t() @ u_I))
    return P_Ir


def _orthonormal(U_Ir: Tensor) -> Tensor:
    """PEFT's order: from each column, what it has of those before it, one after the other."""
    Q_Ir = U_Ir.clone()
    for index in range(U_Ir.shape[1]):
        u_I = U_Ir[:, index]
        for before in range(index):
            u_I = u_I - (Q_Ir[:, before] @ u_I) * Q_Ir[:, before]
        if u_I.norm() < DEPENDENT:
            raise TensorsUnusable(f"hra_u: column {index} depends on those before it (apply_GS)")
        Q_Ir[:, index] = u_I / u_I.norm()
    return Q_Ir


HRA = linear_method(
    "hra", "HRA", FIELDS, required=("r", "target_modules"), part=_part, change=_change, ranks=pattern_ranks
)
