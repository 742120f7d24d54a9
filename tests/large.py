"""A base and an adapter of any size that cost next to nothing to make: sparse files with a number at each megabyte.

The numbers make every megabyte another one, so bytes that arrive at the wrong place are found out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.hub.makers import lora_config, raw_safetensors, tensor

WIDTH, HEADS, RANK = 4096, 32, 128
MB = 1 << 20
LAYER_BYTES = 2 * RANK * WIDTH * 4
MB_A_LAYER = LAYER_BYTES // MB


def write_large(root: Path, *, megabytes: int, seed: int = 0, **changes: Any) -> Path:
    """A good LoRA adapter with weights of this many megabytes (a multiple of 4), and its base, both in new folders."""
    layers = megabytes // MB_A_LAYER
    assert layers * MB_A_LAYER == megabytes, f"{megabytes} MB are no multiple of {MB_A_LAYER}"
    base, folder = root / "base", root / f"large-{seed}"
    if not base.exists():
        _write_base(base, layers)
    folder.mkdir(parents=True)
    config = lora_config(base, r=RANK, target_modules=["q_proj"], **changes)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
        shapes |= {f"{name}_A.weight": (RANK, WIDTH), f"{name}_B.weight": (WIDTH, RANK)}
    _write_sparse(folder / "adapter_model.safetensors", shapes, dtype="F32", seed=seed)
    return folder


def _write_base(folder: Path, layers: int) -> None:
    """A llama that has query projections only, which is all that the adapter asks about."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "vocab_size": WIDTH,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {f"model.layers.{layer}.self_attn.q_proj.weight": (WIDTH, WIDTH) for layer in range(layers)}
    _write_sparse(folder / "model.safetensors", shapes, dtype="BF16", seed=None)


def _write_sparse(path: Path, shapes: Mapping[str, tuple[int, int]], *, dtype: str, seed: int | None) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + shape[0] * shape[1] * {"F32": 4, "BF16": 2}[dtype]
        header[name] = tensor(dtype, shape, position, end)
        position = end
    head = raw_safetensors(header)
    with path.open("wb") as target:
        target.write(head)
        if seed is not None:
            for index in range(position // MB):
                target.seek(len(head) + index * MB)
                target.write(np.float32(seed * 1e6 + index + 1).tobytes())
        target.truncate(len(head) + position)
