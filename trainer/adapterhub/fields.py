"""Every key of AdapterHub's configs: read by a converter, inert in a trained adapter, or taken at one value only.

A key that stands nowhere is refused by name, so that none is ever ignored.
Source: adapters 1.3.0, configuration/adapter_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from trainer.errors import ImportRefused

SEEDS: Final = frozenset({"architecture", "init_weights", "init_weights_seed", "dropout"})


@dataclass(frozen=True, slots=True)
class Fields:
    """`only` holds what a key must be, and why nothing else is converted."""

    read: frozenset[str]
    inert: frozenset[str]
    only: Mapping[str, tuple[Any, str]] = field(default_factory=dict)


BOTTLENECK: Final = Fields(
    read=frozenset({
        "mh_adapter", "output_adapter", "non_linearity", "original_ln_before", "original_ln_after",
        "residual_before_ln", "is_parallel", "scaling", "phm_layer", "phm_dim", "shared_phm_rule",
        "factorized_phm_rule", "factorized_phm_W", "phm_rank", "phm_bias",
    }),
    inert=SEEDS | {
        "reduction_factor", "leave_out",  # the tensors say
        "adapter_residual_before_ln",  # only with ln_after
        "inv_adapter_reduction_factor", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity",
        "stochastic_depth",
    },
    only={
        "ln_before": (False, "`adapters` itself cannot save its norm without a pickle"),
        "ln_after": (False, "it norms the sum with the stream"),
        "use_gating": (False, "its gate is averaged over the whole sequence"),
        "inv_adapter": (None, "an invertible adapter changes the embeddings"),
        "cross_adapter": (False, "a decoder has no cross attention"),
        "shared_W_phm": (False, "it shares whole weights among layers"),
    },
)  # fmt: skip
LORA: Final = Fields(
    read=frozenset({"r", "alpha", "attn_matrices", "composition_mode", "use_dora"}),
    inert=SEEDS | {"dtype", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out"},  # the tensors say
    only={
        "use_gating": (False, "its gate is averaged over the whole sequence"),
        "vera_d": (None, "its VeRA draws a pair of matrices for every shape"),
        "vera_b": (None, "its VeRA draws a pair of matrices for every shape"),
    },
)  # fmt: skip
REFT: Final = Fields(
    read=frozenset({"r", "prefix_positions", "suffix_positions", "tied_weights", "non_linearity"}),
    inert=SEEDS | {"dtype", "layers"},  # the tensors say
    only={
        "orthogonality": (
            True,
            "without it, the file does not tell NoReFT from DiReFT: `adapters` never saves subtract_projection",
        ),
        "output_reft": (True, "an intervention that is off"),
        "subtract_projection": (True, "`adapters` loads it as true"),
    },
)
PREFIX: Final = Fields(
    read=frozenset({"prefix_length", "flat", "non_linearity"}),
    inert=SEEDS | {"bottleneck_size", "encoder_prefix", "cross_prefix", "shared_gating"},
    only={
        "use_gating": (False, "its gate is averaged over the whole sequence"),
        "leave_out": ([], "a prefix stands in every layer"),
    },
)
ABOUT: Final = frozenset({"config", "name", "model_type", "model_class", "model_name", "hidden_size", "version"})
ABOUT_INERT: Final = frozenset({"config_id"})


def check(config: Mapping[str, Any], about: Mapping[str, Any], fields: Fields) -> None:
    """Raises ImportRefused with every key that cannot be converted."""
    problems = []
    for key, value in config.items():
        if key in fields.only and value != fields.only[key][0]:
            wanted, why = fields.only[key]
            problems.append(f"{key} {value!r} is not converted ({why}); only {wanted!r} is")
        elif key not in fields.read | fields.inert | fields.only.keys():
            problems.append(f"{key} is no field that is known")
    problems += [f"{key} is no field that is known" for key in about if key not in ABOUT | ABOUT_INERT]
    problems += [f"{key} is missing" for key in sorted(fields.read - config.keys())]
    if problems:
        raise ImportRefused(problems)
