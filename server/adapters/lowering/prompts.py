"""Virtual tokens: prefix tuning becomes a prefix at once, soft prompts of any kind after one run through the base.

V virtual tokens, L layers, KH KV heads, D head dimension, E embedding size, F the features of one layer's keys,
N tasks, R rank of a task's factors.
Source: Li and Liang 2021 (arXiv:2101.00190); Lester et al. 2021 (arXiv:2104.08691); Liu et al. 2021 (arXiv:2103.10385);
Wang et al. 2023 (arXiv:2303.02861); peft 0.21.2, peft_model.py get_prompt, tuners/multitask_prompt_tuning/model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from server.adapters.lowering.linears import expect
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives.prefix import LayerShape, Prefix

COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"


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


def lower_multitask_prompt(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Multitask prompt tuning: the shared embeddings, times the low-rank matrix of one task, element by element."""
    factors = {name: tensors[name] for name in (COLUMNS, ROWS) if name in tensors}
    table = _prompt_embeddings(config, {name: one for name, one in tensors.items() if name not in factors}, target)
    if len(factors) < 2:
        raise AdapterIncompatible(f"it lacks {COLUMNS if COLUMNS not in factors else ROWS}")
    tasks, ranks = int(config.get("num_tasks", 1)), int(config.get("num_ranks", 1))
    task = config.get("task_id")
    if task is None and tasks > 1:
        raise AdapterIncompatible(f"task_id is missing: the file holds {tasks} tasks")
    if not 0 <= (task or 0) < tasks:
        raise AdapterIncompatible(f"task_id {task} is not among the {tasks} tasks, which are numbered from 0")
    expect("soft prompt", "prompt_embeddings", table, (table.shape[0], target.hidden_size))
    expect("soft prompt", COLUMNS, factors[COLUMNS], (tasks, table.shape[0], ranks))
    expect("soft prompt", ROWS, factors[ROWS], (tasks, ranks, target.hidden_size))
    columns_VR, rows_RE = (factors[name][task or 0].float() for name in (COLUMNS, ROWS))
    return Lowered(soft_prompt_VE=target.place(table.float() * (columns_VR @ rows_RE)))


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
