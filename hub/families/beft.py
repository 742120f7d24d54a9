"""BEFT: a bias is learned and nothing else, y += b, whether the base has a bias there or not.

Source: arXiv:2509.15974; peft 0.21.2, tuners/beft/config.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found
from hub.families.linears import linear_method
from hub.families.method import COMMON, Config, Field, Part

FIELDS: Mapping[str, Field] = {
    **COMMON,
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "init_weights": Field(fields.boolean),  # inert
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"beft_bias": (1, linear.outputs)})


def _change(config: Config, found: Found) -> Change:
    return Change(bias_O=found.tensors["beft_bias"].flatten())


BEFT = linear_method("beft", "BEFT", FIELDS, required=("target_modules",), part=_part, change=_change)
