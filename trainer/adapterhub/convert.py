"""Each method of AdapterHub into the kind that computes the same: a config and tensors in the formats of our hub.

`adapters` puts its LoRA on whole Linears, or on slices of gpt2's fused one; its IA3 scales outputs only; its prefix
leaves the positions of the text alone, so its keys are turned by as many positions as the prefix takes (RoPE only).
Meant is what its code says, not what comes out under sdpa without padding: there 1.3.0 attends to the wrong keys.
Source: adapters 1.3.0, methods/{bottleneck,modeling,lora,reft,prefix_tuning}.py.

V virtual tokens, O out, I in, R rank, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from hub.base import Base, Linear
from trainer.adapterhub import fields
from trainer.adapterhub.folder import Folder, Placed
from trainer.errors import ImportRefused
from trainer.families.edits import GENERAL
from trainer.modules.bottleneck import ACTIVATIONS

ROOT: Final = "base_model.model."
QKV: Final = ("q", "k", "v")  # the order in gpt2's c_attn


@dataclass(frozen=True, slots=True)
class Foundation:
    """What the base is; `turned` gives keys (.., head_dim) as they stand so many positions further on."""

    base: Base
    linears: Mapping[str, Linear]
    biased: frozenset[str]
    conv1d: bool
    turned: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Converted:
    """The two files; `peft_config` values are PEFT's own classes' to complete, by kind."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def convert(folder: Folder, foundation: Foundation) -> Converted:
    """Raises ImportRefused."""
    architecture = folder.config.get("architecture")
    converter = CONVERTERS.get(architecture)
    if converter is None:
        known = ", ".join(str(name or "bottleneck") for name in CONVERTERS)
        raise ImportRefused([f"architecture {architecture!r} is not converted; these are: {known}"])
    fields.check(folder.config, folder.about, FIELDS[architecture])
    converted = converter(folder, foundation)
    strangers = folder.left_over()
    if strangers:
        raise ImportRefused([f"{name} belongs to nothing in the config" for name in strangers])
    return converted


def bottleneck(folder: Folder, foundation: Foundation) -> Converted:
    config = folder.config
    tensors: dict[str, Tensor] = {}
    places = {"attention": "attention_adapters", "mlp": "output_adapters"}
    wanted = [place for place, key in (("attention", "mh_adapter"), ("mlp", "output_adapter")) if config[key]]
    sizes: dict[int, int] = {}
    rule = _product(folder.shared, "phm_rule") if config["phm_layer"] and config["shared_phm_rule"] else None
    for place in wanted:
        for placed in folder.places.get(places[place], {}).values():
            root = f"layers.{placed.layer}.{place}"
            for ours, theirs in (("down", "adapter_down.0"), ("up", "adapter_up")):
                tensors |= _projection(placed, theirs, f"{root}.{ours}", config, rule)
            if isinstance(config["scaling"], str):
                tensors[f"{root}.scaling"] = placed.take("scaling")
            sizes[placed.layer] = len(tensors[f"{root}.down.bias"])
    if not sizes:
        raise ImportRefused(["it adapts nothing"])
    most = max(set(sizes.values()), key=list(sizes.values()).count)
    others = {str(layer): size for layer, size in sizes.items() if size != most}
    return Converted(
        {
            **GENERAL,
            "peft_type": "BOTTLENECK",
            "places": wanted,
            "reads": _reads(config),
            "bottleneck_size": most,
            "layer_sizes": others or None,
            "layers": _layers(sizes, foundation),
            "non_linearity": _activation(config),
            "scaling": config["scaling"],
            "norm_before": False,
            "phm_dim": config["phm_dim"] if config["phm_layer"] else None,
            "phm_rank": config["phm_rank"] if config["phm_layer"] and config["factorized_phm_W"] else None,
        },
        tensors,
    )


def _reads(config: Mapping[str, Any]) -> str:
    """What the adapter sees, where the sum of stream, sublayer and adapter is what the network goes on with."""
    before, after = config["original_ln_before"], config["original_ln_after"]
    residual = config["residual_before_ln"]
    if residual == "post_add":
        raise ImportRefused(["residual_before_ln 'post_add' is not converted; only true and false are"])
    if config["is_parallel"]:
        found = "residual" if after else None
    elif before:
        found = "stream" if after == residual else None
    else:
        found = "output" if after else None
    if found is None:
        raise ImportRefused([
            f"original_ln_before {before}, original_ln_after {after} and residual_before_ln {residual} together drop "
            "the residual stream or add it twice"
        ])  # fmt: skip
    return found


