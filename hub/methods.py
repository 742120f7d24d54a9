"""The table of adapter kinds, and what a config as a whole says: one row per kind, each in a file of `hub.families`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hub.base import Base, Modules
from hub.families.adalora import ADALORA
from hub.families.beft import BEFT
from hub.families.bitfit import BITFIT
from hub.families.boft import BOFT
from hub.families.bottleneck import BOTTLENECK
from hub.families.c3a import C3A
from hub.families.delora import DELORA
from hub.families.fourierft import FOURIERFT
from hub.families.hira import HIRA
from hub.families.hra import HRA
from hub.families.ia3 import IA3
from hub.families.ln_tuning import LN_TUNING
from hub.families.loha import LOHA
from hub.families.lokr import LOKR
from hub.families.lora import LORA
from hub.families.lora_moe import LORA_MOE
from hub.families.loreft import LOREFT
from hub.families.method import TENSOR_PREFIX, Complaint, Config, Layout, Method
from hub.families.miss import MISS
from hub.families.oft import OFT
from hub.families.prompts import MULTITASK_PROMPT, P_TUNING, PREFIX, PROMPT
from hub.families.road import ROAD
from hub.families.shira import SHIRA
from hub.families.sparse import SPARSE
from hub.families.trainable_tokens import TRAINABLE_TOKENS
from hub.families.vera import VERA
from hub.families.whole import with_whole
from hub.ref import printable

_ROWS = (
    LORA, ADALORA, VERA, LOHA, HRA, MISS, DELORA, IA3, BEFT, BITFIT, LN_TUNING, TRAINABLE_TOKENS,
    OFT, BOFT, ROAD, SHIRA, SPARSE, LOKR, FOURIERFT, C3A, HIRA,
    PREFIX, PROMPT, MULTITASK_PROMPT, P_TUNING,
    BOTTLENECK, LOREFT, LORA_MOE,
)  # fmt: skip
METHODS: Mapping[str, Method] = {method.peft_type: method for method in _ROWS}

# Why a kind that people have is not in the table.
_NOT_SERVED: Mapping[str, str] = {
    "WAVEFT": "the wavelets that it is made of are tables of PEFT's own",
    "RANDLORA": "its change is of full rank, of random bases that PEFT draws anew from a seed or not at all",
    "GLORA": "its change is of full rank, by a form of each layer's own choice",
    "LILY": "its router averages over all tokens of a batch, so neighbours would change each other's answers",
    "XLORA": "it runs every token twice: the first pass only tells how to mix in the second",
    "ADAPTION_PROMPT": "its prompt is attended to by a gated softmax of its own, beside that of the attention",
    "BONE": "PEFT has renamed it; save it as MISS",
}

_SETS = frozenset({"target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "target_parameters"})


@dataclass(frozen=True, slots=True)
class Limits:
    """What a hub accepts of an adapter's size. Units: bytes where named."""

    max_rank: int = 256
    max_virtual_tokens: int = 1024
    max_weights_bytes: int = 8 << 30


def method_of(config: Config) -> Method | str:
    """The method of a config, or why there is none."""
    peft_type = config.get("peft_type")
    if isinstance(peft_type, str) and peft_type in METHODS:
        return METHODS[peft_type]
    if peft_type is None:
        return f"is missing; served are {', '.join(METHODS)}"
    why = _NOT_SERVED.get(str(peft_type))
    return f"{printable(str(peft_type))} is not served{f' ({why})' if why else ''}; served are {', '.join(METHODS)}"


def config_complaints(method: Method, config: Config, limits: Limits) -> list[Complaint]:
    """Every (key, reason) of a config that we would have to ignore, misread or refuse."""
    complaints = []
    for key, value in config.items():
        field = method.fields.get(key)
        reason = _unknown(key, method) if field is None else field.check(value)
        if reason is not None:
            complaints.append((printable(key), reason))
    complaints += [(key, "is missing") for key in method.required if key not in config]
    complaints += [*_contradictions(config), *method.contradictions(config)]
    return complaints + _above_limits(method, config, limits)


def shapes_are_told(method: Method, config: Config) -> bool:
    """Whether the keys that the layout reads are sound, so that it can be computed in spite of other complaints."""
    read = [key for key, field in method.fields.items() if field.shapes_tensors]
    return all(method.fields[key].check(config[key]) is None for key in read if key in config) and all(
        key in config for key in method.required if key in read
    )


def layout_of(method: Method, config: Config, base: Base, modules: Modules) -> Layout:
    """The tensors that a config demands on a base, for which `shapes_are_told`."""
    layout = method.layout(config, base, modules)
    if layout.shapes and not any(name.startswith(TENSOR_PREFIX) for name in layout.shapes):
        return (
            layout  # virtual tokens, and formats of our own that are named by layers: nothing else stands beside them
        )
    return with_whole(config, base, modules, layout=layout)


def canonical_config(config: Config) -> dict[str, Any]:
    """The config with its set-like lists sorted: PEFT writes them from sets, in another order every time."""
    return {key: _sorted(value) if key in _SETS else value for key, value in config.items()}


def virtual_tokens(config: Config) -> int | None:
    """The length of a prefix or prompt, None for other kinds."""
    value = config.get("num_virtual_tokens")
    return value if isinstance(value, int) else None


def _contradictions(config: Config) -> list[Complaint]:
    """Combinations of targets that PEFT itself refuses to load, or of which it would ignore one."""
    if isinstance(config.get("target_modules"), str):
        return [
            (key, "cannot stand beside a target_modules that is a text")
            for key in ("layers_to_transform", "layers_pattern")
            if config.get(key) is not None
        ]
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        return [("layers_pattern", "needs layers_to_transform")]
    return []


def _above_limits(method: Method, config: Config, limits: Limits) -> list[Complaint]:
    complaints = []
    for key, rank in method.ranks(config):
        if rank > limits.max_rank:
            asked = config[key]
            made = f"{asked} makes rank {rank}, which" if type(asked) is int and asked != rank else f"rank {rank}"
            complaints.append((key, f"{made} is above max_rank {limits.max_rank} (the largest that this hub accepts)"))
    tokens = config.get("num_virtual_tokens")
    if type(tokens) is int and tokens > limits.max_virtual_tokens:
        complaints.append(("num_virtual_tokens", f"{tokens} is above max_virtual_tokens {limits.max_virtual_tokens}"))
    return complaints


def _unknown(key: str, method: Method) -> str:
    near = difflib.get_close_matches(key, list(method.fields), n=1)
    return f"is no field of {method.peft_type}" + (f"; did you mean {near[0]}?" if near else "")


def _sorted(value: Any) -> Any:
    return sorted(set(value)) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
