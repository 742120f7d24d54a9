"""BitFit: the biases of Linear layers and norms are trained, and nothing else.

PEFT has no such type, so the format is ours, in PEFT's two files: `target_modules` names the modules whose biases are
there, null meaning all that have one, and each is saved whole as `base_model.model.<module>.bias`.
Source: Ben Zaken et al. 2021 (arXiv:2106.10199).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hub import fields
from hub.base import Base, Linear, Modules
from hub.families.linears import linear_layout
from hub.families.method import COMMON, Config, Field, Layout, Method, Part

EVERY = r".*"
FIELDS: Mapping[str, Field] = {
    **COMMON,
    "target_modules": Field(fields.optional_module_names, shapes_tensors=True),
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({"bias": (linear.outputs,)})


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    known = {**modules.linears, **{name: Linear(size, size) for name, size in modules.norms.items()}}
    biased = {name: one for name, one in known.items() if modules.biased is None or name in modules.biased}
    every = not config.get("target_modules")
    if every and not biased:
        return Layout({}, (("target_modules", "the base has no biases"),))
    others = frozenset() if every else (modules.others | known.keys()) - biased.keys()
    trained = replace(modules, linears=biased, others=others)
    wanted = {**config, "target_modules": EVERY} if every else config
    layout = linear_layout(wanted, base, trained, part=_part, what="module with a bias")
    if modules.biased is not None:
        return layout
    return replace(layout, shapes={}, optional={**layout.optional, **layout.shapes})


BITFIT = Method("bitfit", "BITFIT", FIELDS, required=(), layout=_layout)
