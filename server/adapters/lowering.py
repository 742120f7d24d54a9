"""Lowering: a file in PEFT's format becomes primitives, one function per family of methods.

What the hub has validated is not trusted here: every tensor must find its Site and fit it, and every tensor must be
used, or the adapter is refused. Tensor names are PEFT's: `base_model.model.<module>.<part>`.

r rank, I in, O out, V virtual tokens, L layers, KH KV heads, D head dimension, E embedding size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from server.errors import AdapterIncompatible
from server.primitives.bias import Bias
from server.primitives.lowrank import LowRank
from server.primitives.prefix import LayerShape, Prefix
from server.primitives.scale import Scale
from server.primitives.site import SiteShape, SiteValue

ROOT = "base_model.model."


@dataclass(frozen=True, slots=True)
class Target:
    """What an adapter is lowered onto."""

    sites: Mapping[str, SiteShape]
    layers: tuple[LayerShape, ...]
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    max_rank: int
    max_virtual: int

    def place(self, tensor: Tensor) -> Tensor:
        """On the device, in its dtype. An infinity here would reach every token of a batch: 0 * inf is no number."""
        placed = tensor.to(device=self.device, dtype=self.dtype).contiguous()
        if not placed.isfinite().all():
            largest = tensor.abs().max().item()
            raise AdapterIncompatible(f"a value of {largest:.2g} is no finite number in {self.dtype}")
        return placed


@dataclass(frozen=True, slots=True)
class Lowered:
    """Primitives, or a soft prompt that the base must still turn into a prefix."""

    sites: Mapping[str, SiteValue] = field(default_factory=dict)
    prefix: Prefix | None = None
    soft_prompt_VE: Tensor | None = None


Lowering = Callable[[Mapping[str, Any], Mapping[str, Tensor], Target], Lowered]


def lower(kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Raises: AdapterIncompatible, naming the field or tensor and both values."""
    lowering = LOWERINGS.get(kind)
    if lowering is None:
        raise AdapterIncompatible(f"kind {kind} is not served; served are {', '.join(sorted(LOWERINGS))}")
    return lowering(config, tensors, target)


