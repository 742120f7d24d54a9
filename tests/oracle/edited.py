"""Stock networks with hooks that edit the residual stream: what bottleneck adapters and LoReFT are compared with.

PEFT has neither. Each class reads an adapter's folder in our own format and does what the paper says, tensor by tensor,
on hooks around the stock modules; it shares no code with the server. Format: decision 17.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "silu": lambda x: x * torch.sigmoid(x),
    "swish": lambda x: x * torch.sigmoid(x),
    "tanh": torch.tanh,
    "leakyrelu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "none": lambda x: x,
    "identity": lambda x: x,
}
# The module of a layer whose output is added to the stream, for attention and MLP.
BEHIND_A_NORM = ("gemma2",)
SIDE_BY_SIDE = ("phi",)  # the MLP's stream is the layer's input


class Edited(nn.Module):
    """A stock network with the edits of one or more adapters, each with its weight."""

    def __init__(self, stock: nn.Module, architecture: str, terms: list[tuple[Path, float]]) -> None:
        super().__init__()
        self.stock = stock
        self.architecture = architecture
        self.seen: dict[str, Tensor] = {}
        self.prompt_length: int | None = None
        self.load(terms)
        self.layers = next(
            module
            for name, module in stock.named_modules()
            if isinstance(module, nn.ModuleList) and re.fullmatch(r".*\.(layers|h)", name)
        )
        for index, layer in enumerate(self.layers):
            self._hook(index, layer)

    def load(self, terms: list[tuple[Path, float]]) -> None:
        """These adapters instead of those before."""
        self.terms = [
            (
                json.loads((folder / "adapter_config.json").read_text()),
                safetensors.torch.load_file(folder / "adapter_model.safetensors"),
                weight,
            )
            for folder, weight in terms
        ]

    def forward(self, *, prompt_length: int | None = None, **kwargs: Any) -> Any:
        """`prompt_length` of the tokens given are the prompt; where it is not told, all of them."""
        self.prompt_length = prompt_length
        return self.stock(**kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return self.stock.generate(**kwargs)  # type: ignore[operator]

    def _hook(self, index: int, layer: Any) -> None:
        attention = layer.attn if self.architecture == "gpt2" else layer.self_attn
        writers = (attention, layer.mlp)
        if self.architecture in BEHIND_A_NORM:
            writers = (layer.post_attention_layernorm, layer.post_feedforward_layernorm)

        def enter(module: Any, args: Any, kwargs: Any) -> None:
            self.seen["residual"] = _given(args, kwargs)

        def read(module: Any, args: Any, kwargs: Any) -> None:
            self.seen["input"] = _given(args, kwargs)

        def after_attention(module: Any, args: Any, output: Any) -> Any:
            made = output[0] if isinstance(output, tuple) else output
            made = self._changed(index, "attention", made)
            if self.architecture not in SIDE_BY_SIDE:
                self.seen["residual"] = self.seen["residual"] + made
            return (made, *output[1:]) if isinstance(output, tuple) else made

        def after_mlp(module: Any, args: Any, output: Any) -> Any:
            made = output[0] if isinstance(output, tuple) else output
            made = self._changed(index, "mlp", made)
            return (made, *output[1:]) if isinstance(output, tuple) else made

        def leave(module: Any, args: Any, output: Any) -> Any:
            change = torch.zeros_like(output)
            for config, tensors, weight in self.terms:
                if config["peft_type"] == "LOREFT":
                    change += weight * loreft(config, tensors, index, output, self.prompt_length)
                elif config["reads"] == "stream" and "mlp" in config["places"]:
                    change += weight * bottleneck(config, tensors, index, "mlp", output)
            return output + change

        layer.register_forward_pre_hook(enter, with_kwargs=True)
        attention.register_forward_pre_hook(read, with_kwargs=True)
        writers[0].register_forward_hook(after_attention)
        layer.mlp.register_forward_pre_hook(read, with_kwargs=True)
        writers[1].register_forward_hook(after_mlp)
        layer.register_forward_hook(leave)

    def _changed(self, index: int, sublayer: str, made: Tensor) -> Tensor:
        """Edits of what the sublayer adds; those that read the stream after all others."""
        for late in (False, True):
            change = torch.zeros_like(made)
            values = {**self.seen, "output": made, "stream": self.seen["residual"] + made}
            for config, tensors, weight in self.terms:
                if config["peft_type"] != "BOTTLENECK" or sublayer not in config["places"]:
                    continue
                if (config["reads"] == "stream") == late and not (late and sublayer == "mlp"):
                    change += weight * bottleneck(config, tensors, index, sublayer, values[config["reads"]])
            made = made + change
        return made


def bottleneck(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], index: int, sublayer: str, v: Tensor
) -> Tensor:
    """scaling * (up(act(down(norm(v))))), or nothing in a layer that is left out."""
    if config.get("layers") is not None and index not in config["layers"]:
        return torch.zeros_like(v)
    own = f"layers.{index}.{sublayer}."
    parts = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
    if config.get("norm_before"):
        v = F.layer_norm(v, v.shape[-1:], parts["norm.weight"], parts["norm.bias"])
    middle = ACTIVATIONS[config["non_linearity"]](_linear(parts, "down", v))
    scaling = config.get("scaling", 1.0)
    return _linear(parts, "up", middle) * (parts["scaling"] if isinstance(scaling, str) else scaling)


def loreft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], index: int, h: Tensor, prompt_length: int | None = None
) -> Tensor:
    """R'(act(W h + b) - R h) at the first and last positions of a prompt; a single token is a generated one."""
    change = torch.zeros_like(h)
    if config.get("layers") is not None and index not in config["layers"]:
        return change
    length = h.shape[1] if prompt_length is None else prompt_length
    counts = {side: int(count) for side, count in re.findall(r"([fl])(\d+)", config["positions"])}
    first, last = (min(counts.get(side, 0), length // 2) for side in "fl")
    apart = len(counts) == 2 and not config["tied_weights"]
    for name, chosen in (("first", slice(0, first)), ("last", slice(length - last, length))):
        own = f"layers.{index}.{name}." if apart else f"layers.{index}."
        R = tensors.get(own + "rotate_layer.weight")
        if R is None or chosen.start == chosen.stop:
            continue
        part = h[:, chosen]
        source = F.linear(part, tensors[own + "learned_source.weight"], tensors[own + "learned_source.bias"])
        source = ACTIVATIONS[config.get("non_linearity") or "none"](source)
        if config.get("subtract_projection", True):
            source = source - part @ R.t()
        change[:, chosen] = source @ R
    return change


def _linear(parts: Mapping[str, Tensor], half: str, x: Tensor) -> Tensor:
    if f"{half}.weight" in parts:
        return F.linear(x, parts[f"{half}.weight"], parts[f"{half}.bias"])
    small = parts.get(f"{half}.phm_weight")
    if small is None:
        small = torch.einsum("nir,nro->nio", parts[f"{half}.phm_left"], parts[f"{half}.phm_right"])
    rule = parts[f"{half}.phm_rule"]
    whole = torch.einsum("nab,nio->aibo", rule, small)  # the Kronecker product, block by block
    rows, columns = rule.shape[1] * small.shape[1], rule.shape[2] * small.shape[2]
    return x @ whole.reshape(rows, columns) + parts[f"{half}.bias"]


def _given(args: Any, kwargs: Any) -> Tensor:
    given: Tensor = args[0] if args else kwargs["hidden_states"]
    return given


def write_edits(folder: Path, config: Mapping[str, Any], *, layers: int, hidden: int) -> None:
    """Random, visible weights in the format."""
    meant = range(layers) if config.get("layers") is None else config["layers"]
    tensors: dict[str, Tensor] = {}
    for index in meant:
        if config["peft_type"] == "LOREFT":
            both = "+" in config["positions"] and not config["tied_weights"]
            for end in ("first.", "last.") if both else ("",):
                own, r = f"layers.{index}.{end}", config["r"]
                tensors[own + "rotate_layer.weight"] = torch.linalg.qr(torch.randn(hidden, r))[0].t().contiguous()
                tensors[own + "learned_source.weight"] = torch.randn(r, hidden) * 0.3
                tensors[own + "learned_source.bias"] = torch.randn(r)
            continue
        for sublayer in config["places"]:
            size = (config.get("layer_sizes") or {}).get(str(index), config["bottleneck_size"])
            own = f"layers.{index}.{sublayer}."
            for half, inputs, outputs in (("down", hidden, size), ("up", size, hidden)):
                tensors |= {own + half + part: value for part, value in _random(config, inputs, outputs).items()}
            if config.get("norm_before"):
                tensors[own + "norm.weight"] = 1 + 0.3 * torch.randn(hidden)
                tensors[own + "norm.bias"] = 0.3 * torch.randn(hidden)
            if isinstance(config.get("scaling"), str):
                tensors[own + "scaling"] = 1 + 0.5 * torch.randn(1 if config["scaling"] == "learned" else hidden)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def _random(config: Mapping[str, Any], inputs: int, outputs: int) -> dict[str, Tensor]:
    parts = {".bias": 0.2 * torch.randn(outputs)}
    n, rank = config.get("phm_dim"), config.get("phm_rank")
    if n is None:
        return {**parts, ".weight": 0.2 * torch.randn(outputs, inputs)}
    parts[".phm_rule"] = torch.randn(n, n, n)
    if rank is None:
        return {**parts, ".phm_weight": 0.2 * torch.randn(n, inputs // n, outputs // n)}
    left, right = torch.randn(n, inputs // n, rank), torch.randn(n, rank, outputs // n)
    return {**parts, ".phm_left": 0.4 * left, ".phm_right": 0.4 * right}


def edit_configs() -> dict[str, dict[str, Any]]:
    """A row for each option that changes what is computed."""
    both = ["attention", "mlp"]
    return {
        "houlsby": _bottleneck("output", both, 6, "swish"),
        "pfeiffer": _bottleneck("stream", ["mlp"], 5, "relu", layer_sizes={"1": 3}, layers=[0, 1, 3]),
        "adapter-plus": _bottleneck("stream", both, 4, "gelu", scaling="channel", norm_before=True),
        "parallel": _bottleneck("residual", both, 8, "tanh", scaling=0.5),
        "parallel-input": _bottleneck("input", both, 7, "leakyrelu", scaling="learned", norm_before=True),
        "compacter": _bottleneck("output", both, 8, "gelu_new", phm_dim=4, phm_rank=1),
        "compacter-whole": _bottleneck("stream", ["mlp"], 4, "none", phm_dim=2, phm_rank=None),
    }


def _bottleneck(reads: str, places: list[str], size: int, non_linearity: str, **more: Any) -> dict[str, Any]:
    return {
        "peft_type": "BOTTLENECK",
        "task_type": "CAUSAL_LM",
        "places": places,
        "reads": reads,
        "bottleneck_size": size,
        "non_linearity": non_linearity,
        **more,
    }


def loreft_configs() -> dict[str, dict[str, Any]]:
    base = {"peft_type": "LOREFT", "task_type": "CAUSAL_LM"}
    return {
        "loreft": {**base, "r": 3, "positions": "f2+l3", "tied_weights": True},
        "loreft-untied": {**base, "r": 2, "positions": "f4+l4", "tied_weights": False, "layers": [0, 2]},
        "loreft-last": {**base, "r": 4, "positions": "l1", "non_linearity": "relu"},
        "direft": {**base, "r": 4, "positions": "f5", "subtract_projection": False, "layers": [1, 3]},
    }
