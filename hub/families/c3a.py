"""C3A: blocks of the change are circulant, each a learned kernel.

The change is of full rank: a server makes the closest of a rank that it serves, and measures the error.

S block size, M blocks of the output, N blocks of the input.
Source: Chen et al. 2024 (arXiv:2407.19342); peft 0.21.2, tuners/c3a/config.py, model.py, layer.py and utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from hub import fields
from hub.base import Linear
from hub.families.change import Change, Found
from hub.families.linears import TARGETS, bias_field, linear_method
from hub.families.method import Config, Field, Part
from hub.ref import printable
from hub.targets import dotted_pattern_value

FIELDS: Mapping[str, Field] = {
    **{key: field for key, field in TARGETS.items() if key != "exclude_modules"},
    "block_size": Field(fields.positive, shapes_tensors=True),
    "block_size_pattern": Field(fields.patterns_of(fields.positive), shapes_tensors=True),
    "bias": bias_field("c3a_only"),
    "init_weights": Field(fields.one_of(True, False, "gaussian", "kaiming_uniform", "xavier_uniform", None)),  # inert
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    size = dotted_pattern_value(config.get("block_size_pattern") or {}, module, config["block_size"])
    complaint = None
    if linear.inputs % size or linear.outputs % size:
        complaint = (
            "block_size",
            f"{size} does not divide the {linear.inputs} inputs and {linear.outputs} outputs of {printable(module)}",
        )
    return Part({"c3a_kernel": (linear.outputs // size, linear.inputs // size, size)}, None, complaint)


def _change(config: Config, found: Found) -> Change:
    """y += D x, in each block D[o, i] = kernel[(i - o) mod S] / I: what PEFT's Fourier transforms come to."""
    kernel_MNS = found.tensors["c3a_kernel"]
    size = kernel_MNS.shape[2]
    # Row o of a block begins S - o behind the start of the kernel written twice.
    blocks_MNSS = kernel_MNS.repeat(1, 1, 2).unfold(2, size, 1)[:, :, 1:].flip(2)
    return Change(full_OI=blocks_MNSS.transpose(1, 2).reshape(found.outputs, found.inputs) / found.inputs)


C3A = linear_method(
    "c3a", "C3A", FIELDS, required=("block_size", "target_modules"), part=_part, change=_change, full_rank=True
)
