"""Several adapters' virtual tokens ahead of one sequence, and adapters that work at some of its tokens only."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from server.primitives.graft import Graft
from tests.oracle.conftest import Adapters, Bench, TinyBase
from tests.oracle.kinds import INVOCATION

TOLERANCE = 1e-4  # fp32; the packed products sum in another order
PROMPT = [5, 9, 77, 3, 101, 42, 64, 8]
CALLED = [5, *INVOCATION, 77, 3, 101, *INVOCATION, 42, 64]
CALLED_FROM = 6

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these adapters are on purpose


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_prefixes_and_soft_prompts_stand_in_the_order_written(
    architecture: str,
    tiny_base: Callable[[str], TinyBase],
    bench: Callable[[str], Bench],
    adapters: Callable[[str], Adapters],
) -> None:
    """Against the stock network with its own cache, filled by hand with one adapter's tokens after the other's."""
    rig, plain, made = bench(architecture), tiny_base(architecture).fresh(), adapters(architecture)
    names = ("prefix", "prompt", "p-tuning")
    grafts = {name: rig.graft(made[name].folder, made[name].row.kind) for name in names}
    orders = [*permutations(names, 2), *permutations(names, 3)]
    got = rig.run([(PROMPT, [(grafts[name], 1.0) for name in order]) for order in orders])
    for order, logits in zip(orders, got, strict=True):
        cache = DynamicCache(config=plain.config)
        for name in order:
            _fill(plain, cache, grafts[name])
        error = (logits - _logits(plain, cache, ids=PROMPT)).abs().max().item()
        assert error < TOLERANCE, f"{order} on {architecture} differs by {error:.1e}"
    one_way, other_way = got[orders.index(("prefix", "prompt"))], got[orders.index(("prompt", "prefix"))]
    assert not torch.allclose(one_way, other_way, atol=10 * TOLERANCE), "the order makes no visible difference"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_activated_adapter_is_added_to_the_others_from_its_last_invocation_on(
    architecture: str,
    tiny_base: Callable[[str], TinyBase],
    bench: Callable[[str], Bench],
    adapters: Callable[[str], Adapters],
) -> None:
    rig, stock, made = bench(architecture), tiny_base(architecture).fresh(), adapters(architecture)
    mixture = [(rig.graft(made[name].folder, "lora"), weight) for name, weight in (("alora", 0.7), ("lora", -0.6))]
    [got] = rig.run([(CALLED, mixture)])
    deltas = {name: _delta(rig, graft) for name, (graft, _) in zip(("alora", "lora"), mixture, strict=True)}
    for name in mixture[0][0].sites.keys() | mixture[1][0].sites.keys():
        module = stock.get_submodule(name)
        module.register_forward_hook(_adding(deltas["alora"].get(name), 0.7, first=CALLED_FROM))
        module.register_forward_hook(_adding(deltas["lora"].get(name), -0.6, first=0))
    error = (got - _logits(stock, None, ids=CALLED)).abs().max().item()
    assert error < TOLERANCE, f"{architecture} differs by {error:.1e}"


def _delta(rig: Bench, graft: Graft) -> dict[str, Any]:
    return {name: (value.lowrank, value.bias) for name, value in graft.sites.items()}


def _adding(value: Any, weight: float, *, first: int) -> Callable[..., Tensor]:
    """A forward hook that adds a low-rank delta to the outputs of the tokens from `first` on."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if value is None:
            return output
        lowrank, bias = value
        change = lowrank.scaling * inputs[0] @ (lowrank.B_OR @ lowrank.A_RI).t() + (0 if bias is None else bias.bias_O)
        change[:, :first] = 0
        return output + weight * change

    return hook


def _fill(plain: nn.Module, cache: DynamicCache, graft: Graft) -> None:
    if graft.soft_prompt_VE is not None:
        with torch.inference_mode():
            plain(inputs_embeds=graft.soft_prompt_VE[None], past_key_values=cache, use_cache=True)
        return
    assert graft.prefix is not None
    for layer, (keys, values) in enumerate(zip(graft.prefix.keys, graft.prefix.values, strict=True)):
        cache.update(keys[None], values[None], layer)


def _logits(plain: nn.Module, cache: DynamicCache | None, *, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = plain(input_ids=torch.tensor([ids]), past_key_values=cache).logits[0].float()
    return logits
