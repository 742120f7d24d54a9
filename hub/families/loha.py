"""LoHa: the elementwise product of two low-rank matrices. It is served at the product of their ranks, r * r.

Source: peft 0.21.2, tuners/loha/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, Part, linear_layout, pattern_rank, pattern_ranks
from hub.families.method import Config, Field, Layout, Method

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "r": Field(fields.positive, shapes_tensors=True),
    "alpha": Field(fields.number),
    "rank_pattern": Field(fields.patterns_of(fields.positive), shapes_tensors=True),
    "alpha_pattern": Field(fields.patterns_of(fields.number)),
    # Inert: they act while training, before it, or on convolutions.
    "rank_dropout": Field(fields.number),
    "module_dropout": Field(fields.number),
    "init_weights": Field(fields.boolean),
    "use_effective_conv2d": Field(fields.boolean),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    rank = pattern_rank(config, module)
    shapes = {f"hada_w{n}_a": (linear.outputs, rank) for n in (1, 2)}
    shapes |= {f"hada_w{n}_b": (rank, linear.inputs) for n in (1, 2)}
    return Part(shapes, rank * rank)


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=_part, conv1d=False)


def _ranks(config: Config) -> Iterable[tuple[str, int]]:
    return [(key, rank * rank) for key, rank in pattern_ranks(config)]


LOHA = Method("loha", "LOHA", FIELDS, required=("r", "alpha", "target_modules"), layout=_layout, ranks=_ranks)
