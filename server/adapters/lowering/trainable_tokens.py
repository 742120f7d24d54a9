"""Trainable tokens: some rows of the embedding are replaced, and the same rows of a head that is tied to it.

N tokens, E embedding size.
Source: peft 0.21.2, tuners/trainable_tokens/layer.py and model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.linears import ROOT, expect
from server.adapters.lowering.target import Lowered, Target
from server.adapters.lowering.whole import head_takes_rows, row_values
from server.errors import AdapterIncompatible
from server.primitives.site import SiteValue

PART = "trainable_tokens_delta"


def lower_trainable_tokens(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """The rows themselves are saved, not what is added to the base's; of a tied pair PEFT saves both copies."""
    shape, indices = target.embedding, [int(index) for index in config["token_indices"]]
    if shape is None:
        raise AdapterIncompatible("this base's embedding is no table of rows, and no adapter is served on it")
    given = {name.removeprefix(ROOT).removesuffix(f".{PART}"): tensor for name, tensor in tensors.items()}
    strange = sorted(given.keys() - {shape.name, shape.head})
    if strange or not given:
        raise AdapterIncompatible(f"{strange[0] if strange else 'the file'} has no trained tokens of this base")
    for module, rows_NE in given.items():
        expect(module, PART, rows_NE, (len(indices), shape.features))
    if shape.tied and (given.keys() != {shape.name, shape.head} or not torch.equal(*given.values())):
        raise AdapterIncompatible(f"the trained tokens of {shape.name} and {shape.head} differ, which are tied here")
    sites: dict[str, SiteValue] = {}
    for module, rows_NE in given.items():
        if module == shape.head:
            head_takes_rows(module, target)
        factor = shape.factor if module == shape.name else 1.0
        sites[module] = row_values(indices, rows_NE.float(), target, module=module, factor=factor)
    return Lowered(sites)
