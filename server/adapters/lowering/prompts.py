"""Virtual tokens: prefix tuning becomes a prefix at once, prompt tuning and P-tuning after one run through the base.

V virtual tokens, L layers, KH KV heads, D head dimension, E embedding size, F the features of one layer's keys.
Source: Li and Liang 2021 (arXiv:2101.00190); Lester et al. 2021 (arXiv:2104.08691); Liu et al. 2021 (arXiv:2103.10385);
peft 0.21.2, peft_model.py get_prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import expect
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives.prefix import LayerShape, Prefix


def lower_prefix(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Prefix tuning: (V, 2L * KH * D), for each layer its keys and then its values."""
    table = _prompt_embeddings(config, tensors, target)
    widths = [shape.kv_heads * shape.head_dim for shape in target.layers]
    expect("prefix", "prompt_embeddings", table, (table.shape[0], 2 * sum(widths)))
    keys, values = [], []
    columns = iter(table.split([width for width in widths for _ in "kv"], dim=1))
    for shape in target.layers:
        keys.append(_heads_first(next(columns), shape, target))
        values.append(_heads_first(next(columns), shape, target))
    return Lowered(prefix=Prefix(tuple(keys), tuple(values)))


def lower_soft_prompt(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Prompt tuning and P-tuning: embeddings (V, E) that run once through the base."""
    table = _prompt_embeddings(config, tensors, target)
    expect("soft prompt", "prompt_embeddings", table, (table.shape[0], target.hidden_size))
    return Lowered(soft_prompt_VE=target.place(table))


def _prompt_embeddings(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Tensor:
    if set(tensors) != {"prompt_embeddings"}:
        raise AdapterIncompatible(f"tensors {sorted(tensors)} where prompt_embeddings alone is expected")
    table = tensors["prompt_embeddings"]
    count = int(config["num_virtual_tokens"])
    if table.dim() != 2 or table.shape[0] != count:
        raise AdapterIncompatible(f"prompt_embeddings has shape {list(table.shape)}, num_virtual_tokens is {count}")
    if count > target.max_virtual:
        raise AdapterIncompatible(f"num_virtual_tokens {count} is above the limit of {target.max_virtual}")
    return table


def _heads_first(table_VF: Tensor, shape: LayerShape, target: Target) -> Tensor:
    return target.place(table_VF.view(-1, shape.kv_heads, shape.head_dim).transpose(0, 1))
