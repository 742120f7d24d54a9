"""The two floors of a step: bytes it must move over the machine's read bandwidth, operations over its matrix rate.

Both are measured in the very run, with the best that torch offers for the number format of the weights. What a step
must move: every weight that is multiplied, the keys and values of the sequences so far, the adapters' own weights. It
must compute two operations a weight and token, and attention's. A step cannot be faster than the larger of the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from benchmarks.bases import Base
from benchmarks.load import Load

READ_BYTES = 1 << 29
TRIES = 5
TOKENS, OUTPUTS, INPUTS = 512, 4864, 896  # of the product whose rate is measured
BYTES_OF_BF16 = 2


@dataclass(frozen=True)
class Machine:
    """Bytes and operations per second."""

    bytes_per_s: float
    operations_per_s: float


def measure_floors(threads: int) -> dict[str, Any]:
    """By the number format of the weights: bf16 stands for any way to multiply 16-bit weights exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        products = {name: 2 * TOKENS * OUTPUTS * INPUTS / _best(make()) for name, make in _PRODUCTS.items()}
        return {"read_bytes_per_s": _bandwidth(), "operations_per_s": products}
    finally:
        torch.set_num_threads(before)


def _bandwidth() -> float:
    """The best of two ways to read: a sum, and a product of a matrix and a vector."""
    matrix = torch.ones(READ_BYTES // 4 // INPUTS, INPUTS)
    vector = torch.ones(INPUTS)
    seconds = min(_best(lambda: matrix.sum()), _best(lambda: matrix @ vector))
    return matrix.numel() * 4 / seconds


def _best(work: Callable[[], object]) -> float:
    work()
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _plain(dtype: torch.dtype) -> Callable[[], object]:
    x, weight = torch.randn(TOKENS, INPUTS, dtype=dtype), torch.randn(OUTPUTS, INPUTS, dtype=dtype)
    return lambda: functional.linear(x, weight)


def _fp16_weights() -> Callable[[], object]:
    """fp32 activations, fp16 weights (exact for the range of bf16 ones that checkpoints have)."""
    packed = torch.ops.quantized.linear_prepack_fp16(torch.randn(OUTPUTS, INPUTS), None)
    x = torch.randn(TOKENS, INPUTS)
    return lambda: torch.ops.quantized.linear_dynamic_fp16(x, packed)


_PRODUCTS: dict[str, Callable[[], Callable[[], object]]] = {
    "fp32": lambda: _plain(torch.float32),
    "bf16": lambda: _plain(torch.bfloat16),
    "fp16 weights": _fp16_weights,
}


def machine_of(floors: dict[str, Any]) -> Machine:
    return Machine(floors["read_bytes_per_s"], max(floors["operations_per_s"].values()))


def floor_s(base: Base, load: Load, machine: Machine, ranks: Sequence[int] = (), weight_bytes: float = 2.0) -> float:
    """The least seconds that a load can take: prompts by their operations, then steps of `at_once` tokens.

    `ranks`: of the distinct adapters of one step. Attention's operations are left out: they are few at these lengths.
    """
    token_operations = 2 * (base.product_weights + sum(map(base.lora_weights, ranks)) / max(1, len(ranks)))
    waves = -(-load.requests // load.at_once)
    prefill = load.requests * load.prompt * token_operations / machine.operations_per_s
    weights = base.product_weights * weight_bytes + sum(map(base.lora_weights, ranks)) * BYTES_OF_BF16
    cached = load.at_once * (load.prompt + load.new / 2) * base.kv_elements * BYTES_OF_BF16
    step = max(
        (weights + cached) / machine.bytes_per_s,
        min(load.at_once, load.requests) * token_operations / machine.operations_per_s,
    )
    return prefill + waves * (load.new - 1) * step
