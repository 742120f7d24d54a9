"""Which weights of a base are held in few bits, and how.

On a CPU the server rounds the weights itself (int8), or takes the codes of those who did, and multiplies with them by
its own products (server/kernels/quantized.py). On CUDA int8 and nf4 are bitsandbytes' modules, as transformers loads
them. What is no Linear stays as it is: embedding, norms, fused experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.errors import StartupRefused
from server.kernels.quantized import BLOCK, Coded, Held, largest_code, pack, round_float8, round_rows
from server.model.weights import base_weight

METHODS = ("none", "int8", "nf4", "fp8")


def loader_options(method: str, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """What transformers is told, so that bitsandbytes quantizes while it loads. Raises: StartupRefused."""
    from transformers import BitsAndBytesConfig

    if method not in METHODS:
        raise StartupRefused(f"--quantize {method}: known are {', '.join(METHODS)}")
    if method == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif method == "int8" and device.type != "cpu":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        return {}
    return {"quantization_config": config, "device_map": str(device)}


def hold(method: str, network: nn.Module, device: torch.device) -> dict[str, Held]:
    """The weights that are to be held in few bits, by the names of their Linears.

    The head chooses among the whole vocabulary: below 8 bits, and in float8, it would lose most (docs/bases.md),
    so it has int8 there.
    """
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    held: dict[str, Held] = {}
    for name, module in linears.items():
        if method == "fp8" and not _is_head(network, module):
            held[name] = round_float8(base_weight(module))
        elif method == "int8" or (method in ("nf4", "fp8") and _is_head(network, module)):
            if device.type == "cpu":
                held[name] = round_rows(base_weight(module), largest_code())
        elif device.type == "cpu" and (coded := _codes_of_bitsandbytes(module)) is not None:
            held[name] = coded
    return held


def _is_head(network: nn.Module, module: nn.Module) -> bool:
    return module is network.get_output_embeddings()  # type: ignore[operator]


def _codes_of_bitsandbytes(module: nn.Module) -> Coded | None:
    """What NF4 and FP4 weights are, before a CPU packs them anew; rows that blocks cannot be told of stay theirs."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    outputs, inputs = state.shape
    if inputs % BLOCK or state.blocksize % BLOCK:
        return None
    pairs = weight.detach().flatten()
    codes_OI = torch.stack([pairs >> 4, pairs & 15], 1).view(outputs, inputs)
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    if inputs % state.blocksize:  # a block goes on in the next row
        scales = scales.repeat_interleave(state.blocksize // BLOCK)[: outputs * inputs // BLOCK]
    return Coded(pack(codes_OI), state.code.float(), scales.float().view(outputs, -1))


@contextmanager
def multiplied_with(network: nn.Module, held: Mapping[str, Held]) -> Iterator[None]:
    """Until the end of the block, the network's own Linears answer as what is held does by plain operations.

    bitsandbytes', too: on CPUs with bf16 products its own pack the weight anew, and want inputs in multiples of 64.
    """
    linears = {network.get_submodule(name): own for name, own in held.items()}
    for module, own in linears.items():
        module.forward = partial(_answer, own, module)
    try:
        yield
    finally:
        for module in linears:
            del module.forward


def _answer(own: Held, module: Any, x: Tensor) -> Tensor:
    y = own.reference(x)
    return y if module.bias is None else y + module.bias