def _projection(
    placed: Placed, theirs: str, ours: str, config: Mapping[str, Any], rule: Tensor | None
) -> dict[str, Tensor]:
    if not config["phm_layer"]:
        return {f"{ours}.{part}": placed.take(f"{theirs}.{part}") for part in ("weight", "bias")}
    own = {part.removeprefix(f"{theirs}."): part for part in list(placed.tensors) if part.startswith(f"{theirs}.")}
    taken = {name: placed.take(part) for name, part in own.items()}
    rule = _product(taken, "phm_rule") if rule is None else rule
    made = {f"{ours}.phm_rule": rule.clone()}
    if config["factorized_phm_W"]:
        made |= {f"{ours}.phm_left": taken.pop("W_left"), f"{ours}.phm_right": taken.pop("W_right")}
        width = made[f"{ours}.phm_right"].shape[-1]
    else:
        made[f"{ours}.phm_weight"] = taken.pop("W")
        width = made[f"{ours}.phm_weight"].shape[-1]
    made[f"{ours}.bias"] = taken.pop("b") if config["phm_bias"] else torch.zeros(width * len(rule))
    if taken:
        raise ImportRefused([f"{placed.module}: {theirs}.{name} belongs to nothing in the config" for name in taken])
    return made


def _product(tensors: dict[str, Tensor], name: str) -> Tensor:
    """A rule of Compacter, whole or as its two factors."""
    if name in tensors:
        return tensors.pop(name).float()
    factors = [tensors.pop(f"{name}_{side}", None) for side in ("left", "right")]
    if any(factor is None for factor in factors):
        raise ImportRefused([f"{name} is missing"])
    left, right = factors
    return (left @ right).float()  # type: ignore[operator]  # neither is None


def loreft(folder: Folder, foundation: Foundation) -> Converted:
    config = folder.config
    tensors: dict[str, Tensor] = {}
    first, last, tied = config["prefix_positions"], config["suffix_positions"], config["tied_weights"]
    ends = [(f"f{first}", first), (f"l{last}", last)]
    positions = "+".join(name for name, count in ends if count)
    if not positions:
        raise ImportRefused(["prefix_positions and suffix_positions are both 0"])
    layers = []
    for placed in folder.places.get("reft_layer", {}).values():
        layers.append(placed.layer)
        units = [_unit(placed, f"units.{number}") for number in range(1 if tied else 2)]
        root = f"layers.{placed.layer}"
        if tied or not (first and last):
            named = {root: units[0] if tied or first else units[1]}
        else:
            named = {f"{root}.first": units[0], f"{root}.last": units[1]}
        tensors |= {f"{name}.{part}": value for name, unit in named.items() for part, value in unit.items()}
    return Converted(
        {
            **GENERAL,
            "peft_type": "LOREFT",
            "r": config["r"],
            "layers": _layers(layers, foundation),
            "positions": positions,
            "tied_weights": bool(tied and first and last),
            "non_linearity": _activation(config),
            "subtract_projection": True,
            "orthogonality": True,
        },
        tensors,
    )


def _unit(placed: Placed, unit: str) -> dict[str, Tensor]:
    """One intervention; R as torch makes it of what `adapters` saves, its orthogonal parametrization."""
    found = {
        f"learned_source.{part}": placed.take(f"{unit}.learned_source.{part}").clone() for part in ("weight", "bias")
    }
    original = placed.take(f"{unit}.projection.parametrizations.weight.original")
    base = placed.take(f"{unit}.projection.parametrizations.weight.0.base")
    rotation: Any = orthogonal(nn.Linear(original.shape[1], original.shape[0], bias=False))
    rotation.load_state_dict({"parametrizations.weight.original": original, "parametrizations.weight.0.base": base})
    return {**found, "rotate_layer.weight": rotation.weight.detach().clone()}


def lora(folder: Folder, foundation: Foundation) -> Converted:
    if folder.config["composition_mode"] == "scale":
        return ia3(folder, foundation)
    config, tensors = folder.config, {}
    if config["composition_mode"] != "add":
        raise ImportRefused([f"composition_mode {config['composition_mode']!r}; add and scale are converted"])
    rank_pattern, alpha_pattern, targets = {}, {}, []
    for placed in folder.places.get("loras", {}).values():
        module, linear = _linear(placed, foundation)
        A_RI, B_OR = placed.take("lora_A"), placed.take("lora_B")
        slots = _slots(module, config, linear, B_OR)
        if slots is not None:
            A_RI, B_OR = A_RI.clone(), _spread(B_OR, slots, config["r"], linear.outputs)
            rank_pattern[module], alpha_pattern[module] = len(A_RI), config["alpha"] * len(slots)
        tensors[f"{ROOT}{module}.lora_A.weight"], tensors[f"{ROOT}{module}.lora_B.weight"] = A_RI, B_OR
        if config["use_dora"]:
            tensors[f"{ROOT}{module}.lora_magnitude_vector"] = _magnitude(placed, module, config, foundation)
        targets.append(module)
    return Converted(
        {
            **GENERAL,
            "peft_type": "LORA",
            "r": config["r"],
            "lora_alpha": config["alpha"],
            "target_modules": sorted(targets),
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "use_dora": config["use_dora"],
            "fan_in_fan_out": foundation.conv1d,
        },
        tensors,
    )


