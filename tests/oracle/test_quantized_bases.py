"""Adapters of every kind over a base in few bits, in one packed batch, against PEFT on a whole base that has exactly
the weights that the quantized one multiplies with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from server.config import ModelConfig
from server.model.load import load_network
from tests.oracle.conftest import SMALL, Adapters, Bench, TinyBase
from tests.oracle.test_kinds_against_peft import prompt_of

# Of the logits' spread. int8 rounds every token that enters a Linear, by 0.4 % of its largest number; the others
# have an int8 head, which rounds what enters it alone, and multiply in fp32.
LIMITS = {"int8": 0.04, "nf4": 0.02, "fp8": 0.02}
VISIBLE = 0.06  # an adapter that moves the logits by less would not be seen beside that
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes packs outputs by 32, inputs by 64

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "phi", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("stored", LIMITS)
def test_other_bases_prove_themselves_in_few_bits(
    stored: str, architecture: str, tiny_base: Callable[[str], TinyBase]
) -> None:
    """Conv1D, tied heads, biases, experts. Loading compares packed logits with plain products of the same weights."""
    config = ModelConfig(base=architecture, dtype="float32", quantize=stored)
    network = load_network(config, tiny_base(architecture).folder, name=architecture)
    assert network.facts.quantized


@pytest.mark.parametrize("stored", LIMITS)
def test_every_kind_over_a_quantized_base_is_peft_over_its_weights(stored: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(**{**SMALL, **WIDTHS, "attention_bias": True})).save_pretrained(folder)
    network = load_network(ModelConfig(base="llama", dtype="float32", quantize=stored), folder, name="llama")
    widened: Any = TinyBase("llama", folder).fresh()
    changed = 0
    for name in network.facts.sites:
        weight = network.weight(name)
        changed += int(not torch.equal(weight, widened.get_submodule(name).weight))
        widened.get_submodule(name).weight.data = weight.clone()
    assert changed >= len(network.facts.sites) - 1
    widened.save_pretrained(tmp_path / "widened")

    base = TinyBase("llama", tmp_path / "widened")
    made = Adapters(base, tmp_path / "adapters")
    first = {made.rows[name].kind: name for name in reversed(list(made.rows))}
    rig = Bench(network)
    requests, references = [], []
    for seed, name in enumerate(first.values()):
        adapter = made[name]
        ids = prompt_of(adapter.row, seed, 5 + 2 * (seed % 11))
        requests.append((ids, [(rig.graft(adapter.folder, adapter.row.kind), 1.0)]))
        references.append(adapter.peft)
    plain: Any = base.fresh()
    seen = 0
    for name, (ids, _), reference, got in zip(first.values(), requests, references, rig.run(requests), strict=True):
        batch = torch.tensor([ids])
        told = {"prompt_length": len(ids)} if type(reference).__name__ == "Edited" else {}
        with torch.inference_mode():
            wanted = reference(input_ids=batch, attention_mask=torch.ones_like(batch), **told).logits[0][-len(ids) :]
            unchanged = plain(input_ids=batch).logits[0]
        off, effect = ((a - wanted).square().mean().sqrt() / wanted.std() for a in (got, unchanged))
        assert off < LIMITS[stored], f"{name} over {stored} is off by {off:.1e} of the logits' spread"
        seen += int(effect > VISIBLE)
    assert seen > 0.8 * len(requests), f"only {seen} of {len(requests)} adapters can be seen at this tolerance"
