"""Which weights of a base are held in few bits, and how.

On a CPU the server rounds the weights itself (int8), or takes the codes of those who did, and multiplies with them by
its own products (server/kernels/quantized.py). On CUDA int8 and nf4 are bitsandbytes' modules, as transformers loads
them. What is no Linear stays as it is: embedding, norms, fused experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.errors import StartupRefused
from server.kernels.quantized import Held, largest_code, round_rows
from server.model.weights import base_weight

METHODS = ("none", "int8", "nf4")


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
    """The weights that are to be held in few bits, by the names of their Linears."""
    if method != "int8" or device.type != "cpu":
        return {}
    linears = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return {name: round_rows(base_weight(module), largest_code()) for name, module in linears}


@contextmanager
def multiplied_with(network: nn.Module, held: Mapping[str, Held]) -> Iterator[None]:
    """Until the end of the block, the network's own Linears multiply with what is held, widened."""
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, _, own=own: F.linear(inputs[0], own.weight().to(inputs[0].dtype), _bias(module))
        )
        for name, own in held.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _bias(module: nn.Module) -> Tensor | None:
    return module.bias if isinstance(module.bias, Tensor) else None
