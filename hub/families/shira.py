"""SHiRA: a sparse change, with as many entries at a Linear as LoRA of rank r would have.

The file holds where the entries are, so that how they were chosen (mask_type, random_seed) no longer matters. PEFT on
Windows writes the places as F32; such a file is refused.
Source: Bhardwaj et al. 2024 (arXiv:2406.13175); peft 0.21.2, tuners/shira/config.py, layer.py and model.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Entries, Found
from hub.families.linears import linear_method
from hub.families.method import COMMON, Config, Field, Part
from hub.ref import printable

FIELDS: Mapping[str, Field] = {
    **COMMON,
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "r": Field(fields.positive, shapes_tensors=True),
    "fan_in_fan_out": Field(fields.boolean),  # of Conv1D layers, on which PEFT has no SHiRA
    # Inert: where the entries are is in the file.
    "mask_type": Field(fields.optional_text),
    "random_seed": Field(lambda value: None if value is None else fields.seed(value)),
    "init_weights": Field(fields.boolean),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    count, weights = config["r"] * (linear.inputs + linear.outputs), linear.inputs * linear.outputs
    complaint = None
    if count > weights:
        complaint = ("r", f"{config['r']} makes {count} entries, above the {weights} weights of {printable(module)}")
    shapes = {"shira_weight": (count,), "shira_indices": (2, count)}
    return Part(shapes, None, complaint, frozenset({"shira_indices"}))


def _change(config: Config, found: Found) -> Change:
    """y += D x; entries of one place add, as in PEFT."""
    rows_N, columns_N = found.tensors["shira_indices"]
    return Change(entries=Entries(rows_N, columns_N, found.tensors["shira_weight"]))


SHIRA = linear_method("shira", "SHIRA", FIELDS, required=("r", "target_modules"), part=_part, change=_change)
