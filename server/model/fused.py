"""What stands between a layer's products, in one native pass each: norms, rotation and storing of keys, SwiGLU.

A stock module keeps its place, its hooks and its Linears; only its forward changes. Which modules compute what is meant
here is known by their class, and proved on the load's own probes; a base that fails goes back to its stock modules
(`server.model.load`).

T tokens, H query heads, K KV heads, D head dimension.
Source: transformers 5.23, models/qwen2/modeling_qwen2.py, models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from server.kernels import native
from server.model.attention import AttentionPlan, in_place, read_cache
from server.model.grafted import GraftedLinear, GraftedNorm

MODELS = "transformers.models."


def _no_window(module: Any) -> int | None:
    return None


def _own_window(module: Any) -> int | None:
    window: int | None = module.sliding_window
    return window


def _common_window(module: Any) -> int | None:
    window: int | None = module.config.sliding_window
    return window


# Classes whose forwards are the two below, attentions with where their window stands. In some, queries and keys have
# norms of their own.
ATTENTIONS: Mapping[str, Callable[[Any], int | None]] = {
    "llama.modeling_llama.LlamaAttention": _no_window,
    "mistral.modeling_mistral.MistralAttention": _common_window,
    "qwen2.modeling_qwen2.Qwen2Attention": _own_window,
    "qwen3.modeling_qwen3.Qwen3Attention": _own_window,
}
MLPS = frozenset(
    {
        "llama.modeling_llama.LlamaMLP",
        "mistral.modeling_mistral.MistralMLP",
        "qwen2.modeling_qwen2.Qwen2MLP",
        "qwen3.modeling_qwen3.Qwen3MLP",
    }
)


# Layers that add the attention of a norm, then the MLP of a norm, to the stream.
LAYERS = frozenset(
    {
        "llama.modeling_llama.LlamaDecoderLayer",
        "mistral.modeling_mistral.MistralDecoderLayer",
        "qwen2.modeling_qwen2.Qwen2DecoderLayer",
        "qwen3.modeling_qwen3.Qwen3DecoderLayer",
    }
)


def fuse(network: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Give the layers, attentions and MLPs that are known here native forwards; returns what takes them away again.

    `dtype` is that of the activations.
    """
    attentions: dict[nn.Module, _Attention] = {}
    mlps: dict[nn.Module, _Mlp] = {}
    layers: dict[nn.Module, _Layer] = {}
    for module in network.modules() if native.serves(device, dtype) else ():
        kind = f"{type(module).__module__}.{type(module).__name__}".removeprefix(MODELS)
        if kind in ATTENTIONS and _are_grafted(module, "q_proj", "k_proj", "v_proj", "o_proj"):
            attentions[module] = _Attention(module, ATTENTIONS[kind](module))
        elif kind in MLPS and _are_grafted(module, "gate_proj", "up_proj", "down_proj") and _is_silu(module):
            mlps[module] = _Mlp(module)
    for module in network.modules() if attentions and mlps else ():
        kind = f"{type(module).__module__}.{type(module).__name__}".removeprefix(MODELS)
        if kind not in LAYERS:
            continue
        layer: Any = module
        attention, mlp = attentions.get(layer.self_attn), mlps.get(layer.mlp)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        if attention and mlp and all(isinstance(norm, GraftedNorm) for norm in norms):
            layers[module] = _Layer(layer, attention, mlp)
    fused: Mapping[nn.Module, Any] = {**attentions, **mlps, **layers}
    for module, own in fused.items():
        module.forward = own.forward

    def undo() -> None:
        for module in fused:
            del module.forward

    return undo


class _Together:
    """Linears that read the same input: their outputs (T, O), which nobody else holds, at once."""

    def __init__(self, *linears: GraftedLinear) -> None:
        self._linears = linears
        self._joint = linears[0].joint if linears[0].beside == [linear.name for linear in linears] else None

    def __call__(self, x_TI: Tensor) -> Sequence[Tensor]:
        if self._joint is None or self._linears[0].active.routes is not None:
            return [linear(x_TI) for linear in self._linears]
        return self._joint.compute(x_TI)


class _Attention:
    def __init__(self, module: Any, window: int | None) -> None:
        self._module = module
        self._window = window
        self._stock = module.forward
        self._norms = (getattr(module, "q_norm", None), getattr(module, "k_norm", None))
        self._read = _Together(module.q_proj, module.k_proj, module.v_proj)
        self._write = _Together(module.o_proj)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        plan = others.get("graft_plan")
        if not self.serves(plan, hidden_states):
            stock: tuple[Tensor, None] = self._stock(
                hidden_states, position_embeddings, attention_mask, past_key_values, **others
            )
            return stock
        made_TE = self.attend(hidden_states.reshape(-1, hidden_states.shape[-1]), position_embeddings, plan)
        return made_TE.view(hidden_states.shape), None

    def serves(self, plan: object, x: Tensor) -> TypeGuard[AttentionPlan]:
        return isinstance(plan, AttentionPlan) and in_place(x, plan.cache, self._module.head_dim)

    def attend(self, x_TE: Tensor, position_embeddings: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        module = self._module
        shape = (x_TE.shape[0], -1, module.head_dim)
        query, key, value = (part.view(shape) for part in self._read(x_TE))
        if self._norms[0] is not None and self._norms[1] is not None:
            query, key = self._norms[0](query[None])[0], self._norms[1](key[None])[0]
        layer, cache = int(module.layer_idx), plan.cache
        cos, sin = position_embeddings
        native.rotate_and_store(query, key, value, cos[0], sin[0], plan.rows_T, cache.keys[layer], cache.values[layer])
        out = read_cache(query.transpose(0, 1), plan, layer, self._window, module.scaling, None, None)
        (made_TE,) = self._write(out.view(x_TE.shape[0], -1))
        return made_TE


class _Mlp:
    def __init__(self, module: Any) -> None:
        self._read = _Together(module.gate_proj, module.up_proj)
        self._write = _Together(module.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x.reshape(-1, x.shape[-1])).view(x.shape)

    def compute(self, x_TE: Tensor) -> Tensor:
        gate_TF, up_TF = self._read(x_TE)
        (made_TE,) = self._write(native.swiglu(gate_TF, up_TF))
        return made_TE


class _Layer:
    """x + attention(norm(x)), and an MLP likewise. Where adapters edit the stream, by hooks, the stock layer."""

    def __init__(self, module: Any, attention: _Attention, mlp: _Mlp) -> None:
        self._stock = module.forward
        self._hooks = [
            hooks
            for sublayer in (module.self_attn, module.mlp)
            for hooks in (sublayer._forward_pre_hooks, sublayer._forward_hooks)
        ]
        self._norms = (module.input_layernorm, module.post_attention_layernorm)
        self._attention = attention
        self._mlp = mlp

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        plan, rotation = given.get("graft_plan"), given.get("position_embeddings")
        if any(self._hooks) or rotation is None or not self._attention.serves(plan, hidden_states):
            stock: Tensor = self._stock(hidden_states, **given)
            return stock
        before, behind = self._norms
        x_TE = before.forward(hidden_states).view(-1, hidden_states.shape[-1])
        stream = self._attention.attend(x_TE, rotation, plan).view(hidden_states.shape)
        x_TE = behind.of_sum(hidden_states, stream).view(x_TE.shape)
        return self._mlp.compute(x_TE).view(hidden_states.shape).add_(stream)


def _are_grafted(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), GraftedLinear) for name in names)


def _is_silu(module: Any) -> bool:
    return isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"
