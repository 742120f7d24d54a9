"""The engines that are measured: ours in its number formats, and every peer in those that may be its best here."""

from __future__ import annotations

from collections.abc import Collection

from benchmarks.engines.engine import Engine
from benchmarks.engines.llama import Llama
from benchmarks.engines.openvino import OpenVino
from benchmarks.engines.ours import Ours
from benchmarks.engines.peft import Peft
from benchmarks.engines.vllm import Vllm

OURS: tuple[Ours, ...] = (Ours(), Ours("ours-int8", family="ours-int8", options={"quantize": "int8"}))
PEERS: tuple[Engine, ...] = (
    Vllm("bfloat16", adapters=False),
    Vllm("float32", adapters=False),
    Vllm("bfloat16", adapters=True),
    Vllm("float32", adapters=True),
    Llama("bf16"),
    Llama("f16"),
    Llama("Q4_0"),
    Peft("bfloat16"),
    Peft("float32"),
    OpenVino(adapters=False),
    OpenVino(adapters=True),
)


def chosen(names: Collection[str]) -> list[Engine]:
    """By name, or by the program (`llama` is every llama.cpp, but `ours` ours as it is alone); none chosen: all."""
    everyone: tuple[Engine, ...] = (*OURS, *PEERS)
    exact = {one.name for one in everyone}
    programs = set(names) - exact
    return [one for one in everyone if not names or one.name in names or one.name.split("-")[0] in programs]
