"""LoHa: the elementwise product of two low-rank matrices. It is served at the product of their ranks, r * r.

r rank of each factor, I in, O out.
Source: Hyeon-Woo et al. 2021 (arXiv:2108.06098); peft 0.21.2, tuners/loha/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found
from hub.families.linears import TARGETS, linear_method, pattern_rank, pattern_ranks
from hub.families.method import Config, Field, Part
from hub.targets import pattern_value

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


def _change(config: Config, found: Found) -> Change:
    """y += alpha / r * ((w1a w1b) * (w2a w2b)) x: every pair of a column of w1a and one of w2a is a column of B."""
    one_Or, two_Or = found.tensors["hada_w1_a"], found.tensors["hada_w2_a"]
    one_rI, two_rI = found.tensors["hada_w1_b"], found.tensors["hada_w2_b"]
    scaling = pattern_value(config.get("alpha_pattern") or {}, found.module, config["alpha"]) / one_Or.shape[1]
    A_RI = (one_rI[:, None, :] * two_rI[None, :, :]).flatten(0, 1)
    B_OR = (one_Or[:, :, None] * two_Or[:, None, :]).flatten(1, 2)
    return Change(A_RI, B_OR * scaling)


def _ranks(config: Config) -> Iterable[tuple[str, int]]:
    return [(key, rank * rank) for key, rank in pattern_ranks(config)]


LOHA = linear_method(
    "loha", "LOHA", FIELDS, required=("r", "alpha", "target_modules"), part=_part, change=_change, ranks=_ranks
)
