"""The methods that `hub train` knows, one entry each in METHODS, under the names that the hub gives their kinds.

An entry holds the options a user may set, the config they become on a base, and what the method cannot do there.
To add a method: an options model, a function that builds its config, one that lists its problems, one entry.
Imports PEFT only where a config is built: listing and validating need no torch.

Law: whatever `problems` lets through, PEFT trains; whatever it lists was refused before any weight was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from hub.experts import KINDS
from trainer.anatomy import Anatomy, names
from trainer.families.edits import BOTTLENECK, LOREFT
from trainer.families.full_rank import FULL_RANK
from trainer.families.linears import LINEARS
from trainer.families.moe import LORA_MOE
from trainer.families.parts import PARTS, strangers, token_ids, token_problems
from trainer.families.rotations import ROTATIONS
from trainer.families.sparse import DIFF_PRUNING, LT_SFT
from trainer.method import Method, Options, Plan, unknown_targets

if TYPE_CHECKING:
    from trainer.tuner import Tuner


REWRITES: Final = ("olora", "pissa", "corda", "lora_ga")  # initialisations that take their start off the base
LINEAR_ONLY: Final = ("eva", "olora", "corda", "lora_ga")


class LoraOptions(Options):
    rank: int = Field(8, ge=1, description="rank of the two factors")
    alpha: float | None = Field(None, gt=0, description="the delta is scaled by alpha / rank; default: twice the rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of the factors")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    dora: bool = Field(False, description="train the length of every row of the weight apart from its direction (DoRA)")
    init: Literal[
        "default",
        "gaussian",
        "orthogonal",
        "eva",
        "olora",
        "pissa",
        "pissa_niter_4",
        "pissa_niter_16",
        "corda",
        "lora_ga",
    ] = Field("default", description="where the factors start; the last six are saved as a LoRA of twice the rank")
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="modules to adapt; default: every linear one but the output head"
    )
    modules_to_save: tuple[str, ...] | None = Field(
        None, min_length=1, description="linear modules, head, norms or embedding that are trained and saved whole"
    )
    trainable_token_indices: tuple[int | str, ...] | None = Field(
        None, min_length=1, description="tokens whose rows are trained too: ids, or texts, of which every token counts"
    )

    @property
    def saved_rank(self) -> int:
        return 2 * self.rank if self.init.startswith(REWRITES) else self.rank

    @model_validator(mode="after")
    def dora_needs_the_base_as_it_is(self) -> LoraOptions:
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init: orthogonal needs an even rank, not {self.rank}")
        if self.dora and self.init.startswith(REWRITES):
            raise ValueError(
                f"dora and init: {self.init} exclude each other: it changes the weight whose rows DoRA measures"
            )
        return self


class Ia3Options(Options):
    targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="modules to rescale; default: PEFT's choice"
    )
    feedforward: tuple[str, ...] | None = Field(
        None, description="those of the targets whose input is rescaled, not their output; default: PEFT's choice"
    )

    @model_validator(mode="after")
    def feedforward_is_among_targets(self) -> Ia3Options:
        if self.feedforward is not None and self.targets is None:
            raise ValueError("feedforward needs targets")
        strangers = sorted(set(self.feedforward or ()) - set(self.targets or ()))
        if strangers:
            raise ValueError(f"feedforward names {', '.join(strangers)}, which is not among the targets")
        return self


class VirtualTokens(Options):
    virtual_tokens: int = Field(16, ge=1, description="how many trained tokens stand before every text")


class PrefixOptions(VirtualTokens):
    init: Literal["random", "zero"] = Field("random", description="first values of the keys and values")
    projection: bool = Field(False, description="train through an MLP, which is folded in at export")
    projection_size: int | None = Field(None, ge=1, description="width of that MLP; default: the width of the keys")

    @model_validator(mode="after")
    def size_needs_projection(self) -> PrefixOptions:
        if self.projection_size is not None and not self.projection:
            raise ValueError("projection_size needs projection: true")
        return self


class PromptOptions(VirtualTokens):
    init: Literal["random", "vocabulary", "text"] = Field(
        "vocabulary", description="first values: noise, the embeddings of sampled tokens, or those of init_text"
    )
    init_text: str | None = Field(None, min_length=1, description="the text whose embeddings are the first values")

    @model_validator(mode="after")
    def text_and_its_init_go_together(self) -> PromptOptions:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init: text and init_text go together")
        return self


class PTuningOptions(VirtualTokens):
    encoder: Literal["mlp", "lstm"] = Field(
        "mlp", description="the network that the virtual tokens are trained through"
    )
    encoder_size: int | None = Field(None, ge=1, description="its width; default: the hidden size of the base")
    encoder_layers: int | None = Field(None, ge=1, description="layers of an LSTM encoder; default: 2")
    encoder_dropout: float = Field(0.0, ge=0, lt=1, description="dropout between the layers of an LSTM encoder")
    lstm_only: ClassVar[tuple[str, ...]] = ("encoder_layers", "encoder_dropout")

    @model_validator(mode="after")
    def an_mlp_has_fixed_layers(self) -> PTuningOptions:
        given = [name for name in self.lstm_only if name in self.model_fields_set and getattr(self, name)]
        if self.encoder == "mlp" and given:
            raise ValueError(f"{', '.join(given)}: only with encoder: lstm")
        return self


def lora_config(options: LoraOptions, anatomy: Anatomy) -> Any:
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    # One rank for every module: EVA's own rho would move rank between them.
    settings: dict[str, dict[str, Any]] = {
        "eva": {"eva_config": EvaConfig(rho=1.0)},
        "corda": {"corda_config": CordaConfig()},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
    }
    return LoraConfig(
        init_lora_weights=True if options.init == "default" else options.init,
        **settings.get(options.init, {}),
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=2 * options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        use_dora=options.dora,
        target_modules=list(
            options.targets or [name for name in anatomy.linear_names if not of_experts(name, anatomy)]
        ),
        fan_in_fan_out=anatomy.conv1d,
        modules_to_save=sorted(options.modules_to_save) if options.modules_to_save else None,
        trainable_token_indices=token_ids(options.trainable_token_indices or (), anatomy) or None,
    )


def lora_problems(options: LoraOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    wanted = options.targets or ()
    mistaken = [name for name in wanted if of_experts(name, anatomy)]
    problems = [
        f"target {name}: on {anatomy.model_type}, PEFT takes it for experts or a router by their name of before "
        "transformers 5; those are not trained here"
        for name in mistaken
    ] + unknown_targets([name for name in wanted if name not in mistaken], anatomy)
    if anatomy.conv1d and options.init in LINEAR_ONLY:
        problems.append(f"init {options.init} is not for Conv1D modules, which {anatomy.architecture} has")
    if anatomy.tied and options.init.startswith(REWRITES) and any(names(one, anatomy.head) for one in wanted):
        problems.append(
            f"init {options.init} takes its start off the output head's weight, which is the embedding's, too: "
            "leave the head to another init"
        )
    whole = [*anatomy.widths, *anatomy.norms, anatomy.embedding]
    problems += strangers(options.modules_to_save or (), whole, what="place")
    return problems + token_problems(options.trainable_token_indices or (), anatomy)


def of_experts(target: str, anatomy: Anatomy) -> bool:
    """Whether PEFT's LoRA would take the name of a linear module for that of a fused weight."""
    kind = KINDS.get(anatomy.model_type)
    return kind is not None and any(names(before, target) for before in kind.before)


