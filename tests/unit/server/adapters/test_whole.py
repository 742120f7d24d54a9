"""Lowering of the head, the embedding, norms, whole modules, rows and biases: the differences, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters.lowering.table import lower
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible
from server.primitives.prefix import LayerShape
from server.primitives.site import EmbeddingShape, NormShape, SiteShape

ROOT = "base_model.model."
V, E, FACTOR = 9, 4, 3.0
TABLE = torch.arange(V * E).float().view(V, E)
NORM, BIAS = torch.full((E,), 2.0), torch.full((E,), 5.0)
LORA = {"r": 2, "lora_alpha": 2}
EMBED, HEAD = "embed", "lm_head"


def target(*, tied: bool = True, head_bias: Tensor | None = None) -> Target:
    return Target(
        {HEAD: SiteShape(E, V, head_bias), "q": SiteShape(E, V, None), "conv": SiteShape(E, V, None, transposed=True)},
        (LayerShape(2, 4),),
        E,
        torch.float32,
        torch.device("cpu"),
        64,
        64,
        lambda name: TABLE,
        norms={"norm": NormShape(NORM, None), "biased_ln": NormShape(NORM, BIAS)},
        embedding=EmbeddingShape(EMBED, V, E, FACTOR, HEAD, tied),
    )


def lowered(given: Mapping[str, Tensor], on: Target | None = None, kind: str = "lora", **config: Any) -> Lowered:
    made = {f"{ROOT}{name}": tensor for name, tensor in given.items()}
    return lower(kind, {**LORA, **config}, made, on or target())


def refusal(given: Mapping[str, Tensor], on: Target | None = None, kind: str = "lora", **config: Any) -> str:
    with pytest.raises(AdapterIncompatible) as caught:
        lowered(given, on, kind, **config)
    return caught.value.message


@pytest.mark.parametrize(("module", "factor"), [(HEAD, 1.0), ("q", 1.0), ("conv", 1.0), (EMBED, FACTOR)])
def test_a_whole_module_is_the_rows_that_differ(module: str, factor: float) -> None:
    changed = TABLE.clone()
    changed[[2, 7]] += 1
    stored = changed.t() if module == "conv" else changed
    delta = lowered({f"{module}.weight": stored}, modules_to_save=[module]).sites[module].delta
    assert delta is not None
    assert delta.rows_N is not None
    assert delta.rows_N.tolist() == [2, 7]
    assert torch.equal(delta.matrix_OI, torch.full((2, E), factor))
    same = TABLE.t() if module == "conv" else TABLE
    assert lowered({f"{module}.weight": same}, modules_to_save=[module]).sites[module].delta is None


def test_rows_that_are_the_same_in_the_dtype_of_the_base_are_no_difference() -> None:
    half = replace(target(), dtype=torch.bfloat16)
    nearly = TABLE * (1 + 1e-6)
    assert lowered({f"{EMBED}.weight": nearly}, half, modules_to_save=[EMBED]).sites[EMBED].delta is None


def test_trained_rows_are_differences_in_the_order_of_the_vocabulary_and_reach_a_tied_head() -> None:
    rows = {f"{EMBED}.token_adapter.trainable_tokens_delta": torch.stack([TABLE[7] + 1, TABLE[2] + 2])}
    expected = torch.tensor([[2.0], [1.0]]).expand(2, E)
    for tied in (True, False):
        sites = lowered(rows, target(tied=tied), trainable_token_indices=[7, 2]).sites
        assert sites.keys() == ({EMBED, HEAD} if tied else {EMBED})
        for module, factor in ((EMBED, FACTOR), (HEAD, 1.0)):
            delta = sites[module].delta if module in sites else None
            if delta is not None:
                assert delta.rows_N is not None
                assert delta.rows_N.tolist() == [2, 7]
                assert torch.equal(delta.matrix_OI, expected * factor)


def test_the_embedding_takes_lora_times_the_bases_factor() -> None:
    given = {f"{EMBED}.lora_embedding_A": torch.ones(2, V), f"{EMBED}.lora_embedding_B": torch.ones(E, 2)}
    found = lowered(given, lora_alpha=8).sites[EMBED].lowrank
    assert found is not None
    assert torch.equal(found.B_OR, torch.full((E, 2), 4 * FACTOR))
    whole = {**given, f"{EMBED}.lora_magnitude_vector": torch.linalg.vector_norm(TABLE + 8, dim=0)}
    dora = lowered(whole, lora_alpha=8, use_dora=True).sites[EMBED]
    assert dora.scale_out is not None
    assert torch.allclose(dora.scale_out.excess_F, torch.zeros(E), atol=1e-6)


def test_norms_and_biases_are_differences() -> None:
    ln = lowered({"norm.ln_tuning_layers.weight": NORM + 1}, kind="ln-tuning").sites["norm"]
    assert ln.gain is not None
    assert torch.equal(ln.gain.weight_F, torch.ones(E))
    saved = {"biased_ln.weight": NORM + 1, "biased_ln.bias": BIAS + 2}
    both = lowered(saved, modules_to_save=["biased_ln"]).sites["biased_ln"]
    trained = lowered({"biased_ln.bias": BIAS + 2}, bias="all").sites["biased_ln"]
    alone = lowered({"biased_ln.bias": BIAS + 2}, kind="bitfit").sites["biased_ln"]
    for found in (both, trained, alone):
        assert found.bias is not None
        assert torch.equal(found.bias.bias_O, torch.full((E,), 2.0))


def test_the_copies_that_peft_writes_must_equal_the_base() -> None:
    head = {"lm_head.lora_A.weight": torch.ones(2, E), "lm_head.lora_B.weight": torch.ones(V, 2)}
    assert lowered({**head, "lm_head.base_layer.weight": TABLE}).sites.keys() == {HEAD}
    assert lowered({**head, "lm_head.base_layer.weight": TABLE.bfloat16()}).sites.keys() == {HEAD}
    assert "is no copy of the base's own" in refusal({**head, "lm_head.base_layer.weight": TABLE + 1})
    assert "a vocabulary of another size" in refusal({**head, f"{EMBED}.weight": torch.ones(V + 1, E)})
    biased = target(head_bias=torch.ones(V))
    assert lowered({**head, "lm_head.base_layer.bias": torch.ones(V)}, biased).sites[HEAD].bias is None
    assert "is no copy" in refusal({**head, "lm_head.base_layer.bias": torch.zeros(V)}, biased)


ROWS = {f"{EMBED}.token_adapter.trainable_tokens_delta": torch.ones(1, E)}
LOW = {"q.lora_A.weight": torch.ones(2, E), "q.lora_B.weight": torch.ones(V, 2)}


@pytest.mark.parametrize(
    ("given", "config", "reason"),
    [
        ({}, {"modules_to_save": ["mlp"]}, "modules_to_save names mlp, which is no Linear, norm or embedding here"),
        ({}, {"modules_to_save": "norm"}, "PEFT reads letter by letter"),
        ({}, {"modules_to_save": [HEAD]}, "lm_head lacks weight"),
        ({"norm.weight": torch.ones(E + 1)}, {"modules_to_save": ["norm"]}, "weight of norm has shape [5]"),
        (ROWS, {"trainable_token_indices": [V]}, f"token {V} of lm_head is outside the vocabulary of {V}"),
        (ROWS, {"trainable_token_indices": {"q": [1]}}, "which is no embedding or head of its own"),
        (ROWS, {"trainable_token_indices": [1, 1]}, "has shape [1, 4], this base needs [2, 4]"),
        (ROWS, {}, "embed has ['token_adapter.trainable_tokens_delta'] where ['lora_embedding_A'"),
        (
            {**LOW, "q.weight": TABLE + 1},
            {"modules_to_save": ["q"]},
            "q is adapted and replaced by one adapter",
        ),
        (
            {**LOW, "norm.weight": NORM},
            {"modules_to_save": ["norm"], "alora_invocation_tokens": [1]},
            "norm is replaced at every token",
        ),
        ({}, {"bias": "all"}, "biased_ln lacks bias"),
        ({f"{EMBED}.lora_embedding_A": torch.ones(2, V)}, {}, "where ['lora_embedding_A', 'lora_embedding_B']"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given: dict[str, Tensor], config: dict[str, Any], reason: str) -> None:
    assert reason in refusal(given, **config)


def test_each_kind_of_its_own_names_what_is_not_its() -> None:
    assert "belongs to no norm" in refusal({"q.ln_tuning_layers.weight": NORM}, kind="ln-tuning")
    assert "where ['weight'] are expected" in refusal({"norm.ln_tuning_layers.bias": NORM}, kind="ln-tuning")
    assert "that has a bias" in refusal({"norm.bias": NORM}, kind="bitfit")
    assert "is no bias" in refusal({"norm.weight": NORM}, kind="bitfit")
    tokens = {f"{EMBED}.trainable_tokens_delta": torch.ones(1, E)}
    kind = "trainable-tokens"
    assert "which are tied here" in refusal(tokens, kind=kind, token_indices=[1])
    assert lowered(tokens, target(tied=False), kind, token_indices=[1]).sites.keys() == {EMBED}
    both = {**tokens, f"{HEAD}.trainable_tokens_delta": torch.ones(1, E)}
    assert lowered(both, kind=kind, token_indices=[1]).sites.keys() == {EMBED, HEAD}
    assert "PEFT drops this head's bias" in refusal(both, target(head_bias=torch.ones(V)), kind, token_indices=[1])
    assert "name one token twice" in refusal(
        {name: tensor.expand(2, E) for name, tensor in both.items()}, kind=kind, token_indices=[1, 1]
    )
