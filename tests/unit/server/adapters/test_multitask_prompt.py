"""Multitask prompts: one task's factors make the prompt, and nothing of a file is taken on trust."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters.lowering.table import lower
from server.adapters.lowering.target import Target
from server.errors import AdapterIncompatible

TOKENS, TASKS, RANKS, WIDTH = 3, 4, 2, 8
CONFIG: dict[str, Any] = {"num_virtual_tokens": TOKENS, "num_tasks": TASKS, "num_ranks": RANKS, "task_id": 1}


def target() -> Target:
    return Target({}, (), WIDTH, torch.float32, torch.device("cpu"), 8, 16, lambda name: torch.empty(0))


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "prompt_embeddings": torch.randn(TOKENS, WIDTH),
        "prefix_task_cols": torch.randn(TASKS, TOKENS, RANKS),
        "prefix_task_rows": torch.randn(TASKS, RANKS, WIDTH),
    }


def test_the_prompt_is_the_shared_one_times_the_factors_of_the_task() -> None:
    given = tensors()
    made = lower("multitask-prompt", CONFIG, given, target()).soft_prompt_VE
    assert made is not None
    expected = given["prompt_embeddings"] * (given["prefix_task_cols"][1] @ given["prefix_task_rows"][1])
    assert torch.equal(made, expected)
    other = lower("multitask-prompt", {**CONFIG, "task_id": 2}, given, target()).soft_prompt_VE
    assert other is not None
    assert not torch.equal(made, other)


@pytest.mark.parametrize(
    ("changes", "gone", "reason"),
    [
        ({"task_id": None}, None, "task_id is missing: the file holds 4 tasks"),
        ({"task_id": 4}, None, "task_id 4 is not among the 4 tasks"),
        ({"task_id": -1}, None, "task_id -1 is not among the 4 tasks"),
        ({"num_ranks": 3}, None, r"prefix_task_cols of soft prompt has shape \[4, 3, 2\], this base needs \[4, 3, 3\]"),
        ({}, "prefix_task_rows", "it lacks prefix_task_rows"),
        ({}, "prompt_embeddings", "where prompt_embeddings alone is expected"),
    ],
)
def test_a_file_that_misfits_is_refused(changes: dict[str, Any], gone: str | None, reason: str) -> None:
    given = {name: value for name, value in tensors().items() if name != gone}
    with pytest.raises(AdapterIncompatible, match=reason):
        lower("multitask-prompt", {**CONFIG, **changes}, given, target())
