"""LoRA on weights that belong to no Linear, of routers and experts: `target_parameters`.

PEFT finds a weight by its full name or the end of one, whatever exclude_modules and layers_to_transform say; it wraps a
module once for each weight of it that is targeted, in the module's order, the last outermost, and an inner wrapper's
tensors have `base_layer` in their names.
Source: peft 0.21.2, tuners/tuners_utils.py `_inject_parameters`, tuners/lora/layer.py `ParamWrapper`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hub import fields
from hub.base import Base, Modules
from hub.experts import KINDS
from hub.families.method import TENSOR_PREFIX, Complaint, Config, Field, Layout
from hub.ref import printable
from hub.targets import pattern_value

KEY = "target_parameters"
# What PEFT refuses beside it, and what it would pass over.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "lora_dropout": (0,),
    "bias": ("none",),
}


def _names(value: Any) -> str | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        return f"must be a list of names of weights, not {fields.shown(value)}"
    return fields.module_names(value)


def _modules(value: Any) -> str | None:
    """As `module_names`; none at all where weights are targeted, which `parameter_contradictions` sees to."""
    return None if value is None or value == [] else fields.module_names(value)


FIELDS: Mapping[str, Field] = {
    KEY: Field(_names, shapes_tensors=True),
    "target_modules": Field(_modules, shapes_tensors=True),
}


def parameter_contradictions(config: Config) -> list[Complaint]:
    """What cannot stand beside target_parameters, and targets that are none."""
    if not config.get(KEY):
        no_targets = "target_modules" in config and not config["target_modules"]
        return [("target_modules", str(fields.module_names(config["target_modules"])))] if no_targets else []
    if _names(config[KEY]) is not None:
        return []  # it has that complaint
    return [
        (key, f"{fields.shown(config[key])} cannot stand beside {KEY}; only {fields.shown(only[0])} can")
        for key, only in _ONLY.items()
        if key in config and config[key] not in only
    ]


def with_parameters(layout: Layout, config: Config, base: Base, modules: Modules) -> Layout:
    """The layout with the tensors of the weights that are targeted, and what is wrong with them."""
    asked = config.get(KEY) or []
    complaints = [*layout.complaints, *_names_of_before(config, base)]
    complaints += [(KEY, reason) for reason in (_complaint(name, modules) for name in asked) if reason is not None]
    by_module: dict[str, list[str]] = {}
    for name in modules.parameters:
        if any(_fits(name, one) for one in asked):
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    shapes, ranks = dict(layout.shapes), [layout.rank] if layout.rank is not None else []
    for module, names in by_module.items():
        for depth, name in enumerate(reversed(names)):
            rank: int = pattern_value(config.get("rank_pattern") or {}, name, config["r"])
            sizes = modules.parameters[name]
            stored = f"{TENSOR_PREFIX}{module}{'.base_layer' * depth}"
            shapes[f"{stored}.lora_A.weight"] = (rank * sizes.experts, sizes.inputs)
            shapes[f"{stored}.lora_B.weight"] = (sizes.outputs, rank * sizes.experts)
            ranks.append(rank)
    leaves = {_leaf(name) for names in by_module.values() for name in names}
    return replace(
        layout,
        shapes=shapes,
        complaints=tuple(complaints),
        rank=max(ranks, default=None),
        targets=tuple(sorted({*layout.targets, *leaves})),
    )


def _fits(name: str, asked: str) -> bool:
    return name == asked or name.endswith(f".{asked}")


def _leaf(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module.rpartition('.')[2]}.{leaf}" if leaf == "weight" else leaf


def _complaint(asked: str, modules: Modules) -> str | None:
    """Every weight of the base that a name fits must be one that is served."""
    linear = next((module for module in modules.linears if _fits(f"{module}.weight", asked)), None)
    if linear is not None:
        return f"{printable(asked)} is the weight of a Linear layer, {printable(linear)}; name that in target_modules"
    for module in sorted(modules.others):
        for weight in (f"{module}.weight", f"{module}.bias"):
            if (
                weight not in modules.parameters
                and f"{module}.weight" not in modules.parameters
                and _fits(weight, asked)
            ):
                return f"{printable(asked)} is {printable(weight)}, no weight of a router or of experts"
    if any(_fits(name, asked) for name in modules.parameters):
        return None
    known = ", ".join(sorted({_leaf(name) for name in modules.parameters}))
    return f"{printable(asked)} is no weight of a router or of experts of the base" + (
        f" (it has {known})" if known else ", which has none"
    )


def _names_of_before(config: Config, base: Base) -> list[Complaint]:
    """PEFT takes names of before transformers 5 for the fused weights, though a Linear may have such a name today."""
    kind, listed = KINDS.get(base.model_type), config.get("target_modules")
    if kind is None or not isinstance(listed, list):
        return []
    old = sorted({name for name in listed for before in kind.before if _fits(name, before)})
    return (
        [
            (
                "target_modules",
                f"{printable(old[0])} is what a router or an expert was called before transformers 5, and PEFT adapts "
                f"their fused weights in its place; load the adapter with PEFT and save it anew, with {KEY}",
            )
        ]
        if old
        else []
    )
