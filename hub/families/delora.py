"""DeLoRA: LoRA whose rank-one terms have a learned common length; it brings the base's column norms along.

Source: peft 0.21.2, tuners/delora/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, Part, bias_field, linear_layout, pattern_rank, pattern_ranks
from hub.families.method import Config, Field, Layout, Method

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


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part, conv1d=False)


DELORA = Method("delora", "DELORA", FIELDS, required=("r", "target_modules"), layout=_layout, ranks=pattern_ranks)
