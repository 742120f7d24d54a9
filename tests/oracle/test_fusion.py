"""Every pair of kinds fused, against a network whose weights were summed by hand: decision 3."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations, combinations_with_replacement, product
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.errors import MixtureRefused
from server.primitives.graft import Graft, check_mixture
from tests.oracle.conftest import Adapters, Bench, TinyBase

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
    adapters: Callable[[str], Adapters],
) -> None:
    rig, random, summed = bench(architecture), Random(7), tiny_base(architecture).fresh()
    everything = adapters(architecture)
    everywhere = [name for name, row in everything.rows.items() if not (row.virtual or row.edits or row.invoked)]
    made = {name: everything[name] for name in everywhere}
    names_of_modules = leaves(summed)
    plain = affine_maps(summed, names_of_modules)
    adapted = [ROOT + name for name in names_of_modules]
    maps = {
        name: affine_maps(adapter.peft, names_of_modules if adapter.row.ours else adapted)
        for name, adapter in made.items()
    }
    grafts = {name: rig.graft(adapter.folder, adapter.row.kind) for name, adapter in made.items()}
    pairs, refused = [], []
    # All three scale the same Linear's output, or add to it; and everything at once that leaves the inputs alone, or
    # the outputs.
    inputs = {name for name, graft in grafts.items() if any(site.transforms_input for site in graft.sites.values())}
    outputs = {name for name, graft in grafts.items() if any(site.transforms_output for site in graft.sites.values())}
    more = [("lora", "dora", "ia3-attention"), tuple(grafts.keys() - inputs), tuple(grafts.keys() - outputs)]
    for names in [*_every_pair_of_kinds(made), *more]:
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
    assert len(refused) < len(pairs) / 3
    got = rig.run([(PROMPT, []), *((PROMPT, terms) for _, terms in pairs)])
    for (mixture, _), logits in zip(pairs, got[1:], strict=True):
        set_sum(summed, plain, [(maps[name], weight) for name, weight in mixture])
        error = (logits - _logits(summed)).abs().max().item()
        assert error < TOLERANCE, f"{mixture} on {architecture} differs by {error:.1e}"
        assert not torch.allclose(logits, got[0], atol=100 * TOLERANCE), f"{mixture} has no visible effect"


def _every_pair_of_kinds(made: Iterable[str]) -> list[tuple[str, str]]:
    """A row's name begins with its sort: each sort's first row with each other's, and other rows with the first.

    And those whose names end alike, for they adapt the same: the head, the embedding.
    """
    first: dict[str, str] = {}
    for name in made:
        first.setdefault(name.partition("-")[0], name)
    others = [name for name in made if name not in first.values()]
    alike = [(one, two) for one, two in combinations(others, 2) if one.split("-")[-1] == two.split("-")[-1]]
    with_first = [(name, first[name.partition("-")[0]]) for name in others]
    return [*combinations_with_replacement(first.values(), 2), *with_first, *alike]


def _crosses(terms: list[tuple[Graft, float]]) -> bool:
    """One transforms the input, another the output of the same Linear; or one transforms both, and not whole."""
    return any(
        one.sites[name].transforms_input and other.sites[name].transforms_output
        for (one, _), (other, _) in product(terms, repeat=2)
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
        module.weight = nn.Parameter(_stored(module, weight))
        module.bias = nn.Parameter(bias)


def _stored(module: nn.Module, weight: Tensor) -> Tensor:
    """The parameter that makes a module's effective weight: Gemma's norms add one, its embedding multiplies."""
    if isinstance(module, nn.Embedding):
        return weight / getattr(module, "embed_scale", 1)
    if type(module).__name__.startswith("Gemma"):
        return weight - 1
    return weight.t() if isinstance(module, Conv1D) else weight


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
    inside: nn.Module = module
    while (wrapped := getattr(inside, "base_layer", None) or getattr(inside, "original_module", None)) is not None:
        inside = wrapped
    return inside


def _logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([PROMPT])).logits[0].float()