def lower_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """LoRA with rsLoRA, rank_pattern, alpha_pattern and lora_bias.

    Source: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (arXiv:2312.03732); peft tuners/lora/layer.py.
    """
    parts = _by_module(tensors, ("lora_A.weight", "lora_B.weight", "lora_B.bias"))
    sites = {}
    for module, found in parts.items():
        shape = _site(module, target)
        missing = {"lora_A.weight", "lora_B.weight"} - found.keys()
        if missing:
            raise AdapterIncompatible(f"{module} lacks {' and '.join(sorted(missing))}")
        A_rI, B_Or = found["lora_A.weight"], found["lora_B.weight"]
        rank = int(_pattern(config.get("rank_pattern"), module, config["r"]))
        alpha = float(_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
        if rank > target.max_rank:
            raise AdapterIncompatible(f"rank {rank} of {module} is above max_rank {target.max_rank}")
        _expect(module, "lora_A", A_rI, (rank, shape.in_features))
        _expect(module, "lora_B", B_Or, (shape.out_features, rank))
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        bias = found.get("lora_B.bias")
        if bias is not None:
            _expect(module, "lora_B.bias", bias, (shape.out_features,))
        sites[module] = SiteValue(
            lowrank=LowRank(target.place(A_rI), target.place(B_Or.float() * scaling)),
            bias=None if bias is None else Bias(target.place(bias.float() * scaling)),
        )
    return Lowered(sites)


def lower_ia3(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """IA3: feedforward modules scale their input, the others their output, bias included.

    Source: Liu et al. 2022 (arXiv:2205.05638); peft tuners/ia3/layer.py.
    """
    sites = {}
    for module, found in _by_module(tensors, ("ia3_l",)).items():
        shape = _site(module, target)
        vector = found["ia3_l"]
        if _is_feedforward(module, config.get("feedforward_modules")):
            _expect(module, "ia3_l", vector, (1, shape.in_features))
            sites[module] = SiteValue(scale_in=Scale(target.place(vector.float().flatten() - 1)))
        else:
            _expect(module, "ia3_l", vector, (shape.out_features, 1))
            excess_O = vector.float().flatten() - 1
            base = shape.bias_O
            sites[module] = SiteValue(
                scale_out=Scale(target.place(excess_O)),
                bias=None if base is None else Bias(target.place(excess_O.to(base.device) * base.float())),
            )
    return Lowered(sites)


def lower_prefix(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Prefix tuning: (V, 2L * KH * D), for each layer its keys and then its values.

    Source: Li and Liang 2021 (arXiv:2101.00190); peft peft_model.py get_prompt.
    """
    table = _prompt_embeddings(config, tensors, target)
    widths = [shape.kv_heads * shape.head_dim for shape in target.layers]
    _expect("prefix", "prompt_embeddings", table, (table.shape[0], 2 * sum(widths)))
    keys, values = [], []
    columns = iter(table.split([width for width in widths for _ in "kv"], dim=1))
    for shape in target.layers:
        keys.append(_heads_first(next(columns), shape, target))
        values.append(_heads_first(next(columns), shape, target))
    return Lowered(prefix=Prefix(tuple(keys), tuple(values)))


def lower_soft_prompt(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """Prompt tuning and P-tuning: embeddings (V, E) that run once through the base.

    Source: Lester et al. 2021 (arXiv:2104.08691); Liu et al. 2021 (arXiv:2103.10385).
    """
    table = _prompt_embeddings(config, tensors, target)
    _expect("soft prompt", "prompt_embeddings", table, (table.shape[0], target.hidden_size))
    return Lowered(soft_prompt_VE=target.place(table))


LOWERINGS: Mapping[str, Lowering] = {
    "lora": lower_lora,
    "ia3": lower_ia3,
    "prefix": lower_prefix,
    "prompt": lower_soft_prompt,
    "p-tuning": lower_soft_prompt,
}


def _by_module(tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """Tensors grouped by module; every name must end in one of `parts`."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = next((part for part in parts if name.endswith("." + part)), None)
        if part is None or not name.startswith(ROOT):
            raise AdapterIncompatible(f"tensor {name} is not one of {ROOT}<module>.{{{', '.join(parts)}}}")
        modules.setdefault(name[len(ROOT) : -len(part) - 1], {})[part] = tensor
    return modules


def _site(module: str, target: Target) -> SiteShape:
    shape = target.sites.get(module)
    if shape is None:
        raise AdapterIncompatible(f"the adapter targets {module}, which is no Linear of this base")
    return shape


def _expect(module: str, part: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise AdapterIncompatible(f"{part} of {module} has shape {list(tensor.shape)}, this base needs {list(shape)}")


def _prompt_embeddings(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Tensor:
    if set(tensors) != {"prompt_embeddings"}:
        raise AdapterIncompatible(f"tensors {sorted(tensors)} where prompt_embeddings alone is expected")
    table = tensors["prompt_embeddings"]
    count = int(config["num_virtual_tokens"])
    if table.dim() != 2 or table.shape[0] != count:
        raise AdapterIncompatible(f"prompt_embeddings has shape {list(table.shape)}, num_virtual_tokens is {count}")
    if count > target.max_virtual:
        raise AdapterIncompatible(f"num_virtual_tokens {count} is above the limit of {target.max_virtual}")
    return table


def _heads_first(table_VF: Tensor, shape: LayerShape, target: Target) -> Tensor:
    return target.place(table_VF.view(-1, shape.kv_heads, shape.head_dim).transpose(0, 1))


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the module's name or its ending."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _is_feedforward(module: str, names: str | list[str] | None) -> bool:
    """PEFT's rule, which compares endings without a dot."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module.endswith(name) for name in names or [])
