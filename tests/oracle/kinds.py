"""The rows of the oracle: every kind of adapter with the options that change what it computes, as PEFT configs.

A new kind is a few rows here; every test of this folder then runs them on every architecture. Kinds that PEFT has for
Linear layers alone stand on the one Linear that a network of Conv1D layers has, its head.
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
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)

from hub.fidelity import served_exactly
from hub.methods import METHODS
from tests.oracle.edited import Edited, edit_configs, loreft_configs, write_edits
from tests.oracle.weights import with_biases, write_biases, write_sparse
from trainer.modules.attach import attach

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
BLOCKS_8 = {"boft_block_size": 0, "boft_block_num": 8}
# The embedding, two kinds of norms, and a Linear that no other row adapts.
WHOLE = {
    "phi": ("embed_tokens", ["input_layernorm", "final_layernorm"], "k_proj"),
    "phi3": ("embed_tokens", ["input_layernorm", "model.norm"], "o_proj"),
    "gpt2": ("wte", ["ln_1", "ln_f"], "attn.c_proj"),
}
DEFAULT_WHOLE = ("embed_tokens", ["input_layernorm", "model.norm"], "o_proj")
CONV1D = ("gpt2",)
TOKENS = [*range(120, 3, -2)]  # in no order that the vocabulary has
TIED = ("gemma2", "gpt2")  # the head's weight is the embedding's
# Modules with biases, some and others; all other architectures here have none, and so no BitFit.
BIASED = {
    "llama": (["q_proj", "o_proj"], ["v_proj"]),
    "qwen2": (["q_proj", "k_proj"], ["v_proj"]),
    "phi": (["fc1", "lm_head"], ["input_layernorm", "final_layernorm"]),
    "gpt2": (["c_attn"], ["ln_1", "ln_f"]),
}
ROUTING = ("lora-moe",)  # it changes nothing itself
INVOCATION = (7, 9)
ROUTERS = {"mixtral": "mlp.gate.weight", "qwen3_moe": "mlp.gate.weight", "gpt_oss": "mlp.router.weight"}


@dataclass(frozen=True)
class Row:
    """`cut` takes back some of what is random: triplets that are masked, rows that training has left alone.

    `config` is PEFT's, or for a kind that PEFT lacks what stands in the file but for what follows from `targets`.
    """

    kind: str
    config: Any
    cut: Callable[[PeftModel], None] | None = None
    targets: tuple[str, ...] = ()

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
        """Of the residual stream, and no change of a Linear."""
        return self.kind in ("bottleneck", "loreft")

    @property
    def ours(self) -> bool:
        """In a format of our own, which PEFT cannot load."""
        return isinstance(self.config, dict)


def exact_kinds(architecture: str) -> list[str]:
    """Every kind that an adapter of this base may have and that is served exactly."""
    exact = [method.kind for method in METHODS.values() if served_exactly(method.kind) and method.kind not in ROUTING]
    return [kind for kind in exact if kind != "bitfit" or architecture in BIASED]


def rows(architecture: str) -> dict[str, Row]:
    """At least three of each exact kind, with different ranks, lengths, targets and options."""
    targets, feedforward = ATTENTION_AND_MLP.get(architecture, DEFAULT)
    transposed = {"fan_in_fan_out": True} if architecture in CONV1D else {}
    lora = {**transposed, **COMMON}
    first, second = targets[0], targets[-1]
    # For kinds that PEFT cannot put on a Conv1D; in some of their rows, not on every layer.
    linears, one, other = (["lm_head"], "lm_head", "lm_head") if architecture in CONV1D else (targets, first, second)
    outer, inner = ({}, {}) if architecture in CONV1D else ({"layers_to_transform": n} for n in ([0, 3], [1, 2]))
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
        "alora-patterns": Row(
            "lora",
            LoraConfig(
                r=2,
                use_rslora=True,
                rank_pattern={first: 5},
                alpha_pattern={second: 3},
                alora_invocation_tokens=[*INVOCATION],
                target_modules=[first, second],
                **lora,
            ),
        ),
        "alora-one-layer": Row(
            "lora",
            LoraConfig(
                r=3,
                lora_alpha=12,
                alora_invocation_tokens=[*INVOCATION],
                target_modules=targets,
                layers_to_transform=[2],
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
        "adalora-head": Row(
            "adalora", AdaLoraConfig(init_r=3, lora_alpha=5, total_step=10, target_modules=[first, "lm_head"], **lora)
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
        "loha": Row("loha", LoHaConfig(r=3, alpha=6, target_modules=linears, **COMMON)),
        "loha-patterns": Row(
            "loha",
            LoHaConfig(r=2, rank_pattern={one: 4}, alpha_pattern={other: 3}, target_modules=[one, other], **COMMON),
        ),
        "loha-some-layers": Row(
            "loha", LoHaConfig(r=4, alpha=5, exclude_modules=[first], target_modules=linears, **inner, **COMMON)
        ),
        "hra": Row("hra", HRAConfig(r=4, target_modules=linears, **COMMON)),
        "hra-gram-schmidt": Row("hra", HRAConfig(r=3, apply_GS=True, bias="hra_only", target_modules=[one], **COMMON)),
        "hra-some-layers": Row("hra", HRAConfig(r=6, bias="all", target_modules=[one, other], **outer, **COMMON)),
        "miss": Row("miss", MissConfig(r=5, target_modules=linears, **COMMON)),
        "miss-mini": Row(
            "miss",
            MissConfig(r=4, init_weights="mini", mini_r=8, bias="MiSS_only", target_modules=[one, other], **COMMON),
        ),
        "miss-some-layers": Row("miss", MissConfig(r=7, bias="all", target_modules=linears, **inner, **COMMON)),
        "delora": Row("delora", DeloraConfig(r=4, target_modules=linears, **COMMON)),
        "delora-patterns": Row(
            "delora",
            DeloraConfig(r=2, rank_pattern={one: 3}, bias="delora_only", target_modules=[one, other], **COMMON),
        ),
        "delora-some-layers": Row(
            "delora",
            DeloraConfig(
                r=3, delora_lambda=9, lambda_pattern={one: 20}, bias="all", target_modules=linears, **outer, **COMMON
            ),
        ),
        "ia3": Row("ia3", IA3Config(target_modules=ia3_targets, feedforward_modules=[feedforward], **lora)),
        "ia3-attention": Row("ia3", IA3Config(target_modules=[first], feedforward_modules=[], **lora)),
        "beft": Row("beft", BeftConfig(target_modules=linears, **COMMON)),
        "beft-by-expression": Row("beft", BeftConfig(target_modules=rf"(.*\.[02]\..*)?({one}|{other})", **COMMON)),
        "beft-whole-norms": Row("beft", BeftConfig(target_modules=[one], modules_to_save=[*norms], **COMMON)),
        "oft": Row("oft", OFTConfig(oft_block_size=8, target_modules=linears, **COMMON)),
        "oft-cayley-by-count": Row(
            "oft",
            OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, bias="oft_only", target_modules=[one], **COMMON),
        ),
        "oft-shared-three-terms": Row(
            "oft",
            OFTConfig(
                oft_block_size=6,  # which PEFT makes 4 or 8
                block_share=True,
                num_cayley_neumann_terms=3,
                module_dropout=0.5,
                target_modules=[one, other],
                **COMMON,
            ),
        ),
        "coft": Row(
            "oft",
            OFTConfig(
                oft_block_size=16,
                coft=True,
                eps=0.4,
                num_cayley_neumann_terms=2,
                target_modules=[one, other],
                **COMMON,
            ),
        ),
        "boft": Row("boft", BOFTConfig(boft_block_size=4, bias="boft_only", target_modules=linears, **COMMON)),
        "boft-by-count": Row("boft", BOFTConfig(**BLOCKS_8, target_modules=[other], **COMMON)),
        "boft-some-layers": Row(
            "boft", BOFTConfig(boft_block_size=16, bias="all", target_modules=linears, **inner, **COMMON)
        ),
        "road": Row("road", RoadConfig(group_size=8, target_modules=linears, **COMMON)),
        "road-2": Row("road", RoadConfig(variant="road_2", group_size=16, target_modules=[one, other], **COMMON)),
        "road-4": Row("road", RoadConfig(variant="road_4", group_size=2, target_modules=[one, other], **COMMON)),
        "shira": Row("shira", ShiraConfig(r=2, target_modules=linears, **COMMON)),
        "shira-other-places": Row(
            "shira", ShiraConfig(r=1, random_seed=11, target_modules=[one, other], modules_to_save=norms[1:], **COMMON)
        ),
        "shira-head": Row("shira", ShiraConfig(r=6, random_seed=3, target_modules=sorted({one, "lm_head"}), **COMMON)),
        "lokr": Row("lokr", LoKrConfig(r=3, alpha=6, target_modules=linears, **COMMON)),
        "lokr-both-decomposed": Row(
            "lokr",
            LoKrConfig(
                r=1,
                alpha=2,
                decompose_both=True,
                decompose_factor=4,
                rank_pattern={one: 2},
                alpha_pattern={other: 3},
                target_modules=[one, other],
                **COMMON,
            ),
        ),
        "fourierft": Row(
            "fourierft", FourierFTConfig(n_frequency=50, scaling=20.0, target_modules=targets, **transposed, **COMMON)
        ),
        "fourierft-patterns": Row(
            "fourierft",
            FourierFTConfig(
                n_frequency=20,
                n_frequency_pattern={first: 90},
                random_loc_seed=5,
                scaling=40.0,
                bias="fourier_only",
                target_modules=[first, second],
                **lora,
            ),
        ),
        "c3a": Row("c3a", C3AConfig(block_size=8, target_modules=linears, **COMMON)),
        "c3a-patterns": Row(
            "c3a",
            C3AConfig(
                block_size=16, block_size_pattern={one: 4}, bias="c3a_only", target_modules=[one, other], **COMMON
            ),
        ),
        # PEFT does not act on its rank_pattern.
        "hira": Row("hira", HiraConfig(r=4, rank_pattern={first: 5}, target_modules=targets, **lora)),
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
        "tokens-named": Row(
            "trainable-tokens",
            TrainableTokensConfig(token_indices=[*range(3, 127, 3)], target_modules=[table], **COMMON),
        ),
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
        "ln-tuning-some-layers": Row(
            "ln-tuning", LNTuningConfig(target_modules=norms, exclude_modules=r".*\.[02]\..*", **COMMON)
        ),
        "prefix": Row("prefix", PrefixTuningConfig(num_virtual_tokens=5, **COMMON)),
        "prefix-projected": Row(
            "prefix", PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **COMMON)
        ),
        "prefix-long": Row("prefix", PrefixTuningConfig(num_virtual_tokens=8, **COMMON)),
        "prompt": Row("prompt", PromptTuningConfig(num_virtual_tokens=7, **COMMON)),
        "prompt-short": Row("prompt", PromptTuningConfig(num_virtual_tokens=1, **COMMON)),
        "prompt-of-words": Row(
            "prompt", PromptTuningConfig(num_virtual_tokens=8, prompt_tuning_init="SAMPLE_VOCAB", **COMMON)
        ),
        "p-tuning": Row("p-tuning", PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **COMMON)),
        "p-tuning-lstm": Row(
            "p-tuning",
            PromptEncoderConfig(
                num_virtual_tokens=2, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **COMMON
            ),
        ),
        "p-tuning-deep": Row(
            "p-tuning",
            PromptEncoderConfig(
                num_virtual_tokens=8,
                encoder_hidden_size=8,
                encoder_num_layers=3,
                encoder_reparameterization_type="LSTM",
                **COMMON,
            ),
        ),
    }
    edits = {**edit_configs(), **loreft_configs()}
    made |= {name: Row(config["peft_type"].lower(), config) for name, config in edits.items()}
    made |= token_rows(architecture, table) | sparse_rows(targets) | bias_rows(architecture)
    if architecture in ROUTERS:
        made |= mixture_rows(architecture, first)
    return made


def token_rows(architecture: str, table: str) -> dict[str, Row]:
    """Rows of the head: one that is tied follows the embedding, and one with a bias is refused."""

    def row(targets: list[str]) -> Row:
        return Row(
            "trainable-tokens", TrainableTokensConfig(token_indices=TOKENS[::-3], target_modules=targets, **COMMON)
        )

    if architecture in (*TIED, "phi"):
        return {"tokens-fewer": row([table])}
    return {"tokens-head": row(["lm_head"]), "tokens-both": row([table, "lm_head"])}


def sparse_rows(targets: list[str]) -> dict[str, Row]:
    """In a format of our own: over all targets, in few of them, and beside the head's."""

    def config(density: float, algorithm: str | None) -> dict[str, Any]:
        return {"peft_type": "SPARSE", "density": density, "algorithm": algorithm, **COMMON}

    return {
        "sparse": Row("sparse", config(0.05, "lt-sft"), targets=(*targets,)),
        "sparse-diff-pruning": Row("sparse", config(0.2, "diff-pruning"), targets=(targets[0],)),
        "sparse-head": Row("sparse", config(0.002, None), targets=(targets[-1], "lm_head")),
    }


