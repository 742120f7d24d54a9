"""What a method must know of a base before any weight is read: its shape, its modules, its tokenizer. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Anatomy:
    folder: Path
    architecture: str  # the class in transformers
    model_type: str
    hidden_size: int | None
    layers: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    uneven_heads: bool  # keys and values differ in width, or layers do
    context: int | None  # positions that the base was made for
    sliding_window: int | None
    linears: tuple[str, ...]  # full name of every linear module but the output head
    head: str  # full name of the output head
    widths: Mapping[str, tuple[int, int]]  # inputs and outputs of every linear module, the head among them
    norms: tuple[str, ...]  # full name of every norm
    biased: frozenset[str]  # the linear modules and norms that have a bias
    embedding: str  # full name of the table of tokens
    tied: bool  # the output head's weight is that table
    conv1d: bool  # the linear modules hold their weight transposed (GPT-2)
    attention_interface: bool
    count_tokens: Callable[[str], int]
    plain_tokens: Callable[[str], tuple[int, ...]]  # without those that begin or end a text
    vocabulary: int

    @cached_property
    def linear_names(self) -> tuple[str, ...]:
        """The short names by which linear modules are targeted, sorted: q_proj for model.layers.0.self_attn.q_proj."""
        return tuple(sorted({short_name(name) for name in self.linears}))

    def has_linear(self, target: str) -> bool:
        return any(names(target, module) for module in self.linears)


def short_name(module: str) -> str:
    """Drop the path before a module's name; a number alone names nothing, so its parent stays."""
    parts = module.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]


def names(target: str, module: str) -> bool:
    """PEFT's rule: a target is a module's whole name or its last parts."""
    return module == target or module.endswith(f".{target}")
