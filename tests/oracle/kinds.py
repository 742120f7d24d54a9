"""The rows of the oracle: every kind of adapter with the options that change what it computes, as PEFT configs.

A new kind is one row here; every test of this folder then runs it on every architecture that PEFT can put it on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    DeloraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)

from tests.oracle.edited import Edited, edit_configs, loreft_configs, write_edits

if TYPE_CHECKING:
    from tests.oracle.conftest import TinyBase

COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ATTENTION_AND_MLP = {
    "phi": (["q_proj", "v_proj", "fc1", "fc2"], "fc2"),
    "phi3": (["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "down_proj"),
    "gpt2": (["c_attn", "c_proj", "c_fc"], "mlp.c_proj"),
    "gpt_neox": (["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], "dense_4h_to_h"),
    "opt": (["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "fc2"),
    "starcoder2": (["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"], "c_proj"),
    "mixtral": (["q_proj", "k_proj", "v_proj", "o_proj"], "o_proj"),
    "qwen3_moe": (["q_proj", "k_proj", "v_proj", "o_proj"], "o_proj"),
    "gpt_oss": (["q_proj", "k_proj", "v_proj", "o_proj"], "o_proj"),
}
DEFAULT = (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "down_proj")
# The embedding, two kinds of norms, and a Linear that no other row adapts.
WHOLE = {
    "phi": ("embed_tokens", ["input_layernorm", "final_layernorm"], "k_proj"),
    "phi3": ("embed_tokens", ["input_layernorm", "model.norm"], "o_proj"),
    "gpt2": ("wte", ["ln_1", "ln_f"], "attn.c_proj"),
}
DEFAULT_WHOLE = ("embed_tokens", ["input_layernorm", "model.norm"], "o_proj")
CONV1D = ("gpt2",)
TOKENS = [*range(120, 3, -2)]  # in no order that the vocabulary has
INVOCATION = (7, 9)


@dataclass(frozen=True)
class Row:
    """`cut` takes back some of what is random: triplets that are masked, rows that training has left alone."""

    kind: str
    config: Any
    linear_only: bool = False  # PEFT cannot put it on a Conv1D
    cut: Callable[[PeftModel], None] | None = None

    @property
    def invoked(self) -> bool:
        """The adapter sleeps until the prompt holds INVOCATION."""
        return bool(getattr(self.config, "alora_invocation_tokens", None))

    @property
    def virtual(self) -> bool:
        """Virtual tokens ahead of the sequence, and no change of a Linear."""
        return self.kind in ("prefix", "prompt", "p-tuning")

    @property
    def edits(self) -> bool:
        """Of the residual stream, and no change of a Linear: `config` is in our own format, which PEFT cannot load."""
        return isinstance(self.config, dict)


def rows(architecture: str) -> dict[str, Row]:
    """More than one of most kinds, with different ranks, lengths and targets."""
    targets, feedforward = ATTENTION_AND_MLP.get(architecture, DEFAULT)
    transposed = {"fan_in_fan_out": True} if architecture in CONV1D else {}
    lora = {**transposed, **COMMON}
    first, second = targets[0], targets[-1]
    ia3_targets = [*targets[:2], feedforward]
    table, norms, linear = WHOLE.get(architecture, DEFAULT_WHOLE)
    made = {
        "lora": Row("lora", LoraConfig(r=4, lora_alpha=16, target_modules=targets, **lora)),
        "lora-one-layer": Row(
            "lora", LoraConfig(r=2, lora_alpha=8, target_modules=targets, layers_to_transform=[1, 3], **lora)
        ),
        "rslora-patterns": Row(
            "lora",
            LoraConfig(
                r=8,
                lora_alpha=16,
                use_rslora=True,
                target_modules=targets,
                rank_pattern={first: 3},
                alpha_pattern={second: 5, first: 7},
                **lora,
            ),
        ),
        "lora-bias": Row("lora", LoraConfig(r=3, lora_alpha=9, lora_bias=True, target_modules=[first], **lora)),
        "lora-all-biases": Row("lora", LoraConfig(r=3, lora_alpha=6, bias="all", target_modules=[first], **lora)),
        "alora": Row(
            "lora",
            LoraConfig(
                r=4,
                lora_alpha=16,
                alora_invocation_tokens=[*INVOCATION],
                lora_bias=True,
                target_modules=targets,
                **lora,
            ),
        ),
        "dora": Row("lora", LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=targets, **lora)),
        "dora-rslora-own-biases": Row(
            "lora",
            LoraConfig(
                r=2,
                lora_alpha=3,
                use_dora=True,
                use_rslora=True,
                rank_pattern={second: 5},
                bias="lora_only",
                target_modules=[first, second],
                **lora,
            ),
        ),
        "adalora": Row("adalora", AdaLoraConfig(init_r=4, total_step=10, target_modules=targets, **lora)),
        "adalora-cut": Row(
            "adalora",
            AdaLoraConfig(
                init_r=6, lora_alpha=24, total_step=10, bias="lora_only", target_modules=[first, second], **lora
            ),
            cut=cut_triplets,
        ),
        "vera": Row("vera", VeraConfig(r=16, target_modules=targets, **lora)),
        "vera-from-its-seed": Row(
            "vera",
            VeraConfig(
                r=8,
                projection_prng_key=7,
                save_projection=False,
                bias="vera_only",
                target_modules=[first, second],
                **lora,
            ),
        ),
        "loha": Row("loha", LoHaConfig(r=3, alpha=6, target_modules=targets, **COMMON), linear_only=True),
        "loha-patterns": Row(
            "loha",
            LoHaConfig(
                r=2, rank_pattern={first: 4}, alpha_pattern={second: 3}, target_modules=[first, second], **COMMON
            ),
            linear_only=True,
        ),
        "hra": Row("hra", HRAConfig(r=4, target_modules=targets, **COMMON), linear_only=True),
        "hra-gram-schmidt": Row(
            "hra", HRAConfig(r=3, apply_GS=True, bias="hra_only", target_modules=[first], **COMMON), linear_only=True
        ),
        "miss": Row("miss", MissConfig(r=5, target_modules=targets, **COMMON), linear_only=True),
        "miss-mini": Row(
            "miss",
            MissConfig(r=4, init_weights="mini", mini_r=8, bias="MiSS_only", target_modules=[first, second], **COMMON),
            linear_only=True,
        ),
        "delora": Row("delora", DeloraConfig(r=4, target_modules=targets, **COMMON), linear_only=True),
        "delora-patterns": Row(
            "delora",
            DeloraConfig(r=2, rank_pattern={first: 3}, bias="delora_only", target_modules=[first, second], **COMMON),
            linear_only=True,
        ),
        "ia3": Row("ia3", IA3Config(target_modules=ia3_targets, feedforward_modules=[feedforward], **lora)),
        "ia3-attention": Row("ia3", IA3Config(target_modules=[first], feedforward_modules=[], **lora)),
        "beft": Row("beft", BeftConfig(target_modules=targets, **COMMON), linear_only=True),
        "lora-head": Row("lora", LoraConfig(r=3, lora_alpha=9, target_modules=[first, "lm_head"], **lora)),
        "dora-head": Row("lora", LoraConfig(r=2, bias="lora_only", use_dora=True, target_modules=["lm_head"], **lora)),
        "vera-head": Row("vera", VeraConfig(r=8, target_modules=[first, "lm_head"], **lora)),
        "ia3-head": Row("ia3", IA3Config(target_modules=["lm_head"], feedforward_modules=[], **lora)),
        "lora-embedding": Row(
            "lora",
            LoraConfig(r=4, lora_alpha=2, rank_pattern={table: 3}, target_modules=[table, "lm_head", second], **lora),
        ),
        "dora-embedding": Row("lora", LoraConfig(r=2, use_dora=True, target_modules=[table], **lora)),
        "lora-tokens": Row("lora", LoraConfig(r=2, target_modules=[first], trainable_token_indices=TOKENS, **lora)),
        "tokens": Row("trainable-tokens", TrainableTokensConfig(token_indices=TOKENS, **COMMON)),
        "lora-whole-head": Row("lora", LoraConfig(r=2, target_modules=[first], modules_to_save=["lm_head"], **lora)),
        "lora-whole-embedding": Row(
            "lora", LoraConfig(r=2, target_modules=[first], modules_to_save=[table], **lora), cut=keep_most_rows
        ),
        "lora-whole-norms": Row(
            "lora", LoraConfig(r=2, target_modules=[first], modules_to_save=[*norms, linear], **lora)
        ),
        "ln-tuning": Row("ln-tuning", LNTuningConfig(target_modules=norms, **COMMON)),
        "ln-tuning-head": Row(
            "ln-tuning", LNTuningConfig(target_modules=norms[1:], modules_to_save=["lm_head"], **COMMON)
        ),
        "prefix": Row("prefix", PrefixTuningConfig(num_virtual_tokens=5, **COMMON)),
        "prefix-projected": Row(
            "prefix", PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **COMMON)
        ),
        "prompt": Row("prompt", PromptTuningConfig(num_virtual_tokens=7, **COMMON)),
        "p-tuning": Row("p-tuning", PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **COMMON)),
        "p-tuning-lstm": Row(
            "p-tuning",
            PromptEncoderConfig(
                num_virtual_tokens=2, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **COMMON
            ),
        ),
    }
    edits = {**edit_configs(), **loreft_configs()}
    made |= {name: Row(config["peft_type"].lower(), config) for name, config in edits.items()}
    return {name: row for name, row in made.items() if not (row.linear_only and architecture in CONV1D)}


def make_adapter(base: TinyBase, row: Row, folder: Path, seed: int) -> Any:
    """An adapter with random, visible weights, saved to `folder`; returned as it is loaded from there."""
    torch.manual_seed(seed)
    if row.edits:
        stock: Any = base.fresh()
        write_edits(folder, row.config, layers=stock.config.num_hidden_layers, hidden=stock.config.hidden_size)
        return Edited(stock, base.architecture, [(folder, 1.0)]).eval()
    model = get_peft_model(base.fresh(), row.config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    if row.cut is not None:
        row.cut(model)
    model.eval().save_pretrained(folder)
    return PeftModel.from_pretrained(base.fresh(), folder).eval()


def keep_most_rows(model: PeftModel) -> None:
    """Of a whole embedding, all but a few rows are the base's."""
    trained = model.get_input_embeddings()
    changed = trained.original_module.weight.data.clone()
    changed[TOKENS] = trained.modules_to_save.default.weight.data[TOKENS]
    trained.modules_to_save.default.weight.data = changed


def cut_triplets(model: PeftModel) -> None:
    """Every second triplet, and all of the first module."""
    masks: dict[str, list[bool]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_E." in name:
            masks[name.removeprefix("base_model.model.")] = [
                bool(masks) and index % 2 == 0 for index in range(parameter.shape[0])
            ]
    model.peft_config["default"].rank_pattern = masks
