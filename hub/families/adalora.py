"""AdaLoRA: LoRA as triplets of a singular value decomposition, of which rank_pattern says which are left.

r triplets that are left, of init_r; I in, O out.
Source: Zhang et al. 2023 (arXiv:2303.10512); peft 0.21.2, tuners/adalora/config.py, model.py and layer.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.change import Change, Found
from hub.families.linears import linear_layout
from hub.families.lora import SHARED
from hub.families.method import INERT, AtLinear, Config, Field, Layout, Method, Part
from hub.fields import MAX_NAMES, shown
from hub.ref import printable
from hub.targets import target_modules

RANK_EPSILON = 1e-5  # PEFT's, so that a rank of zero divides
_MASKED = re.compile(r"(?P<module>[A-Za-z0-9_.]{1,500})\.lora_E", re.ASCII)


def _masks(value: Any) -> str | None:
    """Which triplets each module has kept, by the name of its tensor of singular values."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_NAMES:
        return f"must be an object of at most {MAX_NAMES} masks, not {shown(value)}"
    for name, mask in value.items():
        if _MASKED.fullmatch(name) is None:
            return f"{shown(name)} is not <module>.lora_E"
        if not isinstance(mask, list) or not all(isinstance(kept, bool) for kept in mask):
            return f"{shown(name)} must be a list of true and false, not {shown(mask)}"
    return None


def _alpha(value: Any) -> str | None:
    reason = fields.number(value)
    if reason is None and value <= 0:
        return f"must be above 0, not {value}: PEFT would take the rank in its place, which differs when it is loaded"
    return reason


FIELDS: Mapping[str, Field] = {
    **SHARED,
    "init_r": Field(fields.positive, shapes_tensors=True),
    "lora_alpha": Field(_alpha),
    "rank_pattern": Field(_masks, shapes_tensors=True),
    # Inert: they steer which triplets training has cut; r is written by PEFT and read by nobody.
    "r": Field(fields.positive),
    "target_r": INERT,
    "tinit": INERT,
    "tfinal": INERT,
    "deltaT": INERT,
    "beta1": INERT,
    "beta2": INERT,
    "orth_reg_weight": INERT,
    "total_step": INERT,
    # Neutral: options of LoRA that AdaLoRA would pass over.
    "use_dora": Field(fields.neutral(False, why="AdaLoRA has no DoRA")),
    "alora_invocation_tokens": Field(fields.neutral(None, [], why="AdaLoRA is never activated")),
    "use_rslora": Field(fields.neutral(False, why="AdaLoRA scales by init_r")),
    "lora_bias": Field(fields.neutral(False, why="AdaLoRA has none")),
    "alpha_pattern": Field(fields.neutral({}, None, why="AdaLoRA has one alpha")),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    before = config["init_r"]
    mask = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
    complaint = None
    if mask is not None and len(mask) != before:
        complaint = ("rank_pattern", f"{printable(module)}.lora_E has {len(mask)} values, init_r is {before}")
    rank = before if mask is None else sum(mask)
    return Part(
        {"lora_A": (rank, linear.inputs), "lora_B": (linear.outputs, rank), "lora_E": (rank, 1)}, rank, complaint
    )


def _change(config: Config, found: Found) -> Change:
    """y += alpha / (init_r + 1e-5) * B (e * A) x; the triplets that were cut are not in the file."""
    scaling = config["lora_alpha"] / (config["init_r"] + RANK_EPSILON)
    return Change(found.tensors["lora_A"] * found.tensors["lora_E"], found.tensors["lora_B"] * scaling)


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    layout = linear_layout(config, base, modules, part=_part)
    adapted = {f"{module}.lora_E" for module in target_modules(config, modules)}
    strange = sorted((config.get("rank_pattern") or {}).keys() - adapted)
    if not strange:
        return layout
    complaint = ("rank_pattern", f"{strange[0]} belongs to no module that is adapted")
    return replace(layout, complaints=(*layout.complaints, complaint))


def _ranks(config: Config) -> Iterable[tuple[str, int]]:
    masks = config.get("rank_pattern")
    if isinstance(masks, dict) and masks and _masks(masks) is None:
        return [("rank_pattern", max(sum(mask) for mask in masks.values()))]
    return [("init_r", config["init_r"])] if type(config.get("init_r")) is int else []


ADALORA = Method(
    "adalora",
    "ADALORA",
    FIELDS,
    required=("init_r", "lora_alpha", "target_modules"),
    layout=_layout,
    ranks=_ranks,
    at_linear=AtLinear(_part, _change),
)
