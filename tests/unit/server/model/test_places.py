"""Places on the residual stream are seen on a probe, in any decoder, or not there; without edits nothing is hooked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from server.adapters.bank import Bank
from server.config import ModelConfig
from server.model.load import load_network
from server.model.network import Batch, Network, span_plan
from server.model.places import Anatomy, find_anatomy
from server.primitives.edit import READS, Edit, Part, place
from server.primitives.gates import gates_from_rows
from server.primitives.graft import Graft
from server.primitives.site import SiteValue

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
    "initializer_range": 0.2,
}
IDS = torch.arange(3, 9)
# What makes the x of attention and MLP, and whether the MLP's stream has the attention's x in it.
SEEN: dict[str, tuple[dict[str, Any], str, str, bool]] = {
    "llama": ({}, "LlamaAttention", "LlamaMLP", True),
    "mixtral": ({}, "MixtralAttention", "MixtralSparseMoeBlock", True),
    "gemma2": ({"head_dim": 8}, "Gemma2RMSNorm", "Gemma2RMSNorm", True),
    "olmo2": ({}, "Olmo2RMSNorm", "Olmo2RMSNorm", True),
    "phi": ({}, "PhiAttention", "PhiMLP", False),
    "cohere2": ({}, "Cohere2Attention", "Cohere2MLP", False),
    "gpt_neox": ({}, "GPTNeoXAttention", "GPTNeoXMLP", False),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, "GPT2Attention", "GPT2MLP", True),
}


def stock_network(architecture: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    given = {**SMALL, **options}
    if architecture == "gpt2":
        del given["num_key_value_heads"]
    network: nn.Module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**given)).eval()
    return network


def anatomy_of(stock: Any) -> list[Anatomy]:
    attentions = {
        module.layer_idx: module
        for module in stock.modules()
        if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention")
    }
    with torch.inference_mode():
        return find_anatomy(stock, attentions, lambda: stock(input_ids=IDS[None], use_cache=False))


@pytest.mark.parametrize("architecture", SEEN)
def test_what_adds_to_the_stream_is_found(architecture: str) -> None:
    options, attention, mlp, sequential = SEEN[architecture]
    for found in anatomy_of(stock_network(architecture, **options)):
        assert found.attention is not None
        assert found.mlp is not None
        assert (type(found.attention.writer).__name__, type(found.mlp.writer).__name__) == (attention, mlp)
        assert found.sequential == sequential


def test_a_layer_that_scales_what_it_adds_has_its_output_only() -> None:
    for found in anatomy_of(stock_network("granite", residual_multiplier=0.3)):
        assert found.places(0) == [place(0, "mlp", "stream")]
    for found in anatomy_of(stock_network("granite", residual_multiplier=1.0)):
        assert len(found.places(0)) == 2 * len(READS)


def test_a_network_whose_stream_changes_between_layers_has_no_places() -> None:
    stock = stock_network("llama")
    layer: nn.Module = stock.get_submodule("model.layers.1")
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    assert anatomy_of(stock) == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Network]:
    def make(architecture: str) -> Network:
        folder: Path = tmp_path_factory.mktemp(architecture)
        stock: Any = stock_network(architecture, **SEEN[architecture][0])
        stock.save_pretrained(folder)
        return load_network(ModelConfig(base=architecture), folder, name=architecture)

    return make


def forward(network: Network, bank: Bank, rows: list[tuple[int, list[tuple[int, float]]]]) -> torch.Tensor:
    cache = network.new_cache(1, len(IDS))
    plan = span_plan(cache, [(len(IDS), len(IDS), [0])])
    gates = gates_from_rows(rows, bank.size, cache.keys[0]) if bank.size else None
    return network.forward(Batch(IDS, torch.arange(len(IDS)), plan, torch.arange(len(IDS)), gates, bank.operands))


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi", "gpt2"])
def test_every_place_is_edited_for_the_tokens_that_ask_and_the_hooks_go_with_the_adapter(
    architecture: str, made: Callable[[str], Network]
) -> None:
    """A token's own logits change; those before it stay to the bit, and all do when the adapter has gone."""
    network, bank = made(architecture), Bank()
    plain = forward(network, bank, [])
    standing = _hooks(network)  # those by which layers announce themselves to routers
    assert len(network.facts.places) == 2 * 2 * len(READS)
    torch.manual_seed(1)
    for name in sorted(network.facts.places):
        part = Part(torch.randn(3, 16), torch.randn(3), torch.randn(16, 3), "tanh")
        columns = bank.activate([Graft(f"of {name}", name, {name: SiteValue(edit=Edit((part,)))})])
        rows: list[tuple[int, list[tuple[int, float]]]] = [(3, []), (len(IDS) - 3, [(columns[f"of {name}"], 1.0)])]
        got = forward(network, bank, rows)
        assert torch.equal(got[:3], plain[:3])
        assert (got[3:] - plain[3:]).abs().amax(dim=1).min() > 1e-3, f"{name} is not edited"
        assert _hooks(network) > standing
    bank = Bank()
    assert torch.equal(forward(network, bank, []), plain)
    assert _hooks(network) == standing


def _hooks(network: Network) -> int:
    modules = network._stock.modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
