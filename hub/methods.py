"""The table of adapter kinds: every key of their configs, what it may hold, and the tensors that follow from it.

A key stands in one of three classes. Served: we act on it. Inert: it steers training or initialisation only, and the
saved weights already hold its effect. Neutral: an option that we do not serve, accepted only at PEFT's default, which
switches it off. A key that stands nowhere in the table is refused by name.
Source: peft 0.21.2, the dataclasses LoraConfig, IA3Config, PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hub import fields
from hub.base import Base, Modules
from hub.fields import Check
from hub.kind import Kind
from hub.ref import printable
from hub.targets import feedforward, pattern_value, target_complaints, target_modules

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

TENSOR_PREFIX = "base_model.model."
PROMPT_TENSOR = "prompt_embeddings"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a hub accepts of an adapter's size. Units: bytes where named."""

    max_rank: int = 256
    max_virtual_tokens: int = 1024
    max_weights_bytes: int = 8 << 30


@dataclass(frozen=True, slots=True)
class Field:
    """One key of a config: the complaint about a value, and whether the tensors' names and shapes follow from it."""

    check: Check
    shapes_tensors: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors that a config demands on a base, and what keeps them from being told: (field, reason)."""

    shapes: Shapes
    complaints: tuple[tuple[str, str], ...] = ()
    rank: int | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """One kind of adapter."""

    kind: Kind
    peft_type: str
    fields: Mapping[str, Field]
    layout: Callable[[Config, Base, Modules], Layout]


def method_of(config: Config) -> Method | str:
    """The method of a config, or why there is none."""
    peft_type = config.get("peft_type")
    if isinstance(peft_type, str) and peft_type in METHODS:
        return METHODS[peft_type]
    if peft_type is None:
        return f"is missing; served are {', '.join(METHODS)}"
    return f"{printable(str(peft_type))} is not served; served are {', '.join(METHODS)}"


def config_complaints(method: Method, config: Config, limits: Limits) -> list[tuple[str, str]]:
    """Every (key, reason) of a config that we would have to ignore, misread or refuse."""
    complaints = []
    for key, value in config.items():
        field = method.fields.get(key)
        reason = _unknown(key, method) if field is None else field.check(value)
        if reason is not None:
            complaints.append((printable(key), reason))
    complaints += [(key, "is missing") for key in _REQUIRED[method.kind] if key not in config]
    return complaints + _contradictions(config) + _above_limits(config, limits)


def shapes_are_told(method: Method, config: Config) -> bool:
    """Whether the keys that the layout reads are sound, so that it can be computed in spite of other complaints."""
    read = [key for key, field in method.fields.items() if field.shapes_tensors]
    return all(method.fields[key].check(config[key]) is None for key in read if key in config) and all(
        key in config for key in _REQUIRED[method.kind] if key in read
    )


def canonical_config(config: Config) -> dict[str, Any]:
    """The config with its set-like lists sorted: PEFT writes them from sets, in another order every time."""
    return {key: _sorted(value) if key in _SETS else value for key, value in config.items()}


def virtual_tokens(config: Config) -> int | None:
    """The length of a prefix or prompt, None for other kinds."""
    value = config.get("num_virtual_tokens")
    return value if isinstance(value, int) else None


def _lora_layout(config: Config, base: Base, modules: Modules) -> Layout:
    complaints = [("target_modules", reason) for reason in target_complaints(config, modules)]
    shapes: dict[str, tuple[int, ...]] = {}
    ranks = []
    adapted = target_modules(config, modules)
    for module in adapted:
        linear = modules.linears[module]
        rank = pattern_value(config.get("rank_pattern") or {}, module, config.get("r", 8))
        ranks.append(rank)
        shapes[f"{TENSOR_PREFIX}{module}.lora_A.weight"] = (rank, linear.inputs)
        shapes[f"{TENSOR_PREFIX}{module}.lora_B.weight"] = (linear.outputs, rank)
        if config.get("lora_bias"):
            shapes[f"{TENSOR_PREFIX}{module}.lora_B.bias"] = (linear.outputs,)
    return Layout(shapes, tuple(complaints), max(ranks, default=None), _leaves(adapted))


def _ia3_layout(config: Config, base: Base, modules: Modules) -> Layout:
    complaints = [("target_modules", reason) for reason in target_complaints(config, modules)]
    shapes = {}
    adapted = target_modules(config, modules)
    for module in adapted:
        linear = modules.linears[module]
        shape = (1, linear.inputs) if feedforward(config, module) else (linear.outputs, 1)
        shapes[f"{TENSOR_PREFIX}{module}.ia3_l"] = shape
    return Layout(shapes, tuple(complaints), targets=_leaves(adapted))


def _prefix_layout(config: Config, base: Base, modules: Modules) -> Layout:
    facts = {"token_dim": base.kv_width, "num_layers": base.layers, "num_attention_heads": base.kv_heads}
    shape = (config["num_virtual_tokens"], 2 * base.layers * base.kv_width)
    return Layout({PROMPT_TENSOR: shape}, _wrong_facts(config, facts, base))


def _prompt_layout(config: Config, base: Base, modules: Modules) -> Layout:
    facts = {"token_dim": base.hidden_size, "num_layers": base.layers, "num_attention_heads": base.heads}
    shape = (config["num_virtual_tokens"], base.hidden_size)
    return Layout({PROMPT_TENSOR: shape}, _wrong_facts(config, facts, base))


def _wrong_facts(config: Config, facts: Mapping[str, int], base: Base) -> tuple[tuple[str, str], ...]:
    return tuple(
        (key, f"is {config[key]}, but base {printable(base.name)} has {fact}")
        for key, fact in facts.items()
        if config.get(key) is not None and config[key] != fact
    )


def _leaves(adapted: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted({module.rpartition(".")[2] for module in adapted}))


def _contradictions(config: Config) -> list[tuple[str, str]]:
    """Combinations that PEFT itself refuses to load."""
    complaints = []
    if isinstance(config.get("target_modules"), str):
        complaints += [
            (key, "cannot stand beside a target_modules that is a text")
            for key in ("layers_to_transform", "layers_pattern")
            if config.get(key) is not None
        ]
    elif config.get("layers_pattern") and config.get("layers_to_transform") is None:
        complaints.append(("layers_pattern", "needs layers_to_transform"))
    wanted, scaled = config.get("target_modules"), config.get("feedforward_modules")
    if isinstance(wanted, list) and isinstance(scaled, list) and not {*map(str, scaled)} <= {*map(str, wanted)}:
        complaints.append(("feedforward_modules", "must be a subset of target_modules"))
    return complaints


def _above_limits(config: Config, limits: Limits) -> list[tuple[str, str]]:
    patterns = config.get("rank_pattern")
    ranks = [("r", config.get("r"))]
    ranks += [("rank_pattern", rank) for rank in patterns.values()] if isinstance(patterns, dict) else []
    complaints = [
        (key, f"rank {rank} is above max_rank {limits.max_rank} (the largest that this hub accepts)")
        for key, rank in ranks
        if type(rank) is int and rank > limits.max_rank
    ]
    tokens = config.get("num_virtual_tokens")
    if type(tokens) is int and tokens > limits.max_virtual_tokens:
        complaints.append(("num_virtual_tokens", f"{tokens} is above max_virtual_tokens {limits.max_virtual_tokens}"))
    return complaints


def _unknown(key: str, method: Method) -> str:
    near = difflib.get_close_matches(key, list(method.fields), n=1)
    return f"is no field of {method.peft_type}" + (f"; did you mean {near[0]}?" if near else "")


def _sorted(value: Any) -> Any:
    return sorted(set(value)) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


_SETS = frozenset({"target_modules", "exclude_modules", "feedforward_modules"})

_INERT = Field(fields.anything)

_COMMON: Mapping[str, Field] = {
    "peft_type": _INERT,
    "peft_version": Field(fields.optional_text),
    "base_model_name_or_path": Field(fields.optional_text),
    "revision": Field(fields.optional_text),
    "inference_mode": Field(fields.boolean),
    "task_type": Field(fields.one_of("CAUSAL_LM", None)),
    "auto_mapping": Field(fields.auto_mapping),
    "modules_to_save": Field(fields.neutral(None, [], why="it replaces whole modules of the base")),
}

_LORA: Mapping[str, Field] = {
    **_COMMON,
    "r": Field(fields.positive, shapes_tensors=True),
    "lora_alpha": Field(fields.number),
    "use_rslora": Field(fields.boolean),
    "rank_pattern": Field(fields.patterns_of(fields.positive), shapes_tensors=True),
    "alpha_pattern": Field(fields.patterns_of(fields.number)),
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "exclude_modules": Field(fields.optional_module_names, shapes_tensors=True),
    "layers_to_transform": Field(fields.layers, shapes_tensors=True),
    "layers_pattern": Field(fields.layer_patterns, shapes_tensors=True),
    "lora_bias": Field(fields.boolean, shapes_tensors=True),
    "fan_in_fan_out": Field(fields.boolean),  # follows from the base's own layers
    "init_lora_weights": Field(fields.initialisation),
    # Inert: they act while training, or only through an init_lora_weights that is refused above.
    "lora_dropout": Field(fields.number),
    "eva_config": _INERT,
    "corda_config": _INERT,
    "lora_ga_config": _INERT,
    "loftq_config": _INERT,
    "megatron_core": _INERT,
    "qalora_group_size": _INERT,
    # Neutral: each changes what a forward pass computes, or the network itself.
    "bias": Field(fields.neutral("none", why="it trains the base's own biases")),
    "use_dora": Field(fields.neutral(False, why="DoRA")),
    "use_qalora": Field(fields.neutral(False, why="it pools the layer's input")),
    "use_bdlora": Field(fields.neutral(None, why="block-diagonal LoRA")),
    "trainable_token_indices": Field(fields.neutral(None, [], {}, why="it replaces rows of the base's embedding")),
    "target_parameters": Field(fields.neutral(None, [], why="it adapts bare parameters, such as fused experts")),
    "layer_replication": Field(fields.neutral(None, [], why="it changes the network")),
    "alora_invocation_tokens": Field(fields.neutral(None, [], why="activated LoRA")),
    "arrow_config": Field(fields.neutral(None, why="it routes between adapters")),
    "kasa_config": Field(fields.neutral(None, why="KaSA truncates the base's weights")),
    "velora_config": Field(fields.neutral(None, why="VeLoRA")),
    "monteclora_config": Field(fields.neutral(None, why="it samples")),
    "megatron_config": Field(fields.neutral(None, why="Megatron layers")),
    "ensure_weight_tying": Field(fields.neutral(False, why="it ties adapters to the embedding")),
    "runtime_config": Field(fields.neutral(None, {"ephemeral_gpu_offload": False}, {}, why="a setting of one process")),
}

_IA3: Mapping[str, Field] = {
    **_COMMON,
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "exclude_modules": Field(fields.optional_module_names, shapes_tensors=True),
    "feedforward_modules": Field(fields.feedforward_names, shapes_tensors=True),
    "fan_in_fan_out": Field(fields.boolean),
    "init_ia3_weights": Field(fields.boolean),
}

_PROMPT_LEARNING: Mapping[str, Field] = {
    **_COMMON,
    "num_virtual_tokens": Field(fields.positive, shapes_tensors=True),
    "token_dim": Field(fields.optional_positive, shapes_tensors=True),
    "num_layers": Field(fields.optional_positive, shapes_tensors=True),
    "num_attention_heads": Field(fields.optional_positive, shapes_tensors=True),
    "num_transformer_submodules": Field(fields.one_of(1, None)),
}

# The MLPs and encoders of these three act while training; the saved tensor is their result.
_PREFIX: Mapping[str, Field] = {
    **_PROMPT_LEARNING,
    "encoder_hidden_size": _INERT,
    "prefix_projection": _INERT,
    "init_weights": _INERT,
}
_PROMPT: Mapping[str, Field] = {
    **_PROMPT_LEARNING,
    "prompt_tuning_init": _INERT,
    "prompt_tuning_init_text": _INERT,
    "tokenizer_name_or_path": _INERT,
    "tokenizer_kwargs": _INERT,
}
_P_TUNING: Mapping[str, Field] = {
    **_PROMPT_LEARNING,
    "encoder_reparameterization_type": _INERT,
    "encoder_hidden_size": _INERT,
    "encoder_num_layers": _INERT,
    "encoder_dropout": _INERT,
}

_REQUIRED: Mapping[Kind, tuple[str, ...]] = {
    "lora": ("r", "lora_alpha", "target_modules"),
    "ia3": ("target_modules", "feedforward_modules"),
    "prefix": ("num_virtual_tokens",),
    "prompt": ("num_virtual_tokens",),
    "p-tuning": ("num_virtual_tokens",),
}

METHODS: Mapping[str, Method] = {
    method.peft_type: method
    for method in (
        Method("lora", "LORA", _LORA, _lora_layout),
        Method("ia3", "IA3", _IA3, _ia3_layout),
        Method("prefix", "PREFIX_TUNING", _PREFIX, _prefix_layout),
        Method("prompt", "PROMPT_TUNING", _PROMPT, _prompt_layout),
        Method("p-tuning", "P_TUNING", _P_TUNING, _prompt_layout),
    )
}