def bias_rows(architecture: str) -> dict[str, Row]:
    """BitFit, in a format of our own: all biases, and those of some modules."""
    if architecture not in BIASED:
        return {}
    some, others = BIASED[architecture]
    meant = {"bitfit": None, "bitfit-some": some, "bitfit-others": others}
    return {
        name: Row("bitfit", {"peft_type": "BITFIT", "target_modules": targets, **COMMON})
        for name, targets in meant.items()
    }


def mixture_rows(architecture: str, linear: str) -> dict[str, Row]:
    """LoRA on the weights that are no Linear's, apart and together; PEFT nests what it wraps on one module."""

    def row(**options: Any) -> Row:
        return Row("lora", LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": [], **COMMON, **options}))

    return {
        "lora-experts": row(target_parameters=["experts.gate_up_proj", "mlp.experts.down_proj"], lora_alpha=9),
        "lora-gate-up": row(target_parameters=["experts.gate_up_proj"], r=2, use_rslora=True),
        "lora-down-one-layer": row(target_parameters=["model.layers.1.mlp.experts.down_proj"], lora_alpha=15),
        "lora-all-linear": row(target_modules="all-linear", r=2),  # for PEFT, those of before transformers 5
        "lora-router": row(target_parameters=[ROUTERS[architecture]], r=2, lora_alpha=8),
        "lora-mixture-patterns": row(
            target_modules=[linear],
            target_parameters=["experts.down_proj", "experts.gate_up_proj", ROUTERS[architecture]],
            rank_pattern={"gate_up_proj": 4, "layers.0.mlp.experts.down_proj": 1, linear: 2},
            alpha_pattern={r".*\.down_proj": 7, "weight": 5},
        ),
    }


def make_adapter(base: TinyBase, row: Row, folder: Path, seed: int) -> Any:
    """An adapter with random, visible weights, saved to `folder`; returned as it is loaded from there."""
    torch.manual_seed(seed)
    if row.edits:
        stock: Any = base.fresh()
        write_edits(folder, row.config, layers=stock.config.num_hidden_layers, hidden=stock.config.hidden_size)
        return Edited(stock, base.architecture, [(folder, 1.0)]).eval()
    if row.kind == "sparse":
        write_sparse(folder, row.config, base.fresh(), row.targets)
        return attach(base.fresh(), folder)
    if row.kind == "bitfit":
        write_biases(folder, row.config, base.fresh())
        return with_biases(base.fresh(), folder)
    model = get_peft_model(base.fresh(), row.config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    if row.cut is not None:
        row.cut(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")  # which else PEFT renders from a template
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
