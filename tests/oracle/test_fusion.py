"""Every pair of kinds fused, against a network whose weights were summed by hand: decision 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations_with_replacement, permutations
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.errors import MixtureRefused
from server.primitives.graft import Graft, check_mixture
from tests.oracle.conftest import Adapter, Bench, TinyBase

TOLERANCE = 1e-4  # fp32; the packed products sum in another order
PROMPT = [5, 9, 77, 3, 101, 42, 64, 8]
ROOT = "base_model.model."

# What a Linear does: its matrix (O, I) and its bias.
Affine = tuple[Tensor, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what these adapters are on purpose


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_every_pair_is_exactly_the_weighted_sum_of_the_deltas_or_refused(
    architecture: str,
    tiny_base: Callable[[str], TinyBase],
    bench: Callable[[str], Bench],
    adapters: Callable[[str], dict[str, Adapter]],
) -> None:
    rig, random, summed = bench(architecture), Random(7), tiny_base(architecture).fresh()
    everywhere = {name: one for name, one in adapters(architecture).items() if not one.row.virtual}
    made = {name: one for name, one in everywhere.items() if not one.row.invoked}
    plain = affine_maps(summed)
    maps = {name: affine_maps(adapter.peft) for name, adapter in made.items()}
    grafts = {name: rig.graft(adapter.folder, adapter.row.kind) for name, adapter in made.items()}
    pairs, refused = [], []
    # All three scale the same Linear's output, or add to it; and everything at once but what scales an input.
    more = [("lora", "dora", "ia3-attention"), tuple(name for name in grafts if name != "ia3")]
    for names in [*combinations_with_replacement(grafts, 2), *more]:
        share = 2 / len(names)
        mixture = [(name, random.choice([-share, share]) * random.uniform(0.2, 0.9)) for name in dict.fromkeys(names)]
        terms = [(grafts[name], weight) for name, weight in mixture]
        if _crosses(terms):
            with pytest.raises(MixtureRefused, match="their exact sum is not one product"):
                check_mixture(terms)
            refused.append(names)
            continue
        check_mixture(terms)
        pairs.append((mixture, terms))
    assert len(refused) < len(pairs) / 4
    got = rig.run([(PROMPT, []), *((PROMPT, terms) for _, terms in pairs)])
    for (mixture, _), logits in zip(pairs, got[1:], strict=True):
        set_sum(summed, plain, [(maps[name], weight) for name, weight in mixture])
        error = (logits - _logits(summed)).abs().max().item()
        assert error < TOLERANCE, f"{mixture} on {architecture} differs by {error:.1e}"
        assert not torch.allclose(logits, got[0], atol=100 * TOLERANCE), f"{mixture} has no visible effect"


def _crosses(terms: list[tuple[Graft, float]]) -> bool:
    """One scales the input, the other the output of the same Linear."""
    return any(
        one.sites[name].scale_in and other.sites[name].scale_out
        for (one, _), (other, _) in permutations(terms, 2)
        for name in one.sites.keys() & other.sites.keys()
    )


def affine_maps(model: nn.Module) -> dict[str, Affine]:
    """Each Linear's matrix and bias as it answers to zero and to the unit vectors, adapter and all."""
    maps: dict[str, Affine] = {}
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in wrapped)
        if inside or not (name in wrapped or isinstance(module, nn.Linear | Conv1D)):
            continue
        inputs = _inputs(module.base_layer if name in wrapped else module)
        with torch.no_grad():
            bias = module(torch.zeros(1, inputs))[0]
            maps[name.removeprefix(ROOT)] = ((module(torch.eye(inputs)) - bias).t(), bias)
    return maps


def set_sum(model: nn.Module, plain: Mapping[str, Affine], terms: list[tuple[Mapping[str, Affine], float]]) -> None:
    """The base's weights and biases plus the weighted differences of the adapted ones."""
    for name, (weight, bias) in plain.items():
        module = model.get_submodule(name)
        weight = weight + sum(share * (other[name][0] - weight) for other, share in terms)
        bias = bias + sum(share * (other[name][1] - bias) for other, share in terms)
        module.weight = nn.Parameter(weight.t() if isinstance(module, Conv1D) else weight)
        module.bias = nn.Parameter(bias)


def _inputs(linear: Any) -> int:
    return int(linear.weight.shape[0] if isinstance(linear, Conv1D) else linear.in_features)


def _logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([PROMPT])).logits[0].float()
