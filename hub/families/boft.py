"""BOFT: as OFT, by a product of butterfly factors, and a learned length for each output, but for the base's bias.

Every factor is block-diagonal in an order of its own, and that of factor i stays inside runs of S * 2 ** i features, so
a product of m factors is block-diagonal with blocks of S * 2 ** (m - 1).
PEFT without its CUDA extension trains and loads one factor, whatever the config says. Such a file misfits its config
and is refused by the shape of its tensors.

m factors, B blocks of a factor, S their size, C the count of the product's blocks, P their size, O out.
Source: Liu et al. 2023 (arXiv:2311.06243); peft 0.21.2, tuners/boft/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found, Rotation, identity
from hub.families.linears import TARGETS, bias_field, linear_method
from hub.families.method import Complaint, Config, Field, Part
from hub.families.oft import cayley
from hub.ref import printable

if TYPE_CHECKING:
    from torch import Tensor

MAX_FACTORS = 32

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "boft_block_size": Field(fields.whole, shapes_tensors=True),
    "boft_block_num": Field(fields.whole, shapes_tensors=True),
    "boft_n_butterfly_factor": Field(fields.one_of(*range(1, MAX_FACTORS + 1)), shapes_tensors=True),
    "bias": bias_field("boft_only"),
    "fan_in_fan_out": Field(fields.boolean),  # of Conv1D layers, on which PEFT has no BOFT
    # Inert: they act while training, or before it.
    "boft_dropout": Field(fields.number),
    "init_weights": Field(fields.boolean),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    size, count = config["boft_block_size"], config["boft_block_num"]
    factors = config.get("boft_n_butterfly_factor", 1)
    key, given = ("boft_block_size", size) if size else ("boft_block_num", count)
    if given == 0 or linear.inputs % given:
        return Part({}, None, (key, f"{given} does not divide the {linear.inputs} inputs of {printable(module)}"))
    size, count = size or linear.inputs // count, count or linear.inputs // size
    complaint = None
    if factors > 1 and (size % 2 or linear.inputs % (size << (factors - 1))):
        complaint = (
            "boft_n_butterfly_factor",
            f"{factors} needs blocks of an even size, and {linear.inputs} inputs to be a multiple of {size} * 2 ** "
            f"{factors - 1} at {printable(module)}",
        )
    return Part({"boft_R": (factors, count, size, size), "boft_s": (linear.outputs, 1)}, None, complaint)


def _change(config: Config, found: Found) -> Change:
    """x += (R - I) x, y *= s, in fp64 until the end."""
    learned_mBSS = found.tensors["boft_R"].double()
    Q_mBSS = (learned_mBSS - learned_mBSS.transpose(2, 3)) / 2
    product_CPP = _product(cayley(Q_mBSS))
    # PEFT's x is a row: x' = x R.
    excess_CPP = (product_CPP - identity(product_CPP.shape[-1], product_CPP)).transpose(1, 2)
    return Change(rotate_in=Rotation(excess_CPP.float()), excess_out_O=found.tensors["boft_s"].flatten() - 1)


def _product(R_mBSS: Tensor) -> Tensor:
    """The later factors from the left: each takes the features of a run in its own order, and puts them back."""
    factors, blocks, size, _ = R_mBSS.shape
    together = 1 << (factors - 1)
    product_CPP = identity(size * together, R_mBSS).expand(blocks // together, -1, -1)
    for factor, R_BSS in enumerate(R_mBSS):
        halves, apart = (2 if factor else 1), 1 << factor
        taken_BSP = _swapped(product_CPP, halves, apart, size // halves).reshape(blocks, size, -1)
        product_CPP = _swapped((R_BSS @ taken_BSP).view_as(product_CPP), apart, halves, size // halves)
    return product_CPP


def _swapped(x_CPP: Tensor, outer: int, inner: int, length: int) -> Tensor:
    """Each run of outer * inner * length rows, read as inner * outer * length."""
    return x_CPP.reshape(-1, outer, inner, length, x_CPP.shape[2]).transpose(1, 2).reshape(x_CPP.shape)


def _contradictions(config: Config) -> list[Complaint]:
    size, count = config.get("boft_block_size"), config.get("boft_block_num")
    if type(size) is int and type(count) is int and (size == 0) == (count == 0):
        return [("boft_block_size", f"{size} beside boft_block_num {count}: exactly one of the two must be 0")]
    return []


BOFT = linear_method(
    "boft",
    "BOFT",
    FIELDS,
    required=("boft_block_size", "boft_block_num", "target_modules"),
    part=_part,
    change=_change,
    contradictions=_contradictions,
)
