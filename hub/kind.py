"""The kinds of adapters that a hub keeps: one word each, in records, listings and messages."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal[
    "lora", "adalora", "vera", "loha", "hra", "miss", "delora", "ia3", "beft",
    "bitfit", "ln-tuning", "trainable-tokens",
    "oft", "boft", "road", "shira", "sparse", "lokr", "fourierft", "c3a", "hira",
    "prefix", "prompt", "multitask-prompt", "p-tuning",
    "bottleneck", "loreft", "lora-moe",
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
