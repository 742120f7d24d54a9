"""Native attentions and MLPs: where a base's modules are known, and proved at load; equal to the stock ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from server.adapters.bank import Bank
from server.config import ModelConfig
from server.kernels import native, quantized
from server.model import decode, fused
from server.model.attention import AttentionPlan, Span
from server.model.decode import Decode
from server.model.load import load_network
from server.model.network import Batch, Network, span_plan
from server.primitives.bias import Bias
from server.primitives.delta import Delta
from server.primitives.gain import Gain
from server.primitives.gates import gates_from_rows
from server.primitives.graft import Graft
from server.primitives.lowrank import LowRank
from server.primitives.rotate import Rotate
from server.primitives.scale import Scale
from server.primitives.site import SiteValue

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
Run = tuple[int, list[tuple[int, float]]]  # tokens, and the columns and weights that they carry
CLOSE = 1e-4  # fp32; sums in another order
BF16_CLOSE = 6e-2  # of the largest logit, as at load

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason="no C compiler was at hand when this was installed")


def saved(architecture: str, folder: Path, stored: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    stock: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**{**SMALL, **options})).eval()
    for parameter in stock.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    stock.to(stored).save_pretrained(folder)
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


TILED: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}  # of whole tiles


def decoding(
    network: Network,
    lengths: Sequence[int],
    runs: Sequence[Run] = (),
    grafts: Sequence[Graft] = (),
    wanted: Sequence[int] | None = None,
) -> Tensor:
    """Logits of one token of each sequence, of those that are wanted, and the cache, which had anything before.

    `runs` of those adapters.
    """
    generator = torch.Generator().manual_seed(7)
    cache = network.new_cache(16, BLOCK)
    for store in (*cache.keys, *cache.values):
        store.copy_(torch.randn(store.shape, generator=generator))
    blocks = torch.randperm(16, generator=generator).view(len(lengths), -1)
    places = [blocks[n, (length - 1) // BLOCK] * BLOCK + (length - 1) % BLOCK for n, length in enumerate(lengths)]
    plan = AttentionPlan(cache, torch.tensor(places), torch.tensor(lengths), blocks, [])
    ids = torch.randint(0, 64, (len(lengths),), generator=generator)
    bank = Bank(network.facts.dtype, network.facts.groups, network.facts.numbers)
    bank.activate(grafts)
    gates = gates_from_rows(runs, bank.size, cache.keys[0]) if grafts else None
    rows = list(range(len(lengths))) if wanted is None else wanted
    wanted_R = torch.tensor(rows, dtype=torch.long)
    wanted_gates = None if gates is None else gates.at(wanted_R, rows)
    positions = torch.tensor(lengths) - 1
    batch = Batch(ids, positions, plan, wanted_R, gates, bank.operands, bank.gathered, wanted_gates)
    logits = network.forward(batch)
    assert plan.seen == len(network.facts.layers)
    return torch.cat([logits.flatten(), *(store.flatten().float() for store in (*cache.keys, *cache.values))])


def low_rank(network: Network, seed: int) -> Graft:
    """Low-rank terms at every Linear but some."""
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for number, (name, shape) in enumerate(network.facts.sites.items()):
        if (number + seed) % 5 and name != "lm_head":
            down = torch.randn(4, shape.in_features, generator=generator).bfloat16()
            up = torch.randn(shape.out_features, 4, generator=generator).bfloat16()
            sites[name] = SiteValue(lowrank=LowRank(down, up, 0.1))
    return Graft(f"low-{seed}", f"low-{seed}@1", sites)


def mixed(network: Network, seed: int) -> Graft:
    """All that native functions know, on either side of every Linear but some, and at the norms but one."""
    generator = torch.Generator().manual_seed(seed)

    def small(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / 4).to(network.facts.dtype)

    def turn(features: int) -> Rotate:
        return Rotate(small(features // 16, 16, 16))

    norms = [name for name in network.facts.norms if name in network.facts.numbers]  # but for those of heads
    sites = {name: SiteValue(gain=Gain(small(len(network.facts.norms[name].weight_F)))) for name in norms[1:]}
    for number, (name, shape) in enumerate(network.facts.sites.items()):
        inputs, outputs = shape.in_features, shape.out_features
        value = (
            SiteValue(scale_in=Scale(small(inputs)), bias=Bias(small(outputs))),
            SiteValue(rotate_in=turn(inputs), lowrank=LowRank(small(3, inputs), small(outputs, 3))),
            SiteValue(scale_out=Scale(small(outputs)), rotate_out=turn(outputs)),
            SiteValue(scale_in=Scale(small(inputs)), rotate_in=turn(inputs)),
            SiteValue(),
        )[(number + seed) % 5]
        if name != "lm_head":
            sites[name] = value
    return Graft(f"mixed-{seed}", f"mixed-{seed}@1", sites)


def pretend_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with a matrix unit: where there is none, its products run by their plain loop."""
    monkeypatch.setattr(native, "has_tiles", lambda: True)


