"""Bottleneck adapters behind the attention, the MLP or both: Houlsby, Pfeiffer, parallel, Compacter.

Source: adapters 1.3.0, configuration/adapter_config.py and methods/modeling.py; the format is ours: decision 17.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hub import fields
from hub.base import Base, Modules
from hub.families.method import COMMON, INERT, Complaint, Config, Field, Layout, Method
from hub.families.stream import LAYERS, MAX_LAYERS, NON_LINEARITY, beyond, meant_layers

SUBLAYERS = ("attention", "mlp")
READS = ("output", "stream", "residual", "input")
SCALINGS = ("learned", "channel")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


def _places(value: Any) -> str | None:
    if isinstance(value, list) and value and all(item in SUBLAYERS for item in value) and len(set(value)) == len(value):
        return None
    return f"must be a list of {' and '.join(SUBLAYERS)}, each at most once, not {fields.shown(value)}"


def _sizes(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MAX_LAYERS:
        return f"must be an object of at most {MAX_LAYERS} sizes by layer number, not {fields.shown(value)}"
    for layer, size in value.items():
        if not _NUMBER.fullmatch(layer):
            return f"{fields.shown(layer)} is no layer number"
        if (reason := fields.positive(size)) is not None:
            return f"{layer} {reason}"
    return None


def _scaling(value: Any) -> str | None:
    if value in SCALINGS or fields.number(value) is None:
        return None
    return f"must be a finite number, {' or '.join(SCALINGS)}, not {fields.shown(value)}"


FIELDS: Mapping[str, Field] = {
    **COMMON,
    "places": Field(_places, shapes_tensors=True),
    "reads": Field(fields.one_of(*READS)),
    "bottleneck_size": Field(fields.positive, shapes_tensors=True),
    "layer_sizes": Field(_sizes, shapes_tensors=True),
    "layers": LAYERS,
    "non_linearity": NON_LINEARITY,
    "scaling": Field(_scaling, shapes_tensors=True),
    "norm_before": Field(fields.boolean, shapes_tensors=True),
    "phm_dim": Field(fields.optional_positive, shapes_tensors=True),
    "phm_rank": Field(fields.optional_positive, shapes_tensors=True),
    "dropout": INERT,
    "init_weights": INERT,
}


def size_of(config: Config, layer: int) -> int:
    """The width of the bottlenecks of a layer."""
    sizes: Mapping[str, int] = config.get("layer_sizes") or {}
    usual: int = config["bottleneck_size"]
    return sizes.get(str(layer), usual)


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    layers, complaints = meant_layers(config, base)
    complaints += beyond("layer_sizes", [int(layer) for layer in config.get("layer_sizes") or {}], base)
    sizes = {layer: size_of(config, layer) for layer in layers}
    complaints += _indivisible(config, base, sizes.values())
    shapes: dict[str, tuple[int, ...]] = {}
    if not complaints:
        for layer, size in sizes.items():
            for sublayer in config["places"]:
                parts = _parts(config, base.hidden_size, size)
                shapes |= {f"layers.{layer}.{sublayer}.{part}": shape for part, shape in parts.items()}
    return Layout(shapes, tuple(complaints), max(sizes.values(), default=None), tuple(sorted(config["places"])))


def _parts(config: Config, hidden: int, size: int) -> dict[str, tuple[int, ...]]:
    parts = {
        **_linear(config, "down", inputs=hidden, outputs=size),
        **_linear(config, "up", inputs=size, outputs=hidden),
    }
    if config.get("norm_before"):
        parts |= {"norm.weight": (hidden,), "norm.bias": (hidden,)}
    scaling = config.get("scaling")
    if scaling in SCALINGS:
        parts["scaling"] = (1,) if scaling == "learned" else (hidden,)
    return parts


def _linear(config: Config, half: str, *, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    parts: dict[str, tuple[int, ...]] = {f"{half}.bias": (outputs,)}
    n, rank = config.get("phm_dim"), config.get("phm_rank")
    if n is None:
        return {**parts, f"{half}.weight": (outputs, inputs)}
    parts[f"{half}.phm_rule"] = (n, n, n)
    if rank is None:
        return {**parts, f"{half}.phm_weight": (n, inputs // n, outputs // n)}
    return {**parts, f"{half}.phm_left": (n, inputs // n, rank), f"{half}.phm_right": (n, rank, outputs // n)}


def _indivisible(config: Config, base: Base, sizes: Iterable[int]) -> list[Complaint]:
    n = config.get("phm_dim")
    if n is None:
        return []
    strange = next((size for size in (base.hidden_size, *sizes) if size % n), None)
    return [] if strange is None else [("phm_dim", f"{n} does not divide {strange}")]


def _ranks(config: Config) -> Iterable[tuple[str, int]]:
    sizes = config.get("layer_sizes")
    found = [("bottleneck_size", config.get("bottleneck_size"))]
    found += [("layer_sizes", size) for size in sizes.values()] if isinstance(sizes, dict) else []
    return [(key, size) for key, size in found if type(size) is int]


def _contradictions(config: Config) -> Iterable[Complaint]:
    if config.get("phm_rank") is not None and config.get("phm_dim") is None:
        return [("phm_rank", "needs phm_dim")]
    return []


BOTTLENECK = Method(
    "bottleneck",
    "BOTTLENECK",
    FIELDS,
    required=("places", "reads", "bottleneck_size", "non_linearity"),
    layout=_layout,
    ranks=_ranks,
    contradictions=_contradictions,
)
