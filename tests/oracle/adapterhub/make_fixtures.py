"""Writes the files that AdapterHub's `adapters` library makes, and the logits that it computes with them.

Never run by the tests: `adapters` needs a transformers older than ours. It was run once, in an environment of its own:
    python -m venv venv
    venv/bin/pip install adapters==1.3.0 transformers==4.57.6 huggingface_hub==0.36.2 "torch==2.13.*"
    venv/bin/python tests/oracle/adapterhub/make_fixtures.py tests/oracle/adapterhub/fixtures
Each base folder holds a tiny random network, one folder per adapter with random, visible weights as
`save_adapter(..., use_safetensors=True)` writes it, and `logits.safetensors`: input_ids, and per adapter the logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import (
    BnConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

SIZES: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15}
BASES = {
    "llama": LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,  # prefix tuning of `adapters` does not work with fewer
        max_position_embeddings=64,
        **SIZES,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES),
}
PROMPT = [5, 9, 41, 3, 60, 42, 17, 8, 30, 11, 7]

ADAPTERS = {
    "seq_bn": SeqBnConfig(reduction_factor=4),
    "seq_bn-one-layer": SeqBnConfig(reduction_factor={"1": 8, "default": 16}, leave_out=[0], non_linearity="gelu"),
    "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4, scaling=0.7),
    "par_bn": ParBnConfig(reduction_factor=4),
    "scaled_par_bn": ParBnConfig(reduction_factor=8, scaling="learned", non_linearity="gelu_new"),
    "par_bn-attention": ParBnConfig(reduction_factor=8, mh_adapter=True, output_adapter=False, scaling=2.0),
    "adapter_plus": BnConfig(
        mh_adapter=False,
        output_adapter=True,
        reduction_factor=8,
        non_linearity="gelu",
        original_ln_before=True,
        original_ln_after=False,
        residual_before_ln=False,
        scaling="channel",
        init_weights="houlsby",
    ),
    "compacter": CompacterConfig(reduction_factor=4),
    "compacter++": CompacterPlusPlusConfig(reduction_factor=4, shared_phm_rule=False, factorized_phm_W=False),
    "lora": LoRAConfig(r=4, alpha=16, attn_matrices=["q", "v"], intermediate_lora=True, output_lora=True),
    "lora-one-layer": LoRAConfig(r=2, alpha=3, attn_matrices=["k"], leave_out=[1]),
    "ia3": IA3Config(),
    "loreft": LoReftConfig(r=3, prefix_positions=3, suffix_positions=2),
    "loreft-tied": LoReftConfig(r=2, prefix_positions=2, suffix_positions=2, tied_weights=True, layers=[1]),
    "noreft": NoReftConfig(r=2, prefix_positions=4),
    "prefix_tuning": PrefixTuningConfig(prefix_length=4, bottleneck_size=8),
    "prefix_tuning_flat": PrefixTuningConfig(prefix_length=3, flat=True),
    "dora": DoRAConfig(r=3, alpha=6, attn_matrices=["q", "k"], output_lora=True),
}
ON_GPT2 = ("seq_bn", "double_seq_bn", "par_bn", "lora", "lora-one-layer", "ia3", "loreft", "prefix_tuning_flat")


def main(out: Path) -> None:
    for name, config in BASES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.normal_(std=0.2)
                parameter.copy_(parameter.half())  # stored in half the bytes, exactly
        save_base(model, out / name / "base")
        adapters.init(model)
        ids = torch.tensor([PROMPT])
        logits = {"input_ids": ids[0]}
        for seed, (kind, made) in enumerate(ADAPTERS.items()):
            if name == "gpt2" and kind not in ON_GPT2:  # one of each form is enough there, and DoRA fails
                continue
            logits[kind] = make(model, kind, made, out / name / kind, seed, ids)
        with torch.inference_mode():
            logits["base"] = model(ids).logits[0].clone()
        save_file(logits, out / name / "logits.safetensors")


def save_base(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    stored = {key: value.half() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "generation_config.json").unlink(missing_ok=True)


def make(model: Any, kind: str, config: Any, folder: Path, seed: int, ids: torch.Tensor) -> torch.Tensor:
    """Put one adapter on the model, make its weights visible, save it, and answer with it."""
    torch.manual_seed(100 + seed)
    before = {name for name, _ in model.named_parameters()}
    model.add_adapter(kind.replace("-", "_"), config=config, set_active=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in before and "parametrizations" not in name and "projection" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval()
    if isinstance(config, PrefixTuningConfig):  # `adapters` cannot write shared tensors without a pickle
        model.save_adapter(str(folder), kind.replace("-", "_"), with_head=False, use_safetensors=False)
        rewrite_pickle(folder)
    else:
        model.save_adapter(str(folder), kind.replace("-", "_"), with_head=False, use_safetensors=True)
    with torch.inference_mode():
        logits = model(ids).logits[0].clone()
    model.delete_adapter(kind.replace("-", "_"))
    path = folder / "adapter_config.json"
    said = json.loads(path.read_text())
    said["model_name"] = None  # a path of the machine that made it
    path.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")
    return logits


def rewrite_pickle(folder: Path) -> None:
    """What `hub import` asks for when it finds a pickle."""
    pickled = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    save_file({key: value.clone() for key, value in pickled.items()}, folder / "adapter.safetensors")
    (folder / "pytorch_adapter.bin").unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
