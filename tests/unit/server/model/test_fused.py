"""Native attentions and MLPs: where a base's modules are known, and proved at load; equal to the stock ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from server.config import ModelConfig
from server.kernels import native
from server.model import fused
from server.model.attention import AttentionPlan
from server.model.load import load_network
from server.model.network import Batch, Network, span_plan

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0, "eos_token_id": None,
    "initializer_range": 0.2,
}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {},
}
PROMPT, BLOCK = 20, 8
CLOSE = 1e-4  # fp32; sums in another order
BF16_CLOSE = 6e-2  # of the largest logit, as at load

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason="no C compiler was at hand when this was installed")


def saved(architecture: str, folder: Path, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    stock: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**{**SMALL, **options})).eval()
    for parameter in stock.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    stock.save_pretrained(folder)
    network: nn.Module = stock
    return network


def run(network: Network, ids: Tensor) -> Tensor:
    """The prompt in two chunks but for its last two tokens, which are decoded one by one: logits of all."""
    cache = network.new_cache(4, BLOCK)
    blocks = [2, 0, 3]
    logits = []
    for start, end in ((0, 7), (7, PROMPT - 2)):
        plan = span_plan(cache, [(end - start, end, blocks)])
        logits.append(forward(network, ids, start, end, plan))
    for position in range(PROMPT - 2, PROMPT):
        row = torch.tensor([blocks[position // BLOCK] * BLOCK + position % BLOCK])
        plan = AttentionPlan(cache, row, torch.tensor([position + 1]), torch.tensor([blocks]), [])
        logits.append(forward(network, ids, position, position + 1, plan))
    return torch.cat(logits)


def forward(network: Network, ids: Tensor, start: int, end: int, plan: AttentionPlan) -> Tensor:
    wanted = torch.arange(end - start)
    return network.forward(Batch(ids[start:end], torch.arange(start, end), plan, wanted, None, {}))


def native_parts(network: Network) -> list[str]:
    return [name for name, module in network._stock.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("architecture", KNOWN)
def test_known_modules_are_native_and_give_what_the_stock_network_gives(architecture: str, tmp_path: Path) -> None:
    stock: Any = saved(architecture, tmp_path, **KNOWN[architecture])
    network = load_network(ModelConfig("tiny", dtype="float32"), tmp_path, name="tiny")
    assert len(native_parts(network)) == 7, "the decoder, two layers, the attention and the MLP of each"
    ids = torch.randint(0, 64, (PROMPT,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = stock(ids[None]).logits[0]
    assert (run(network, ids) - expected).abs().max() < CLOSE
    half = load_network(ModelConfig("tiny", dtype="bfloat16"), tmp_path, name="tiny")
    assert len(native_parts(half)) == 7
    assert (run(half, ids) - expected).abs().max() < BF16_CLOSE * expected.abs().max()


def test_an_activation_or_a_class_that_is_not_known_keeps_its_stock_forward(tmp_path: Path) -> None:
    saved("llama", tmp_path / "gelu", hidden_act="gelu")
    parts = native_parts(load_network(ModelConfig("tiny"), tmp_path / "gelu", name="tiny"))
    assert parts == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    saved("olmo2", tmp_path / "olmo2")
    assert not native_parts(load_network(ModelConfig("tiny"), tmp_path / "olmo2", name="tiny"))


def test_a_base_whose_native_modules_fail_the_proof_is_served_by_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock: Any = saved("mistral", tmp_path, **KNOWN["mistral"])
    wrong = {**fused.ATTENTIONS, "mistral.modeling_mistral.MistralAttention": lambda module: None}
    monkeypatch.setattr(fused, "ATTENTIONS", wrong)  # without its window
    network = load_network(ModelConfig("tiny"), tmp_path, name="tiny")
    assert not native_parts(network)
    ids = torch.arange(PROMPT)
    with torch.inference_mode():
        assert (run(network, ids) - stock(ids[None]).logits[0]).abs().max() < CLOSE
