"""Where a stock decoder layer adds to the residual stream: found by name, proved by a forward pass over a few tokens.

A layer has two sublayers, attention and MLP. Each gets the stream r, reads its own input n, and leaves r + x. An edit
adds f(v) to x (docs/decisions/0017), where v is x itself (`output`), r + x (`stream`), r (`residual`) or n (`input`).
Forward hooks on the modules that transformers ships; never changes a weight.
Law: with f = 0 everywhere the logits are bit-identical to those of the bare network.

B batch, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from trainer.errors import BaseUnfit

Place = Literal["attention", "mlp"]
Reads = Literal["output", "stream", "residual", "input"]
Edit = Callable[[Tensor], Tensor]

ATTENTION: Final = ("self_attn", "attn", "attention")
MLP: Final = ("mlp", "block_sparse_moe", "feed_forward")
# A layer that norms what a sublayer gives before it adds it has both of these (gemma2, gemma3, olmo2).
ATTENTION_CLOSING, MLP_CLOSING = "post_attention_layernorm", "post_feedforward_layernorm"
# What gets the stream between the two sublayers, the first that is there.
BEFORE_MLP: Final = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2")
PROBE: Final = (3, 1, 4, 1, 5)
SAME_SUM: Final = 1e-5  # fp32, relative to the largest value of the stream


@dataclass(frozen=True, slots=True)
class Layer:
    """The modules of one decoder layer; `before_mlp` is the layer itself where both sublayers get the same stream."""

    whole: nn.Module
    attention: nn.Module
    attention_end: nn.Module
    mlp: nn.Module
    mlp_end: nn.Module
    before_mlp: nn.Module


@dataclass(slots=True)
class Seen:
    """What passed by in this forward, for a hook further on."""

    tensors: dict[str, Tensor] = field(default_factory=dict)


def find_layers(model: Any) -> list[Layer]:
    """The decoder layers, in order. Raises BaseUnfit where a name is not known or the sums do not hold."""
    decoder = model.base_model
    blocks = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if blocks is None:
        raise BaseUnfit(
            f"no decoder layers are found in {type(model).__name__}, so its residual stream is out of reach"
        )
    layers = [_layer(block, model) for block in blocks]
    _prove(model, layers)
    return layers


def hook(layer: Layer, place: Place, reads: Reads, edit: Edit) -> None:
    """Add edit(v) to what the sublayer leaves."""
    seen = Seen()
    end = layer.attention_end if place == "attention" else layer.mlp_end
    if reads == "output":
        end.register_forward_hook(lambda module, args, out: _changed(out, lambda x_BTH: x_BTH + edit(x_BTH)))
    elif reads == "stream" and place == "mlp":
        layer.whole.register_forward_hook(lambda module, args, out: _changed(out, lambda h_BTH: h_BTH + edit(h_BTH)))
    elif reads == "stream":
        _watch(layer.whole, seen, "r")
        end.register_forward_hook(
            lambda module, args, out: _changed(out, lambda x_BTH: x_BTH + edit(seen.tensors.pop("r") + x_BTH))
        )
    else:
        source = (
            (layer.attention if place == "attention" else layer.mlp)
            if reads == "input"
            else (layer.whole if place == "attention" else layer.before_mlp)
        )
        _watch(source, seen, "v")
        end.register_forward_hook(
            lambda module, args, out: _changed(out, lambda x_BTH: x_BTH + edit(seen.tensors.pop("v")))
        )


def _layer(block: nn.Module, model: Any) -> Layer:
    attention, mlp = _named(block, ATTENTION, model), _named(block, MLP, model)
    closes = hasattr(block, MLP_CLOSING)
    before = next((getattr(block, name) for name in BEFORE_MLP if hasattr(block, name)), block)
    if closes and not hasattr(block, "pre_feedforward_layernorm"):
        before = mlp
    return Layer(
        whole=block,
        attention=attention,
        attention_end=getattr(block, ATTENTION_CLOSING) if closes else attention,
        mlp=mlp,
        mlp_end=getattr(block, MLP_CLOSING) if closes else mlp,
        before_mlp=before,
    )


def _named(block: nn.Module, names: tuple[str, ...], model: Any) -> nn.Module:
    for name in names:
        if isinstance(module := getattr(block, name, None), nn.Module):
            return module
    raise BaseUnfit(f"a layer of {type(model).__name__} has none of {', '.join(names)}, which an edit needs")


def _prove(model: Any, layers: list[Layer]) -> None:
    """Each layer computes r + x twice, as `Layer` says: seen on a probe, with dropout off."""
    sums: list[tuple[str, Tensor, Tensor]] = []
    with _observed(layers, sums), torch.no_grad():
        training = model.training
        model.eval()
        model(input_ids=torch.tensor([PROBE], device=model.device), use_cache=False)
        model.train(training)
    for name, computed, expected in sums:
        error = (computed - expected).abs().max().item()
        if error > SAME_SUM * max(1.0, computed.abs().max().item()):
            raise BaseUnfit(
                f"{type(model).__name__} does not simply add its {name} to the residual stream (off by {error:.1e}), "
                "so an edit has no exact place in it"
            )


@contextmanager
def _observed(layers: list[Layer], sums: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
    handles = []
    for layer in layers:
        seen = Seen()
        handles += [
            _watch(layer.whole, seen, "r"),
            layer.attention_end.register_forward_hook(_keep(seen, "x attention")),
            layer.mlp_end.register_forward_hook(_keep(seen, "x mlp")),
            layer.whole.register_forward_hook(_compare(layer, seen, sums)),
        ]
        if layer.before_mlp is not layer.whole:
            handles.append(_watch(layer.before_mlp, seen, "r mlp"))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(layer: Layer, seen: Seen, sums: list[tuple[str, Tensor, Tensor]]) -> Any:
    def compare(module: nn.Module, args: Any, out: Any) -> None:
        found = seen.tensors
        after_attention = found["r"] + found["x attention"]
        if layer.before_mlp is not layer.whole:
            sums.append(("attention", found["r mlp"], after_attention))
        sums.append(("MLP", _tensor(out), after_attention + found["x mlp"]))

    return compare


def _watch(module: nn.Module, seen: Seen, name: str) -> Any:
    """Remember the hidden states that a module gets."""

    def watch(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.tensors[name] = args[0] if args else kwargs["hidden_states"]

    return module.register_forward_pre_hook(watch, with_kwargs=True)


def _keep(seen: Seen, name: str) -> Any:
    def keep(module: nn.Module, args: Any, out: Any) -> None:
        seen.tensors[name] = _tensor(out)

    return keep


def _tensor(out: Any) -> Tensor:
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor


def _changed(out: Any, change: Edit) -> Any:
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)
