"""LoKr: the Kronecker product of two small matrices, each whole or of low rank itself.

Its rank is the product of theirs: a server makes the closest change of a rank that it serves, and measures the error.
Source: Yeh et al. 2023 (arXiv:2309.14859); peft 0.21.2, tuners/lokr/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found
from hub.families.linears import TARGETS, divisors, linear_method, pattern_rank
from hub.families.method import Config, Field, Part
from hub.targets import pattern_value

if TYPE_CHECKING:
    from torch import Tensor


def _decompose_factor(value: Any) -> str | None:
    return None if value == -1 and type(value) is int else fields.positive(value)


FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "r": Field(fields.positive, shapes_tensors=True),
    "alpha": Field(fields.number),
    "rank_pattern": Field(fields.patterns_of(fields.positive), shapes_tensors=True),
    "alpha_pattern": Field(fields.patterns_of(fields.number)),
    "decompose_both": Field(fields.boolean, shapes_tensors=True),
    "decompose_factor": Field(_decompose_factor, shapes_tensors=True),
    # Inert: they act while training, before it, or on convolutions.
    "rank_dropout": Field(fields.number),
    "rank_dropout_scale": Field(fields.boolean),
    "module_dropout": Field(fields.number),
    "init_weights": Field(fields.one_of(True, False, "lycoris")),
    "use_effective_conv2d": Field(fields.boolean),
}


def factors(size: int, wanted: int) -> tuple[int, int]:
    """PEFT's factorization: `wanted` and the rest where it divides; else the largest divisor up to it and the root."""
    if wanted > 0 and size % wanted == 0:
        return wanted, size // wanted
    limit = isqrt(size) if wanted == -1 else min(wanted, isqrt(size))
    smaller = max(one for one in divisors(size) if one <= limit)
    return smaller, size // smaller


def _part(config: Config, module: str, linear: Linear) -> Part:
    rank, wanted = pattern_rank(config, module), config.get("decompose_factor", -1)
    ins, outs = factors(linear.inputs, wanted), factors(linear.outputs, wanted)
    both = bool(config.get("decompose_both"))
    shapes: dict[str, tuple[int, ...]] = {}
    for index in (0, 1):
        name, shape = f"lokr_w{index + 1}", (outs[index], ins[index])
        if (both or index == 1) and rank < max(shape) / 2:
            shapes |= {f"{name}_a": (shape[0], rank), f"{name}_b": (rank, shape[1])}
        else:
            shapes[name] = shape
    return Part(shapes)


def _change(config: Config, found: Found) -> Change:
    """y += alpha / r * (w1 kron w2) x."""
    alpha = pattern_value(config.get("alpha_pattern") or {}, found.module, config["alpha"])
    w1, w2 = _factor(found, "lokr_w1"), _factor(found, "lokr_w2")
    return Change(kron=(w1, w2 * (alpha / pattern_rank(config, found.module))))


def _factor(found: Found, name: str) -> Tensor:
    if name in found.tensors:
        return found.tensors[name]
    return found.tensors[f"{name}_a"] @ found.tensors[f"{name}_b"]


LOKR = linear_method(
    "lokr", "LOKR", FIELDS, required=("r", "alpha", "target_modules"), part=_part, change=_change, full_rank=True
)
