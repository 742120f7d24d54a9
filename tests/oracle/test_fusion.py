"""Every pair of kinds fused, against a network whose weights were summed by hand: decision 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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

# What a module does: a Linear's matrix (O, I), an embedding's rows (V, E) or a norm's weight (F), and its bias.
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
    everywhere = {name: one for name, one in adapters(architecture).items() if not (one.row.virtual or one.row.edits)}
    made = {name: one for name, one in everywhere.items() if not one.row.invoked}
    names_of_modules = leaves(summed)
    plain = affine_maps(summed, names_of_modules)
    adapted = [ROOT + name for name in names_of_modules]
    maps = {name: affine_maps(adapter.peft, adapted) for name, adapter in made.items()}
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


def affine_maps(model: nn.Module, names: Iterable[str]) -> dict[str, Affine]:
    """Each module's weight and bias as it answers to probes, adapter and all, by its name in the base."""
    maps: dict[str, Affine] = {}
    for name in names:
        module = model.get_submodule(name)
        with torch.no_grad():
            maps[name.removeprefix(ROOT)] = _answers(module, _inside(module))
    return maps


def leaves(model: nn.Module) -> list[str]:
    """Every module of the base that has a weight."""
    return [name for name, module in model.named_modules() if dict(module.named_parameters(recurse=False))]


def set_sum(model: nn.Module, plain: Mapping[str, Affine], terms: list[tuple[Mapping[str, Affine], float]]) -> None:
    """The base's weights and biases plus the weighted differences of the adapted ones. What was tied is so no more."""
    for name, (weight, bias) in plain.items():
        module = model.get_submodule(name)
        weight = weight + sum(share * (other[name][0] - weight) for other, share in terms)
        bias = bias + sum(share * (other[name][1] - bias) for other, share in terms)
        module.weight = nn.Parameter(weight.t() if isinstance(module, Conv1D) else weight)
        module.bias = nn.Parameter(bias)


def _answers(module: nn.Module, base: Any) -> Affine:
    """A Linear to zero and the unit vectors, an embedding to every id, a norm to what has no mean and a great norm."""
    if isinstance(base, nn.Embedding):
        return module(torch.arange(base.num_embeddings)), torch.zeros(())
    if isinstance(base, nn.Linear | Conv1D):
        inputs = base.weight.shape[0] if isinstance(base, Conv1D) else base.in_features
        bias = module(torch.zeros(1, inputs))[0]
        return (module(torch.eye(inputs)) - bias).t(), bias
    signs = torch.tensor([1.0, -1.0]).repeat(len(base.weight) // 2)
    up, down = module(1e4 * signs), module(-1e4 * signs)
    return (up - down) / 2 * signs, (up + down) / 2


def _inside(module: Any) -> nn.Module:
    """The base's own module, however PEFT has wrapped it."""
    while True:
        wrapped = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if wrapped is None:
            return module  # type: ignore[no-any-return]
        module = wrapped


def _logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([PROMPT])).logits[0].float()
