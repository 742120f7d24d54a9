"""Bases whose checkpoint holds its weights in 4 bits: GPTQ and AWQ, as they are stored, without their libraries.

Each Linear is `qweight`, `qzeros` and `scales`, with `g_idx` for GPTQ; a weight is (code - zero) * scale, and a group
of inputs shares scale and zero. GPTQ packs 8 inputs into 32 bits, AWQ 8 outputs, in an order of its own. GPTQ may have
sorted the inputs before it made groups (desc_act): g_idx tells each input's group. Its first format stores zeros less
one, so that a stored 15 means 16 to some readers and 0 to others: that is refused.

O out, I in, G groups.
Source: Frantar et al. 2022 (arXiv:2210.17323), AutoGPTQ qlinear_cuda_old.py; Lin et al. 2023 (arXiv:2306.00978),
AutoAWQ packing_utils.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig

from server.errors import StartupRefused
from server.kernels.quantized import BLOCK, Coded, pack

BITS = 4
CODES = 8  # in 32 bits
PARTS = ("qweight", "qzeros", "scales", "g_idx")
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 outputs each 4 bits hold
OURS = ("gptq", "awq")
KNOWN = (*OURS, "bitsandbytes")


def brought(shape: PretrainedConfig, asked: str) -> dict[str, Any] | None:
    """How the checkpoint says that it is quantized; None: not at all. Raises: StartupRefused."""
    told = getattr(shape, "quantization_config", None)
    if told is None:
        return None
    config: dict[str, Any] = dict(told if isinstance(told, dict) else told.to_dict())
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        config["quant_method"] = method = "bitsandbytes"
    if method not in KNOWN:
        raise StartupRefused(f"the checkpoint is quantized by {method!r}: known are {', '.join(KNOWN)}")
    if asked != "none":
        raise StartupRefused(f"--quantize {asked}: the checkpoint is quantized by {method} already; --quantize none")
    if method in OURS:
        _check(config)
    return config


def _check(config: Mapping[str, Any]) -> None:
    method, bits = config["quant_method"], config.get("bits")
    if bits != BITS:
        raise StartupRefused(f"the checkpoint is {method} with bits {bits}; {BITS} are served")
    if config.get("dynamic"):
        raise StartupRefused(f"the checkpoint is {method} with dynamic: settings per module are not served")
    layout = config.get("checkpoint_format", "gptq") if method == "gptq" else config.get("version", "gemm")
    known = ("gptq", "gptq_v2") if method == "gptq" else ("gemm",)
    if str(layout).lower() not in known:
        raise StartupRefused(f"the checkpoint is {method} in the format {layout}; known are {', '.join(known)}")


def unquantized(shape: PretrainedConfig) -> PretrainedConfig:
    """So that transformers builds plain Linears, and asks for no library."""
    plain = copy.deepcopy(shape)
    del plain.quantization_config
    return plain


def read_codes(folder: Path, config: Mapping[str, Any], network: nn.Module) -> dict[str, Coded]:
    """The codes of every Linear that the checkpoint has in 4 bits. Raises: StartupRefused."""
    stored: dict[str, dict[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, part = key.rpartition(".")
                if part in PARTS:
                    stored.setdefault(name, {})[part] = file.get_tensor(key)
    linears = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    if not stored or (strange := sorted(set(stored) - linears)):
        raise StartupRefused(
            f"the checkpoint has codes for {strange[0] if stored else 'no module'}, which is no Linear"
        )
    return {name: _codes(name, parts, config, network.get_submodule(name)) for name, parts in stored.items()}


def _codes(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], module: Any) -> Coded:
    missing = [part for part in ("qweight", "qzeros", "scales") if part not in parts]
    if missing:
        raise StartupRefused(f"the checkpoint has no {name}.{missing[0]}")
    gptq = config["quant_method"] == "gptq"
    codes_OI = (_gptq_weight if gptq else _awq)(parts["qweight"]).contiguous()
    zeros_OG = (_gptq_zeros(name, parts["qzeros"], config) if gptq else _awq(parts["qzeros"])).float()
    scales_OG = parts["scales"].t().float().contiguous()
    inputs, outputs, groups = module.in_features, module.out_features, scales_OG.shape[1]
    told = int(config.get("group_size", -1))
    group = inputs if told == -1 else told
    if codes_OI.shape != (outputs, inputs) or zeros_OG.shape != scales_OG.shape or group * groups != inputs:
        raise StartupRefused(f"the codes of {name} do not fit {outputs} x {inputs} in groups of {group}")
    if group % BLOCK:
        raise StartupRefused(f"the checkpoint has groups of {group} inputs: multiples of {BLOCK} are served")
    order_I = _order(name, parts.get("g_idx"), group) if gptq else None
    if order_I is not None:
        codes_OI = codes_OI[:, order_I]
    levels = torch.arange(2**BITS, dtype=torch.float32)
    return Coded(pack(codes_OI), levels, scales_OG, -zeros_OG * scales_OG, order_I)


def _split(packed: Tensor, axis: int) -> Tensor:
    """The 8 codes of each 32 bits, as a new last axis."""
    shifts = torch.arange(0, CODES * BITS, BITS, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & (2**BITS - 1)).to(torch.uint8).movedim(-1, axis)


def _gptq_weight(packed: Tensor) -> Tensor:
    return _split(packed, 1).flatten(0, 1).t()


def _gptq_zeros(name: str, packed: Tensor, config: Mapping[str, Any]) -> Tensor:
    zeros_OG = _split(packed, 2).flatten(1).t()
    if str(config.get("checkpoint_format", "gptq")).lower() == "gptq_v2":
        return zeros_OG
    if (zeros_OG == 2**BITS - 1).any():
        raise StartupRefused(f"{name} has a stored zero of 15, which means 16 to some readers of GPTQ and 0 to others")
    return zeros_OG + 1


def _awq(packed: Tensor) -> Tensor:
    places = torch.tensor(AWQ_PLACES).argsort()
    return _split(packed, 2)[..., places].flatten(1).t()


def _order(name: str, group_of_I: Tensor | None, group: int) -> Tensor | None:
    """Inputs by their groups; None where they are in order."""
    if group_of_I is None:
        return None
    order = torch.argsort(group_of_I, stable=True)
    if not torch.equal(group_of_I[order].long(), torch.arange(len(order)) // group):
        raise StartupRefused(f"{name}.g_idx has no groups of {group} inputs")
    return None if torch.equal(order, torch.arange(len(order))) else order
