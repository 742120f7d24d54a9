"""Methods that edit the residual stream: bottleneck adapters and LoReFT, trained by modules of ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from trainer.anatomy import Anatomy
from trainer.method import Method, Options, Plan

if TYPE_CHECKING:
    from trainer.tuner import Tuner

GENERAL: Final = {"task_type": "CAUSAL_LM", "revision": None}
Activation = Literal["relu", "gelu", "gelu_new", "silu", "tanh", "leakyrelu", "none"]
# What each style is, where an option does not say otherwise.
STYLES: Final[Mapping[str, Mapping[str, Any]]] = {
    "houlsby": {"places": ["attention", "mlp"], "reads": "output", "non_linearity": "silu", "scaling": 1.0},
    "pfeiffer": {"places": ["mlp"], "reads": "stream", "non_linearity": "relu", "scaling": 1.0},
    "parallel": {"places": ["mlp"], "reads": "input", "non_linearity": "relu", "scaling": 4.0},
    "compacter": {"places": ["attention", "mlp"], "reads": "output", "non_linearity": "gelu", "scaling": 1.0},
}
TERMS: Final = 4  # of Compacter's sums of Kronecker products, unless told


class Layered(Options):
    layers: tuple[int, ...] | None = Field(None, min_length=1, description="numbers of the layers; default: all")


class BottleneckOptions(Layered):
    style: Literal["houlsby", "pfeiffer", "parallel", "compacter"] = Field(
        "pfeiffer",
        description="after attention and MLP, after the MLP, beside the MLP, or houlsby in Kronecker products",
    )
    size: int = Field(16, ge=1, description="width of the bottleneck")
    activation: Activation | None = Field(None, description="between its two layers; default: the style's")
    scaling: float | Literal["learned", "channel"] | None = Field(
        None, description="factor of what is added: a number, one learned, or one per channel; default: the style's"
    )
    norm: bool = Field(False, description="a LayerNorm of its own before it")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what is added")
    terms: int | None = Field(
        None, ge=1, description="compacter: terms of each sum, which divide both widths; default: 4"
    )
    term_rank: int | None = Field(None, ge=1, description="compacter: rank of each term; default: 1")

    @model_validator(mode="after")
    def terms_are_compacters(self) -> BottleneckOptions:
        given = [name for name in ("terms", "term_rank") if getattr(self, name) is not None]
        if given and self.style != "compacter":
            raise ValueError(f"{', '.join(given)}: only with style: compacter")
        if self.style == "compacter" and self.size % (self.terms or TERMS):
            raise ValueError(f"terms {self.terms or TERMS} does not divide the size {self.size}")
        return self


class LoreftOptions(Layered):
    rank: int = Field(4, ge=1, description="dimensions of the subspace that is edited")
    positions: str = Field("f4+l4", description="which tokens of the prompt: f4, l4 or f4+l4 (first, last)")
    tied: bool = Field(False, description="one edit for both ends of the prompt, not one each")
    activation: Activation | None = Field(None, description="of what is learned; default: none")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what is added")

    @field_validator("positions")
    @classmethod
    def positions_are_ends(cls, value: str) -> str:
        if not re.fullmatch(r"f[1-9]\d*|l[1-9]\d*|f[1-9]\d*\+l[1-9]\d*", value):
            raise ValueError(f"positions {value!r}: f4, l4 or f4+l4 is wanted, with numbers above 0")
        return value

    @model_validator(mode="after")
    def only_two_ends_are_tied(self) -> LoreftOptions:
        if self.tied and "+" not in self.positions:
            raise ValueError("tied needs positions at both ends")
        return self


def bottleneck_config(options: BottleneckOptions, anatomy: Anatomy) -> dict[str, Any]:
    style = STYLES[options.style]
    compacter = options.style == "compacter"
    return {
        **GENERAL,
        "peft_type": "BOTTLENECK",
        **style,
        "bottleneck_size": options.size,
        "layers": layers_of(options),
        "non_linearity": options.activation or style["non_linearity"],
        "scaling": style["scaling"] if options.scaling is None else options.scaling,
        "norm_before": options.norm,
        "phm_dim": (options.terms or TERMS) if compacter else None,
        "phm_rank": (options.term_rank or 1) if compacter else None,
        "dropout": options.dropout,
    }


def loreft_config(options: LoreftOptions, anatomy: Anatomy) -> dict[str, Any]:
    return {
        **GENERAL,
        "peft_type": "LOREFT",
        "r": options.rank,
        "layers": layers_of(options),
        "positions": options.positions,
        "tied_weights": options.tied,
        "non_linearity": options.activation or "none",
        "subtract_projection": True,
        "orthogonality": True,
        "dropout": options.dropout,
    }


def layers_of(options: Layered) -> list[int] | None:
    return None if options.layers is None else sorted(set(options.layers))


def bottleneck_problems(options: BottleneckOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    problems = unknown_layers(options, anatomy)
    terms = options.terms or TERMS
    if options.style == "compacter" and anatomy.hidden_size is not None and anatomy.hidden_size % terms:
        problems.append(f"terms {terms} does not divide the base's hidden size {anatomy.hidden_size}")
    return problems


def loreft_problems(options: LoreftOptions, anatomy: Anatomy, plan: Plan) -> list[str]:
    problems = unknown_layers(options, anatomy)
    if anatomy.hidden_size is not None and options.rank > anatomy.hidden_size:
        problems.append(f"rank {options.rank} is above the base's hidden size {anatomy.hidden_size}")
    return problems


def unknown_layers(options: Layered, anatomy: Anatomy) -> list[str]:
    if options.layers is None or anatomy.layers is None:
        return []
    strange = sorted(layer for layer in options.layers if not 0 <= layer < anatomy.layers)
    return [f"layer {strange[0]} is not in the base, which has {anatomy.layers} layers, from 0 on"] if strange else []


def module_tuner() -> Tuner:
    from trainer.tuner import ModuleTuner

    return ModuleTuner()


def prompt_reading_tuner() -> Tuner:
    from trainer.tuner import PromptReadingTuner

    return PromptReadingTuner()


BOTTLENECK: Final = Method(
    "bottleneck",
    "adds a small network after or beside attention and MLP (Houlsby, Pfeiffer, Compacter); teaches new skills",
    BottleneckOptions, 1e-3, bottleneck_config, bottleneck_problems, module_tuner,
)  # fmt: skip
LOREFT: Final = Method(
    "loreft",
    "edits the hidden states of the prompt's first and last tokens in a small subspace; steers, in very few numbers",
    LoreftOptions, 2e-3, loreft_config, loreft_problems, prompt_reading_tuner,
)  # fmt: skip