def ia3(folder: Folder, foundation: Foundation) -> Converted:
    tensors, targets = {}, []
    for placed in folder.places.get("loras", {}).values():
        module, linear = _linear(placed, foundation)
        scale_O1 = placed.take("lora_B").reshape(-1, 1) * folder.config["alpha"]
        slots = _slots(module, folder.config, linear, scale_O1)
        if slots is not None:
            whole = torch.ones(len(QKV), linear.outputs // len(QKV))
            whole[slots] = scale_O1.view(len(slots), -1)
            scale_O1 = whole.reshape(-1, 1)
        tensors[f"{ROOT}{module}.ia3_l"] = scale_O1
        targets.append(module)
    config = {"target_modules": sorted(targets), "feedforward_modules": [], "fan_in_fan_out": foundation.conv1d}
    return Converted({**GENERAL, "peft_type": "IA3", **config}, tensors)


def _linear(placed: Placed, foundation: Foundation) -> tuple[str, Linear]:
    """A module of the causal LM by its whole name, which a file of the bare network may not give."""
    for prefix in ("", "model.", "transformer."):
        if (name := prefix + placed.module) in foundation.linears:
            return name, foundation.linears[name]
    raise ImportRefused([f"{placed.module} is no Linear of base {foundation.base.name}"])


def _slots(module: str, config: Mapping[str, Any], linear: Linear, rows: Tensor) -> list[int] | None:
    """Which thirds of gpt2's fused c_attn are adapted; None for a Linear that is adapted whole."""
    if not module.endswith(".c_attn"):
        if len(rows) != linear.outputs:
            raise ImportRefused([f"{module} has {linear.outputs} outputs, the adapter {len(rows)}"])
        return None
    slots = [slot for slot, matrix in enumerate(QKV) if matrix in config["attn_matrices"]]
    if not slots or len(rows) * len(QKV) != linear.outputs * len(slots):
        raise ImportRefused(
            [f"{module} has {linear.outputs} outputs, which attn_matrices does not divide as the adapter"]
        )
    return slots


def _spread(B_OR: Tensor, slots: list[int], rank: int, outputs: int) -> Tensor:
    """One B per third, each for its own A, as one B for all of them."""
    width = outputs // len(QKV)
    whole = torch.zeros(outputs, rank * len(slots))
    for number, slot in enumerate(slots):
        rows = B_OR[number * width : (number + 1) * width]
        whole[slot * width : (slot + 1) * width, number * rank : (number + 1) * rank] = rows
    return whole


def _magnitude(placed: Placed, module: str, config: Mapping[str, Any], foundation: Foundation) -> Tensor:
    if config["alpha"] != config["r"]:
        raise ImportRefused([
            f"use_dora with alpha {config['alpha']} and r {config['r']}: `adapters` takes the rows' lengths without "
            "alpha / r, so only equal ones mean the same elsewhere"
        ])  # fmt: skip
    if module in foundation.biased:
        raise ImportRefused([f"use_dora on {module}: `adapters` scales the bias of the base with it, no one else does"])
    return placed.take("m.weight").flatten()


def prefix(folder: Folder, foundation: Foundation) -> Converted:
    config, base = folder.config, foundation.base
    length, layers = config["prefix_length"], base.layers
    if base.kv_heads != base.heads:
        raise ImportRefused(["a prefix on grouped-query attention: that of `adapters` has no meaning there"])
    if config["flat"]:
        flat = folder.prefix.pop("control_trans").float()
    else:
        names = ("wte.weight", "control_trans.0.weight", "control_trans.0.bias", "control_trans.2.weight")
        wte, first, bias, second = (folder.prefix.pop(name).float() for name in names)
        middle = ACTIVATIONS[_activation(config)](nn.functional.linear(wte, first, bias))
        flat = nn.functional.linear(middle, second, folder.prefix.pop("control_trans.2.bias").float())
    if flat.numel() != length * 2 * layers * base.kv_width:
        raise ImportRefused([f"the prefix holds {flat.numel()} numbers, not those of {layers} layers of {base.name}"])
    made = flat.view(length, layers, 2, base.kv_heads, base.head_dim).clone()
    made[:, :, 0] = foundation.turned(made[:, :, 0], length)
    sizes = {"token_dim": base.kv_width, "num_layers": layers, "num_attention_heads": base.kv_heads}
    return Converted(
        {
            **GENERAL,
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": length,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
            "encoder_hidden_size": None,
            **sizes,
        },
        {"prompt_embeddings": made.reshape(length, -1)},
    )


def _activation(config: Mapping[str, Any]) -> str:
    name = (config["non_linearity"] or "none").lower()
    if name not in ACTIVATIONS:
        raise ImportRefused([f"non_linearity {name} is not converted; these are: {', '.join(ACTIVATIONS)}"])
    return name


def _layers(found: Any, foundation: Foundation) -> list[int] | None:
    layers = sorted(found)
    return None if layers == list(range(foundation.base.layers)) else layers


CONVERTERS: Final[Mapping[Any, Callable[[Folder, Foundation], Converted]]] = {
    None: bottleneck, "reft": loreft, "lora": lora, "prefix_tuning": prefix,
}  # fmt: skip
FIELDS: Final[Mapping[Any, fields.Fields]] = {
    None: fields.BOTTLENECK, "reft": fields.REFT, "lora": fields.LORA, "prefix_tuning": fields.PREFIX,
}  # fmt: skip
