"""Trainable tokens: some rows of the embedding are replaced, and the same rows of a head that is tied to it.

Source: peft 0.21.2, tuners/trainable_tokens/config.py, model.py and layer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hub import fields
from hub.base import HEAD, Base, Linear, Modules
from hub.families.linears import linear_layout
from hub.families.method import COMMON, TENSOR_PREFIX, Config, Field, Layout, Method, Part
from hub.families.whole import head_complaints, index_complaints
from hub.targets import target_modules

PART = "trainable_tokens_delta"
FIELDS: Mapping[str, Field] = {
    **{key: field for key, field in COMMON.items() if key != "modules_to_save"},
    "token_indices": Field(fields.token_list, shapes_tensors=True),
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "init_weights": Field(fields.boolean),  # inert
}


def _part(config: Config, module: str, linear: Linear) -> Part:
    return Part({PART: (len(config["token_indices"]), linear.inputs)})


def _layout(config: Config, base: Base, modules: Modules) -> Layout:
    table = modules.embedding
    if table is None:
        reason = "replaces rows of the embedding, of which the base's description tells nothing"
        return Layout({}, (("token_indices", reason),))
    linear = Linear(table.features, table.rows)
    tables = replace(
        modules,
        linears={table.name: linear, HEAD: linear},
        others=(modules.others | modules.linears.keys()) - {table.name, HEAD},
    )
    layout = linear_layout(config, base, tables, part=_part, what="embedding or output head")
    complaints = [*layout.complaints, *index_complaints(config["token_indices"], table.rows, key="token_indices")]
    adapted = target_modules(config, tables)
    if table.tied and HEAD in adapted:
        complaints.append(("target_modules", f"{HEAD} is tied to {table.name}: name that alone, the head follows it"))
    if table.tied or HEAD in adapted:
        complaints += head_complaints(modules, key="target_modules")
    both = {f"{TENSOR_PREFIX}{HEAD}.{PART}": (len(config["token_indices"]), table.features)} if table.tied else {}
    return replace(layout, shapes={**layout.shapes, **both}, complaints=tuple(complaints))


TRAINABLE_TOKENS = Method(
    "trainable-tokens", "TRAINABLE_TOKENS", FIELDS, required=("token_indices", "target_modules"), layout=_layout
)
