"""Every kind of adapter in one packed batch with chunked prefill, against PEFT running each of them alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from tests.oracle.conftest import ARCHITECTURES, Bench, TinyBase

TOLERANCE = 1e-4  # fp32; the packed products sum in another order
NEW_TOKENS = 6
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ATTENTION_AND_MLP = {
    "phi": (["q_proj", "v_proj", "fc1", "fc2"], "fc2"),
    "phi3": (["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "down_proj"),
    "gpt2": (["c_attn", "c_proj", "c_fc"], "mlp.c_proj"),
}
DEFAULT = (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "down_proj")


def configs(architecture: str) -> dict[str, tuple[str, Any]]:
    """Name -> (kind, PEFT config); more than one of most kinds, with different ranks and lengths."""
    targets, feedforward = ATTENTION_AND_MLP.get(architecture, DEFAULT)
    transposed = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    first, second = targets[0], targets[-1]
    ia3_targets = [*targets[:2], feedforward]
    return {
        "lora": ("lora", LoraConfig(r=4, lora_alpha=16, target_modules=targets, **transposed, **COMMON)),
        "lora-one-layer": (
            "lora",
            LoraConfig(r=2, lora_alpha=8, target_modules=targets, layers_to_transform=[1, 3], **transposed, **COMMON),
        ),
        "rslora-patterns": (
            "lora",
            LoraConfig(
                r=8,
                lora_alpha=16,
                use_rslora=True,
                target_modules=targets,
                rank_pattern={first: 3},
                alpha_pattern={second: 5, first: 7},
                **transposed,
                **COMMON,
            ),
        ),
        "lora-bias": (
            "lora",
            LoraConfig(r=3, lora_alpha=9, lora_bias=True, target_modules=[first], **transposed, **COMMON),
        ),
        "ia3": (
            "ia3",
            IA3Config(target_modules=ia3_targets, feedforward_modules=[feedforward], **transposed, **COMMON),
        ),
        "ia3-attention": (
            "ia3",
            IA3Config(target_modules=[first], feedforward_modules=[], **transposed, **COMMON),
        ),
        "prefix": ("prefix", PrefixTuningConfig(num_virtual_tokens=5, **COMMON)),
        "prefix-projected": (
            "prefix",
            PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **COMMON),
        ),
        "prompt": ("prompt", PromptTuningConfig(num_virtual_tokens=7, **COMMON)),
        "p-tuning": ("p-tuning", PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16, **COMMON)),
        "p-tuning-lstm": (
            "p-tuning",
            PromptEncoderConfig(
                num_virtual_tokens=2, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **COMMON
            ),
        ),
    }


def make_adapter(base: TinyBase, config: Any, folder: Path, seed: int) -> PeftModel:
    """A PEFT adapter with random, visible weights, saved to `folder`."""
    torch.manual_seed(seed)
    model = get_peft_model(base.fresh(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.eval().save_pretrained(folder)
    return model


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (length,), generator=generator).tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kind_in_one_packed_batch_equals_peft_alone(
    architecture: str, tiny_base: Callable[[str], TinyBase], bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    base, rig = tiny_base(architecture), bench(architecture)
    requests: list[tuple[list[int], Any]] = [(prompt(99, 13), []), (prompt(98, 4), [])]
    expected, texts = [], []
    plain = base.fresh()
    for ids, _ in requests:
        expected.append(_logits(plain, ids))
        texts.append(_greedy(plain, ids))
    base_logits = list(expected)
    for seed, (name, (kind, config)) in enumerate(configs(architecture).items()):
        peft_model = make_adapter(base, config, tmp_path / name, seed)
        ids = prompt(seed, 5 + 2 * seed)
        requests.append((ids, [(rig.graft(tmp_path / name, kind), 1.0)]))
        expected.append(_logits(peft_model, ids))
        texts.append(_greedy(peft_model, ids))
        base_logits.append(_logits(plain, ids))
    got = rig.run(requests, new=NEW_TOKENS)
    assert rig.mixed_steps > 5, "the requests did not share steps"
    assert rig.steps > NEW_TOKENS + 3, "no prompt was cut into chunks"
    names = ["base", "base-short", *configs(architecture)]
    for index, name in enumerate(names):
        ids = requests[index][0]
        error = (got[index][: len(ids)] - expected[index]).abs().max().item()
        assert error < TOLERANCE, f"{name} on {architecture} differs by {error:.1e}"
        if index > 1:
            effect = (expected[index] - base_logits[index]).abs().max().item()
            assert effect > 100 * TOLERANCE, f"{name} has no visible effect ({effect:.1e})"
        assert rig.sequences[index].tokens[len(ids) :] == texts[index], f"greedy text of {name} on {architecture}"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_a_fusion_is_exactly_the_weighted_sum_of_the_deltas(
    architecture: str, tiny_base: Callable[[str], TinyBase], bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    """The reference adds w * scaling * B A to the base weights and scales them, then runs the untouched network."""
    base, rig = tiny_base(architecture), bench(architecture)
    weights = {"lora": 0.7, "rslora-patterns": -0.4, "ia3": 0.6}
    merged = base.fresh()
    reference = dict(merged.named_parameters())
    untouched = {name: tensor.detach().clone() for name, tensor in reference.items()}
    mixture = []
    for seed, name in enumerate(weights):
        kind, config = configs(architecture)[name]
        peft_model = make_adapter(base, config, tmp_path / name, seed)
        mixture.append((rig.graft(tmp_path / name, kind), weights[name]))
        alone = peft_model.merge_and_unload()
        for key, tensor in alone.named_parameters():
            reference[key].data += weights[name] * (tensor.detach() - untouched[key])
    ids = prompt(5, 17)
    plain_ids = prompt(6, 9)
    got = rig.run([(ids, mixture), (plain_ids, []), (ids, mixture[:1])], new=1)
    error = (got[0][: len(ids)] - _logits(merged, ids)).abs().max().item()
    assert error < TOLERANCE
    plain_error = (got[1][: len(plain_ids)] - _logits(base.fresh(), plain_ids)).abs().max().item()
    assert plain_error < TOLERANCE


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    """A batch of one without padding: PEFT miscounts positions of padded soft prompts."""
    batch = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[0]
    return logits[-len(ids) :].float()


def _greedy(model: Any, ids: list[int]) -> list[int]:
    batch = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return out[0, -NEW_TOKENS:].tolist()