def lora_tuner() -> Tuner:
    from trainer.lora_tuner import LoraTuner

    return LoraTuner()


def ia3_config(options: Ia3Options, anatomy: Anatomy) -> Any:
    from peft import IA3Config

    targets, feedforward = ia3_targets(options, anatomy)
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=list(targets),
        feedforward_modules=list(feedforward),
        fan_in_fan_out=anatomy.conv1d,
    )


def ia3_problems(options: Ia3Options, anatomy: Anatomy, plan: Plan) -> list[str]:
    targets, _ = ia3_targets(options, anatomy)
    if not targets:
        return [
            f"no default targets are known for model type {anatomy.model_type}: "
            f"give targets and feedforward (its linear modules: {', '.join(anatomy.linear_names)})"
        ]
    return unknown_targets(targets, anatomy)


def ia3_targets(options: Ia3Options, anatomy: Anatomy) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choose the targets and, of them, the feedforward ones: the user's, else PEFT's for this model type, else none."""
    if options.targets is not None:
        return options.targets, options.feedforward or ()
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
    )

    kind = anatomy.model_type
    return tuple(TARGETS.get(kind, ())), tuple(FEEDFORWARD.get(kind, ()))


def prefix_config(options: PrefixOptions, anatomy: Anatomy) -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=options.virtual_tokens,
        prefix_projection=options.projection,
        encoder_hidden_size=options.projection_size,
        init_weights="zero" if options.init == "zero" else None,
    )


def prefix_problems(options: PrefixOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    problems = too_long(options, anatomy, plan)
    if plan.gradient_checkpointing:
        problems.append("gradient_checkpointing and a prefix of keys and values exclude each other: leave it off")
    if not anatomy.attention_interface:
        problems.append(
            f"{anatomy.architecture} does not attend through transformers' attention interface, "
            "where a prefix of keys and values is put in: try lora or prompt"
        )
    if anatomy.heads is None or anatomy.kv_heads is None or anatomy.head_dim is None:
        problems.append(f"{anatomy.architecture} does not say how many attention heads it has, and how wide")
    elif anatomy.heads % anatomy.kv_heads:
        problems.append(f"{anatomy.heads} attention heads do not share {anatomy.kv_heads} key/value heads evenly")
    if anatomy.uneven_heads:
        problems.append(f"the key/value heads of {anatomy.architecture} are not alike in shape, as a prefix needs them")
    if anatomy.sliding_window is not None and options.virtual_tokens >= anatomy.sliding_window:
        problems.append(
            f"virtual_tokens {options.virtual_tokens} fills the base's sliding window of {anatomy.sliding_window}"
        )
    return problems


def prompt_config(options: PromptOptions, anatomy: Anatomy) -> Any:
    from peft import PromptTuningConfig

    init = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}[options.init]
    return PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=options.virtual_tokens,
        prompt_tuning_init=init,
        prompt_tuning_init_text=options.init_text,
        tokenizer_name_or_path=str(anatomy.folder) if options.init == "text" else None,
    )


def prompt_problems(options: PromptOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    problems = too_long(options, anatomy, plan)
    if options.init_text is not None:
        tokens = anatomy.count_tokens(options.init_text)
        if tokens > options.virtual_tokens:
            problems.append(f"init_text has {tokens} tokens, more than virtual_tokens {options.virtual_tokens}")
        if tokens == 0:
            problems.append("init_text has no tokens")
    return problems


def p_tuning_config(options: PTuningOptions, anatomy: Anatomy) -> Any:
    from peft import PromptEncoderConfig

    return PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=options.virtual_tokens,
        encoder_reparameterization_type=options.encoder.upper(),
        encoder_hidden_size=options.encoder_size,
        encoder_num_layers=options.encoder_layers or 2,
        encoder_dropout=options.encoder_dropout,
    )


def p_tuning_problems(options: PTuningOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    return too_long(options, anatomy, plan)


def too_long(options: VirtualTokens, anatomy: Anatomy, plan: Plan) -> list[str]:
    """Virtual tokens take positions, so they and the longest row share the base's context."""
    if anatomy.context is None or options.virtual_tokens + plan.max_length <= anatomy.context:
        return []
    if options.virtual_tokens >= anatomy.context:
        return [
            f"virtual_tokens {options.virtual_tokens} leaves nothing of the base's context of {anatomy.context} tokens"
        ]
    return [
        f"virtual_tokens {options.virtual_tokens} and max_length {plan.max_length} together are above "
        f"the base's context of {anatomy.context} tokens"
    ]


METHODS: Final[Mapping[str, Method]] = {
    method.name: method
    for method in (
        Method(
            "lora",
            "adds a product of two thin matrices to linear modules; teaches new skills",
            LoraOptions, 1e-3, lora_config, lora_problems, lora_tuner,
        ),
        Method(
            "ia3",
            "rescales keys, values and feed-forward activations; a few thousand numbers",
            Ia3Options, 1e-2, ia3_config, ia3_problems,
        ),
        Method(
            "prefix",
            "puts trained keys and values before the text in every layer; steers skills that the base has",
            PrefixOptions, 1e-2, prefix_config, prefix_problems,
        ),
        Method(
            "prompt",
            "puts trained embeddings before the text; the smallest adapter, steers skills that the base has",
            PromptOptions, 3e-2, prompt_config, prompt_problems,
        ),
        Method(
            "p-tuning",
            "prompt tuning through a small network, which is folded in at export",
            PTuningOptions, 1e-3, p_tuning_config, p_tuning_problems,
        ),
        *LINEARS,
        *ROTATIONS,
        *FULL_RANK,
        *PARTS,
        BOTTLENECK,
        LOREFT,
        LT_SFT,
        DIFF_PRUNING,
        LORA_MOE,
    )
}  # fmt: skip
