"""LoRA and its options: rsLoRA, DoRA, activated LoRA, ranks and alphas by pattern, biases.

Source: peft 0.21.2, tuners/lora/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, Part, bias_field, linear_layout, pattern_rank, pattern_ranks
from hub.families.method import INERT, Complaint, Config, Field, Layout, Method

# What LoRA and AdaLoRA share: PEFT derives the one config from the other.
SHARED: Mapping[str, Field] = {
    **TARGETS,
    "bias": bias_field("lora_only"),
    "fan_in_fan_out": Field(fields.boolean),  # follows from the base's own layers
    "init_lora_weights": Field(fields.initialisation),
    # Inert: they act while training, or only through an init_lora_weights that is refused above.
    "lora_dropout": Field(fields.number),
    "eva_config": INERT,
    "corda_config": INERT,
    "lora_ga_config": INERT,
    "loftq_config": INERT,
    "megatron_core": INERT,
    "qalora_group_size": INERT,
    # Neutral: each changes what a forward pass computes, or the network itself.
    "use_qalora": Field(fields.neutral(False, why="it pools the layer's input")),
    "use_bdlora": Field(fields.neutral(None, why="block-diagonal LoRA")),
    "trainable_token_indices": Field(fields.neutral(None, [], {}, why="it replaces rows of the base's embedding")),
    "target_parameters": Field(fields.neutral(None, [], why="it adapts bare parameters, such as fused experts")),
    "layer_replication": Field(fields.neutral(None, [], why="it changes the network")),
    "arrow_config": Field(fields.neutral(None, why="it routes between adapters")),
    "kasa_config": Field(fields.neutral(None, why="KaSA truncates the base's weights")),
    "velora_config": Field(fields.neutral(None, why="VeLoRA")),
    "monteclora_config": Field(fields.neutral(None, why="it samples")),
    "megatron_config": Field(fields.neutral(None, why="Megatron layers")),
    "ensure_weight_tying": Field(fields.neutral(False, why="it ties adapters to the embedding")),
    "runtime_config": Field(fields.neutral(None, {"ephemeral_gpu_offload": False}, {}, why="a setting of one process")),
}

FIELDS: Mapping[str, Field] = {
    **SHARED,
    "r": Field(fields.positive, shapes_tensors=True),
    "lora_alpha": Field(fields.number),
    "use_rslora": Field(fields.boolean),
    "rank_pattern": Field(fields.patterns_of(fields.positive), shapes_tensors=True),
    "alpha_pattern": Field(fields.patterns_of(fields.number)),
    "use_dora": Field(fields.boolean, shapes_tensors=True),
    "lora_bias": Field(fields.boolean, shapes_tensors=True),
    "alora_invocation_tokens": Field(fields.optional_token_ids, shapes_tensors=True),
}
# An activated LoRA leaves the tokens before its invocation to the base, and these would change them.
NOT_ACTIVATED = ("use_dora", "bias", "modules_to_save", "trainable_token_indices")


def _part(config: Config, module: str, linear: Linear) -> Part:
    rank = pattern_rank(config, module)
    shapes: dict[str, tuple[int, ...]] = {
        "lora_A.weight": (rank, linear.inputs),
        "lora_B.weight": (linear.outputs, rank),
    }
    if config.get("lora_bias"):
        shapes["lora_B.bias"] = (linear.outputs,)
    if config.get("use_dora"):
        shapes["lora_magnitude_vector"] = (linear.outputs,)
    return Part(shapes, rank)


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    layout = linear_layout(config, base, modules, part=_part)
    strange = [token for token in config.get("alora_invocation_tokens") or [] if token >= base.vocab_size]
    if not strange:
        return layout
    complaint = (
        "alora_invocation_tokens",
        f"token {strange[0]} is not in the base's vocabulary of {base.vocab_size}",
    )
    return replace(layout, complaints=(*layout.complaints, complaint))


def _contradictions(config: Config) -> list[Complaint]:
    complaints = []
    if config.get("use_dora") is True:
        without = {"lora_bias": True, "init_lora_weights": "mica"}
        complaints += [
            (key, "cannot stand beside use_dora") for key, value in without.items() if config.get(key) == value
        ]
    if config.get("alora_invocation_tokens"):
        complaints += [
            (key, "cannot stand beside alora_invocation_tokens")
            for key in NOT_ACTIVATED
            if config.get(key, "none") not in ("none", False, None, [], {})
        ]
    return complaints


LORA = Method(
    "lora",
    "LORA",
    FIELDS,
    required=("r", "lora_alpha", "target_modules"),
    layout=_layout,
    ranks=pattern_ranks,
    contradictions=_contradictions,
)
