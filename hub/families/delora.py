"""DeLoRA: LoRA whose rank-one terms have a learned common length; it brings the base's column norms along.

r rank, I in, O out.
Source: Bini et al. 2025 (arXiv:2503.18225); peft 0.21.2, tuners/delora/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found
from hub.families.linears import TARGETS, bias_field, linear_method, pattern_rank, pattern_ranks
from hub.families.method import Config, Field, Part

SMALLEST_NORM = 1e-4  # PEFT's

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "r": Field(fields.positive, shapes_tensors=True),
    "rank_pattern": Field(fields.patterns_of(fields.positive), shapes_tensors=True),
    "bias": bias_field("delora_only"),
    # Inert: where lambda begins, which is then learned and saved, and what acts while training.
    "delora_lambda": Field(fields.number),
    "lambda_pattern": Field(fields.patterns_of(fields.number)),
    "module_dropout": Field(fields.number),
    "init_weights": Field(fields.boolean),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    rank = pattern_rank(config, module)
    shapes = {
        "delora_A": (rank, linear.inputs),
        "delora_B": (linear.outputs, rank),
        "delora_lambda": (1,),
        "delora_w_norm": (linear.inputs,),
    }
    return Part(shapes, rank)


def _change(config: Config, found: Found) -> Change:
    """y += B diag(lambda / (r |a_i| |b_i|)) A (w * x); the norms w are those of the base at its training."""
    A_rI, B_Or = found.tensors["delora_A"], found.tensors["delora_B"]
    lengths_r = A_rI.norm(dim=1).clamp(min=SMALLEST_NORM) * B_Or.norm(dim=0).clamp(min=SMALLEST_NORM)
    factor_r = found.tensors["delora_lambda"] / len(A_rI) / lengths_r
    return Change(A_rI * found.tensors["delora_w_norm"], B_Or * factor_r)


DELORA = linear_method(
    "delora", "DELORA", FIELDS, required=("r", "target_modules"), part=_part, change=_change, ranks=pattern_ranks
)
