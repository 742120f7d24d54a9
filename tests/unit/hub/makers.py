"""Small bases and adapters made by hand, without torch: good ones, and the pieces to make bad ones of.

Raw files are put together byte by byte where a library would refuse to write what a test needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[Any]

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 48, 2, 4, 2, 8, 64
KV_WIDTH = KV_HEADS * HEAD_DIM
TARGETS = ("q_proj", "v_proj")

# (inputs, outputs) of every Linear of one layer.
LINEARS: Mapping[str, tuple[int, int]] = {
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD_DIM),
    "self_attn.k_proj": (HIDDEN, KV_WIDTH),
    "self_attn.v_proj": (HIDDEN, KV_WIDTH),
    "self_attn.o_proj": (HEADS * HEAD_DIM, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}


def linear_names(*leaves: str) -> list[str]:
    """The full names of the Linear layers with these last parts."""
    return [
        f"model.layers.{layer}.{name}"
        for layer in range(LAYERS)
        for name in LINEARS
        if name.rpartition(".")[2] in leaves
    ]


def sizes(module: str) -> tuple[int, int]:
    """(inputs, outputs) of a Linear by its full name."""
    return LINEARS[module.split(".", 3)[3]]


def write_base(folder: Path, **changes: Any) -> Path:
    """A two-layer llama with grouped-query attention, a head of its own, and a tokenizer file."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    save_file(base_tensors(), folder / "model.safetensors")
    return folder


def base_tensors() -> dict[str, Array]:
    """Every weight of the llama above, all zeros."""
    tensors: dict[str, Array] = {
        name: np.zeros((VOCAB, HIDDEN), np.float32) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    tensors["model.norm.weight"] = np.zeros(HIDDEN, np.float32)
    for layer in range(LAYERS):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = np.zeros(HIDDEN, np.float32)
        for name, (inputs, outputs) in LINEARS.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = np.zeros((outputs, inputs), np.float32)
    return tensors


def lora_config(base: Path, **changes: Any) -> dict[str, Any]:
    """As PEFT writes it, shortened; a value of ... leaves its key out."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "bias": "none",
        "use_dora": False,
        "target_modules": list(TARGETS),
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return {key: value for key, value in {**config, **changes}.items() if value is not Ellipsis}


def lora_tensors(
    *, rank: int = 4, modules: Sequence[str] | None = None, seed: int = 0, dtype: Any = np.float32
) -> dict[str, Array]:
    """Random A and B for the given modules."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module in linear_names(*TARGETS) if modules is None else modules:
        inputs, outputs = sizes(module)
        tensors[f"base_model.model.{module}.lora_A.weight"] = random.normal(size=(rank, inputs)).astype(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = random.normal(size=(outputs, rank)).astype(dtype)
    return tensors


def write_adapter(folder: Path, config: Any, tensors: Mapping[str, Array]) -> Path:
    """A folder in PEFT's format."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    return folder


def write_lora(folder: Path, base: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A good LoRA adapter; another seed gives another digest."""
    rank = changes.get("r", 4)
    return write_adapter(folder, lora_config(base, **changes), lora_tensors(rank=rank, seed=seed))


def write_prompt(folder: Path, base: Path, *, kind: str = "PROMPT_TUNING", tokens: int = 3, **changes: Any) -> Path:
    """A good adapter of virtual tokens: prompt, p-tuning or prefix."""
    width = 2 * LAYERS * KV_WIDTH if kind == "PREFIX_TUNING" else HIDDEN
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "num_virtual_tokens": tokens,
        "token_dim": KV_WIDTH if kind == "PREFIX_TUNING" else HIDDEN,
        "num_layers": LAYERS,
        "num_attention_heads": KV_HEADS if kind == "PREFIX_TUNING" else HEADS,
        "num_transformer_submodules": 1,
        **changes,
    }
    values = np.random.default_rng(0).normal(size=(tokens, width)).astype(np.float32)
    return write_adapter(folder, config, {"prompt_embeddings": values})


def write_ia3(folder: Path, base: Path, **changes: Any) -> Path:
    """A good IA3 adapter over values (outputs) and the MLP's way down (inputs)."""
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "target_modules": ["v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        **changes,
    }
    tensors = {}
    for module in linear_names("v_proj", "down_proj"):
        inputs, outputs = sizes(module)
        shape = (1, inputs) if module.endswith("down_proj") else (outputs, 1)
        tensors[f"base_model.model.{module}.ia3_l"] = np.ones(shape, np.float32)
    return write_adapter(folder, config, tensors)


def write_router(folder: Path, base: Path, pins: Sequence[str], *, top_k: int = 2, seed: int = 0) -> Path:
    """A good router, if its experts are in the hub that it is pushed to."""
    config = {"peft_type": "LORA_MOE", "base_model_name_or_path": str(base), "experts": list(pins), "top_k": top_k}
    random = np.random.default_rng(seed)
    rows = {part: random.normal(size=(LAYERS, len(pins), HIDDEN)) for part in ("weight", "prompt_weight")}
    return write_adapter(folder, config, {f"router.{part}": value.astype(np.float32) for part, value in rows.items()})


def write_golden(folder: Path, *, rows: int = 2, length: int = 5) -> Path:
    """Golden rows beside an adapter."""
    tensors: dict[str, Array] = {}
    for row in range(rows):
        tensors[f"{row}.input_ids"] = np.arange(length, dtype=np.int64)
        tensors[f"{row}.logits"] = np.zeros(VOCAB, np.float32)
    save_file(tensors, folder / "golden.safetensors")
    listed = [{"prompt": f"prompt {row}", "tokens": length} for row in range(rows)]
    (folder / "golden.json").write_text(json.dumps({"schema_version": 1, "rows": listed}))
    return folder


def raw_safetensors(header: Any, payload: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header at all: an object, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def tensor(dtype: str, shape: Sequence[int], begin: int, end: int) -> dict[str, Any]:
    """One entry of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
