"""Virtual tokens ahead of the sequence: prefix tuning, prompt tuning and P-tuning.

Source: peft 0.21.2, PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Base, Modules
from hub.families.method import COMMON, INERT, NOTHING_SAVED, Complaint, Config, Field, Layout, Method
from hub.ref import printable

PROMPT_TENSOR = "prompt_embeddings"

_SHARED: Mapping[str, Field] = {
    **COMMON,
    "modules_to_save": NOTHING_SAVED,
    "num_virtual_tokens": Field(fields.positive, shapes_tensors=True),
    "token_dim": Field(fields.optional_positive, shapes_tensors=True),
    "num_layers": Field(fields.optional_positive, shapes_tensors=True),
    "num_attention_heads": Field(fields.optional_positive, shapes_tensors=True),
    "num_transformer_submodules": Field(fields.one_of(1, None)),
}

# The MLPs and encoders of these three act while training; the saved tensor is their result.
_PREFIX: Mapping[str, Field] = {
    **_SHARED,
    "encoder_hidden_size": INERT,
    "prefix_projection": INERT,
    "init_weights": INERT,
}
_PROMPT: Mapping[str, Field] = {
    **_SHARED,
    "prompt_tuning_init": INERT,
    "prompt_tuning_init_text": INERT,
    "tokenizer_name_or_path": INERT,
    "tokenizer_kwargs": INERT,
}
_P_TUNING: Mapping[str, Field] = {
    **_SHARED,
    "encoder_reparameterization_type": INERT,
    "encoder_hidden_size": INERT,
    "encoder_num_layers": INERT,
    "encoder_dropout": INERT,
}


def _prefix_layout(config: Config, base: Base, modules: Modules) -> Layout:
    facts = {"token_dim": base.kv_width, "num_layers": base.layers, "num_attention_heads": base.kv_heads}
    shape = (config["num_virtual_tokens"], 2 * base.layers * base.kv_width)
    return Layout({PROMPT_TENSOR: shape}, _wrong_facts(config, facts, base))


def _prompt_layout(config: Config, base: Base, modules: Modules) -> Layout:
    facts = {"token_dim": base.hidden_size, "num_layers": base.layers, "num_attention_heads": base.heads}
    shape = (config["num_virtual_tokens"], base.hidden_size)
    return Layout({PROMPT_TENSOR: shape}, _wrong_facts(config, facts, base))


def _wrong_facts(config: Config, facts: Mapping[str, int], base: Base) -> tuple[Complaint, ...]:
    return tuple(
        (key, f"is {config[key]}, but base {printable(base.name)} has {fact}")
        for key, fact in facts.items()
        if config.get(key) is not None and config[key] != fact
    )


_NEEDED = ("num_virtual_tokens",)

PREFIX = Method("prefix", "PREFIX_TUNING", _PREFIX, _NEEDED, _prefix_layout)
PROMPT = Method("prompt", "PROMPT_TUNING", _PROMPT, _NEEDED, _prompt_layout)
P_TUNING = Method("p-tuning", "P_TUNING", _P_TUNING, _NEEDED, _prompt_layout)
