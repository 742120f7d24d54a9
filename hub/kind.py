"""The kinds of adapters that a hub keeps: one word each, in records, listings and messages."""

from __future__ import annotations

from typing import Literal, get_args

Kind = Literal[
    "lora",
    "adalora",
    "vera",
    "loha",
    "hra",
    "miss",
    "delora",
    "ia3",
    "beft",
    "prefix",
    "prompt",
    "p-tuning",
    "lora-moe",
    "bottleneck",
    "loreft",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
