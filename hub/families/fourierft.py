"""FourierFT: a few learned frequencies, at places drawn from a seed, whose inverse transform is added to the weight.

The change is of full rank: a server makes the closest of a rank that it serves, and measures the error.
Source: peft 0.21.2, tuners/fourierft/config.py, model.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import TARGETS, bias_field, linear_layout
from hub.families.method import Config, Field, Layout, Method, Part
from hub.ref import printable
from hub.targets import dotted_pattern_value

FIELDS: Mapping[str, Field] = {
    **TARGETS,
    "n_frequency": Field(fields.positive, shapes_tensors=True),
    "n_frequency_pattern": Field(fields.patterns_of(fields.positive), shapes_tensors=True),
    "scaling": Field(fields.number),
    "random_loc_seed": Field(fields.seed),
    "bias": bias_field("fourier_only"),
    "fan_in_fan_out": Field(fields.boolean),  # follows from the base's own layers
    "init_weights": Field(fields.boolean),  # inert
}


def part(config: Config, module: str, linear: Linear) -> Part:
    count = dotted_pattern_value(config.get("n_frequency_pattern") or {}, module, config["n_frequency"])
    weights = linear.inputs * linear.outputs
    complaint = None
    if count > weights:
        complaint = ("n_frequency", f"{count} is above the {weights} weights of {printable(module)}")
    return Part({"fourierft_spectrum": (count,)}, None, complaint)


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    return linear_layout(config, base, modules, part=part)


FOURIERFT = Method(
    "fourierft",
    "FOURIERFT",
    FIELDS,
    required=("n_frequency", "scaling", "random_loc_seed", "target_modules"),
    layout=_layout,
    full_rank=True,
)
