"""The modules that `hub train` trains give what the oracle's own reference gives, and so what the server gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.oracle.conftest import Adapters, TinyBase
from trainer.modules.attach import attach

ROUNDING = 1e-5  # fp32 sums in another order
PROMPT = torch.tensor([[5, 9, 77, 3, 101, 42, 64, 8]])


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi", "gpt2"])
def test_a_training_module_gives_what_the_oracle_gives(
    architecture: str, tiny_base: Callable[[str], TinyBase], adapters: Callable[[str], Adapters]
) -> None:
    everything = adapters(architecture)
    edits = {name: everything[name] for name, row in everything.rows.items() if row.edits}
    assert len(edits) > 5
    for name, adapter in edits.items():
        model = attach(tiny_base(architecture).fresh(), adapter.folder)
        expected, got = (_answers(one) for one in (adapter.peft, model))
        assert (got[0] - expected[0]).abs().max() < ROUNDING, f"{name} on {architecture}"
        assert torch.equal(got[1], expected[1]), f"greedy text of {name} on {architecture}"


def _answers(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a prompt, and its greedy continuation."""
    given = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    with torch.inference_mode():
        logits: torch.Tensor = model(**given).logits
        text = model.generate(**given, max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    return logits, text
