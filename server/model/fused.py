"""What stands between a layer's products, in one native pass each: rotation and storing of keys, SwiGLU.

A stock module keeps its place, its hooks and its Linears; only its forward changes. Which modules compute what is meant
here is known by their class, and proved on the load's own probes; a base that fails goes back to its stock modules
(`server.model.load`).

T tokens, H query heads, K KV heads, D head dimension.
Source: transformers 5.23, models/qwen2/modeling_qwen2.py, models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from server.kernels import native
from server.model.attention import AttentionPlan, in_place, read_cache
from server.model.grafted import GraftedLinear

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


def fuse(network: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Give the attentions and MLPs that are known here their native forwards; returns what takes them away again.

    `dtype` is that of the activations.
    """
    fused = []
    for module in network.modules() if native.serves(device, dtype) else ():
        kind = f"{type(module).__module__}.{type(module).__name__}".removeprefix(MODELS)
        forward: Callable[..., Any] | None = None
        if kind in ATTENTIONS and _are_grafted(module, "q_proj", "k_proj", "v_proj", "o_proj"):
            forward = _Attention(module, ATTENTIONS[kind](module)).forward
        elif kind in MLPS and _are_grafted(module, "gate_proj", "up_proj", "down_proj") and _is_silu(module):
            forward = _mlp(module)
        if forward is not None:
            module.forward = forward
            fused.append(module)

    def undo() -> None:
        for module in fused:
            del module.forward

    return undo


class _Attention:
    def __init__(self, module: Any, window: int | None) -> None:
        self._module = module
        self._window = window
        self._stock = module.forward
        self._norms = (getattr(module, "q_norm", None), getattr(module, "k_norm", None))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: object = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        module, plan = self._module, others.get("graft_plan")
        if not isinstance(plan, AttentionPlan) or not in_place(hidden_states, plan.cache, module.head_dim):
            stock: tuple[Tensor, None] = self._stock(
                hidden_states, position_embeddings, attention_mask, past_key_values, **others
            )
            return stock
        shape = (hidden_states.shape[1], -1, module.head_dim)
        query, key = module.q_proj(hidden_states).view(shape), module.k_proj(hidden_states).view(shape)
        value = module.v_proj(hidden_states).view(shape)
        if self._norms[0] is not None and self._norms[1] is not None:
            query, key = self._norms[0](query[None])[0], self._norms[1](key[None])[0]
        layer, cache = int(module.layer_idx), plan.cache
        cos, sin = position_embeddings
        native.rotate_and_store(query, key, value, cos[0], sin[0], plan.rows_T, cache.keys[layer], cache.values[layer])
        out = read_cache(query.transpose(0, 1), plan, layer, self._window, module.scaling, None, None)
        return module.o_proj(out.view(*hidden_states.shape[:-1], -1)), None


def _mlp(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        made_TF = native.swiglu(gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1]))
        y: Tensor = module.down_proj(made_TF.view(*x.shape[:-1], -1))
        return y

    return forward


def _are_grafted(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), GraftedLinear) for name in names)


def _is_silu(module: Any) -> bool:
    return isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"