def pretend_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that has neither a matrix unit nor products of bytes in 32 bits."""
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    monkeypatch.setattr(quantized, "has_ordered_bytes", lambda: False)


FORMS = {"tiles": ("bfloat16", pretend_tiles), "panels": ("float32", pretend_no_bytes)}


@pytest.mark.parametrize("quantize", ["none", "int8"])
@pytest.mark.parametrize("form", FORMS if native.has_panels() else ["tiles"])
@pytest.mark.parametrize("architecture", KNOWN)
def test_a_step_of_decodes_is_one_call_that_gives_what_its_layers_give(
    architecture: str, form: str, quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, and what stands in the cache afterwards."""
    options = {**KNOWN[architecture], **TILED, "attention_bias": False}
    saved(architecture, tmp_path, torch.bfloat16, **options)
    dtype, pretend = FORMS[form]
    pretend(monkeypatch)
    network = load_network(ModelConfig("tiny", dtype=dtype, quantize=quantize), tmp_path, name="tiny")
    lengths = [9, 1, 17, 30]
    cases: list[tuple[list[Run], list[Graft]]] = [
        ([], []),
        ([(1, [(0, 0.5)]), (1, []), (2, [(0, 1.0), (1, -2.0)])], [low_rank(network, 1), low_rank(network, 2)]),
        ([(1, [(0, 0.5)]), (1, []), (2, [(1, 1.0)])], [mixed(network, 1), mixed(network, 2)]),
        (
            [(1, [(1, 1.0), (0, 2.0)]), (1, [(2, -0.5)]), (1, []), (1, [(0, 1.0)])],
            [low_rank(network, 3), *(mixed(network, n) for n in (3, 4))],
        ),
    ]
    calls = []
    compute = Decode.compute

    def counted(self: Decode, *given: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return compute(self, *given)

    monkeypatch.setattr(Decode, "compute", counted)
    at_once = [decoding(network, lengths, *case) for case in cases]
    assert len(calls) == len(cases)
    check_some_are_wanted(network, lengths, cases, at_once)
    monkeypatch.setattr(Decode, "serves", lambda self, plan: False)
    calls.clear()
    for made, case in zip(at_once, cases, strict=True):
        assert made.isfinite().all()
        assert torch.equal(made, decoding(network, lengths, *case))
    check_some_are_wanted(network, lengths, cases, at_once)
    assert not calls
    assert not any(torch.equal(one, other) for n, one in enumerate(at_once) for other in at_once[:n])


def check_some_are_wanted(
    network: Network, lengths: list[int], cases: list[tuple[list[Run], list[Graft]]], whole: list[Tensor]
) -> None:
    """Their logits are what they are when all are wanted, and so is the cache."""
    vocabulary = SMALL["vocab_size"]
    for every, case in zip(whole, cases, strict=True):
        logits, cache = every[: len(lengths) * vocabulary].view(-1, vocabulary), every[len(lengths) * vocabulary :]
        for wanted in ([1, 3], [0], []):
            made = decoding(network, lengths, *case, wanted=wanted)
            assert torch.equal(made, torch.cat([logits[wanted].flatten(), cache]))


def test_adapters_that_the_one_call_does_not_know_go_through_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("llama", tmp_path, **{**KNOWN["llama"], **TILED, "attention_bias": False})
    pretend_tiles(monkeypatch)
    network = load_network(ModelConfig("tiny", dtype="bfloat16"), tmp_path, name="tiny")
    name = "model.layers.1.mlp.down_proj"
    whole = SiteValue(delta=Delta(torch.randn(64, 128).bfloat16()))
    known, unknown = (
        Graft("known", "known@1", {name: SiteValue(scale_in=Scale(torch.ones(128).bfloat16()))}),
        Graft("whole", "whole@1", {name: whole}),
    )
    served = []
    serves = Decode.serves

    def noted(self: Decode, plan: AttentionPlan) -> bool:
        served.append(serves(self, plan))
        return served[-1]

    monkeypatch.setattr(Decode, "serves", noted)
    for grafts in ([known], [known, unknown], [unknown], [known]):
        decoding(network, [9], [(1, [(0, 1.0)])], grafts)
    assert served == [True, False, False, True]


def test_an_adapter_of_the_norm_of_heads_goes_through_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And changes the answer as the same norm does in the base itself."""
    stock: Any = saved("qwen3", tmp_path / "base", torch.bfloat16, **{**KNOWN["qwen3"], **TILED})
    gain_F = torch.randn(16, generator=torch.Generator().manual_seed(4)).bfloat16()
    stock.model.layers[1].self_attn.k_norm.weight.data += gain_F
    stock.save_pretrained(tmp_path / "changed")
    pretend_tiles(monkeypatch)
    base, changed = (
        load_network(ModelConfig("tiny", dtype="bfloat16"), tmp_path / name, name="tiny")
        for name in ("base", "changed")
    )
    graft = Graft("gain", "gain@1", {"model.layers.1.self_attn.k_norm": SiteValue(gain=Gain(gain_F))})
    carried: list[Run] = [(1, [(0, 1.0)]), (1, [])]
    made = decoding(base, [9, 1], carried, [graft]), decoding(changed, [9, 1]), decoding(base, [9, 1])
    logits, of_changed, of_base = (one[: 2 * 64].view(2, 64) for one in made)
    room = BF16_CLOSE * of_base.abs().max()
    assert (logits[0] - of_changed[0]).abs().max() < room < (of_base[0] - of_changed[0]).abs().max()
    assert (logits[1] - of_base[1]).abs().max() < room


def test_prompts_that_see_little_are_in_that_call_and_those_that_see_much_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("qwen2", tmp_path, **{**KNOWN["qwen2"], **TILED})
    pretend_tiles(monkeypatch)
    network = load_network(ModelConfig("tiny", dtype="bfloat16"), tmp_path, name="tiny")
    served = []
    serves = Decode.serves

    def noted(self: Decode, plan: AttentionPlan) -> bool:
        served.append(serves(self, plan))
        return served[-1]

    def step(wanted: Sequence[int] = range(11)) -> Tensor:
        """Two decodes, a prompt's second chunk and a first one, over a cache of anything: the wanted tokens' logits."""
        generator = torch.Generator().manual_seed(3)
        cache = network.new_cache(8, BLOCK)
        for store in (*cache.keys, *cache.values):
            store.copy_(torch.randn(store.shape, generator=generator))
        decoded = torch.tensor([[1, 3], [6, 2]])
        spans = [Span(6, 10, torch.tensor([[0, 7]])), Span(3, 3, torch.tensor([[5]]))]
        places = [
            3 * BLOCK + 4,
            6 * BLOCK + 1,
            *range(4, 8),
            7 * BLOCK,
            7 * BLOCK + 1,
            *range(5 * BLOCK, 5 * BLOCK + 3),
        ]
        positions = torch.tensor([12, 1, *range(4, 10), *range(3)])
        plan = AttentionPlan(cache, torch.tensor(places), torch.tensor([13, 2]), decoded, spans)
        ids = torch.randint(0, 64, (len(places),), generator=generator)
        return network.forward(Batch(ids, positions, plan, torch.tensor(wanted), None, {}))

    monkeypatch.setattr(Decode, "serves", noted)
    at_once = step()
    last = [0, 1, 7, 10]
    assert torch.equal(step(last), at_once[last])
    monkeypatch.setattr(decode, "MOST_SEEN", 6 * 10 + 3 * 3 - 1)
    by_layers = step()
    assert torch.equal(step(last), by_layers[last])
    assert served == [True, True, False, False]
    assert not torch.equal(at_once, by_layers)
    assert (at_once - by_layers).abs().max() < BF16_CLOSE * by_layers.abs().max()


def test_a_base_in_few_bits_with_activations_in_fp32_goes_through_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("llama", tmp_path, **{**KNOWN["llama"], **TILED})
    pretend_tiles(monkeypatch)
    monkeypatch.setattr(Decode, "serves", lambda self, plan: pytest.fail("it is in bf16"))
    network = load_network(ModelConfig("tiny", dtype="float32", quantize="int8"), tmp_path, name="tiny")
    assert decoding(network, [9, 1]).isfinite().all()
