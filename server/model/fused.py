"""What stands between a layer's products, in one native pass each: norms, rotation and storing of keys, attention of
decodes, SwiGLU.

A stock module keeps its place, its hooks and its Linears; only its forward changes, of a decoder as a whole where no
hook looks into it. Which modules compute what is meant here is known by their class, and proved on the load's own
probes; a base that fails goes back to its stock modules (`server.model.load`).

T tokens, H query heads, K KV heads, D head dimension.
Source: transformers 5.23, models/qwen2/modeling_qwen2.py, models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from server.kernels import native
from server.model.attention import AttentionPlan, in_place, read_cache, read_spans
from server.model.decode import Decode, HeadNorms, Parts, fits
from server.model.grafted import GraftedLinear, GraftedNorm, Joint
from server.model.norms import head_norms
from server.primitives.site import Active

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
# Decoders that are an embedding, such layers with one rotation for all, and a norm.
DECODERS = frozenset(
    {
        "llama.modeling_llama.LlamaModel",
        "mistral.modeling_mistral.MistralModel",
        "qwen2.modeling_qwen2.Qwen2Model",
        "qwen3.modeling_qwen3.Qwen3Model",
    }
)


def fuse(network: nn.Module, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Give the decoders, layers, attentions and MLPs that are known here native forwards; returns what takes them away.

    `dtype` is that of the activations.
    """
    attentions: dict[nn.Module, _Attention] = {}
    mlps: dict[nn.Module, _Mlp] = {}
    layers: dict[nn.Module, _Layer] = {}
    for module in network.modules() if native.serves(device, dtype) else ():
        kind = _kind(module)
        if kind in ATTENTIONS and _are_grafted(module, "q_proj", "k_proj", "v_proj", "o_proj"):
            attentions[module] = _Attention(module, ATTENTIONS[kind](module))
        elif kind in MLPS and _are_grafted(module, "gate_proj", "up_proj", "down_proj") and _is_silu(module):
            mlps[module] = _Mlp(module)
    for module in network.modules() if attentions and mlps else ():
        if _kind(module) not in LAYERS:
            continue
        layer: Any = module
        attention, mlp = attentions.get(layer.self_attn), mlps.get(layer.mlp)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        if attention and mlp and all(isinstance(norm, GraftedNorm) for norm in norms):
            layers[module] = _Layer(layer, attention, mlp)
    decoders: dict[nn.Module, _Decoder] = {}
    for module in network.modules() if layers else ():
        if _kind(module) not in DECODERS:
            continue
        decoder: Any = module
        own_layers = [layers.get(layer) for layer in decoder.layers]
        if all(own_layers) and isinstance(decoder.norm, GraftedNorm):
            decoders[module] = _Decoder(decoder, [layer for layer in own_layers if layer])
    fused: Mapping[nn.Module, Any] = {**attentions, **mlps, **layers, **decoders}
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
        self.joint = linears[0].joint if linears[0].beside == [linear.name for linear in linears] else None

    def __call__(self, x_TI: Tensor) -> Sequence[Tensor]:
        if self.joint is None or self._linears[0].active.routes is not None:
            return [linear(x_TI) for linear in self._linears]
        return self.joint.compute(x_TI)

    def side_by_side(self, x_TI: Tensor) -> Tensor | None:
        """In one tensor, without their biases; None where they are not one joint, or adapters do much here."""
        return None if self.joint is None else self.joint.side_by_side(x_TI)


class _Attention:
    def __init__(self, module: Any, window: int | None) -> None:
        self.module = module
        self.window = window
        self._stock = module.forward
        self._norms = (getattr(module, "q_norm", None), getattr(module, "k_norm", None))
        self.head_norms = _head_norms(self._norms)  # None where queries or keys have a norm that is not native
        self._active: Active = module.q_proj.active
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

    @property
    def joints(self) -> tuple[Joint, Joint] | None:
        """What it reads by and what it writes by."""
        read, write = self._read.joint, self._write.joint
        return None if read is None or write is None else (read, write)

    def serves(self, plan: object, x: Tensor) -> TypeGuard[AttentionPlan]:
        return isinstance(plan, AttentionPlan) and in_place(x, plan.cache, self.module.head_dim)

    def attend(self, x_TE: Tensor, position_embeddings: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        return self.write(self.read(x_TE, position_embeddings, plan))

    def read(self, x_TE: Tensor, position_embeddings: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        """What every token sees (T, H * D)."""
        norms = self.head_norms
        if norms is not None and norms.names.isdisjoint(self._active.operands):
            made_TO = self._read.side_by_side(x_TE)
            if made_TO is not None:
                return self._attend_at_once(made_TO, norms, position_embeddings, plan)
        return self._attend_in_steps(x_TE, position_embeddings, plan)

    def write(self, seen_TQ: Tensor) -> Tensor:
        (made_TE,) = self._write(seen_TQ)
        return made_TE

    def _attend_in_steps(self, x_TE: Tensor, position_embeddings: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        module = self.module
        shape = (x_TE.shape[0], -1, module.head_dim)
        query, key, value = (part.view(shape) for part in self._read(x_TE))
        if self._norms[0] is not None and self._norms[1] is not None:
            query, key = self._norms[0](query[None])[0], self._norms[1](key[None])[0]
        layer, cache = int(module.layer_idx), plan.cache
        cos, sin = position_embeddings
        native.rotate_and_store(query, key, value, cos[0], sin[0], plan.rows_T, cache.keys[layer], cache.values[layer])
        out = read_cache(query.transpose(0, 1), plan, layer, self.window, module.scaling, None, None)
        return out.view(x_TE.shape[0], -1)

    def _attend_at_once(
        self, made_TO: Tensor, norms: HeadNorms, position_embeddings: tuple[Tensor, Tensor], plan: AttentionPlan
    ) -> Tensor:
        """The same from queries, keys and values side by side."""
        assert self._read.joint is not None
        module, cache = self.module, plan.cache
        layer, (cos, sin) = int(module.layer_idx), position_embeddings
        out_TQ = native.begin_attention(
            made_TO,
            self._read.joint.bias,
            cos[0],
            sin[0],
            plan.rows_T,
            cache.keys[layer],
            cache.values[layer],
            plan.decode_blocks_BN,
            plan.decode_lengths_B,
            norms_2=norms.table_2,
            block_size=cache.block_size,
            window=self.window,
            scale=module.scaling,
        )
        plan.seen += 1
        if plan.spans:
            query_HTD = made_TO[:, : out_TQ.shape[1]].view(len(made_TO), -1, module.head_dim).transpose(0, 1)
            for first, out_nHD in read_spans(query_HTD, plan, layer, self.window, module.scaling, None, None):
                out_TQ[first : first + len(out_nHD)] = out_nHD.flatten(1)
        return out_TQ


class _Mlp:
    def __init__(self, module: Any) -> None:
        self._read = _Together(module.gate_proj, module.up_proj)
        self._write = _Together(module.down_proj)

    @property
    def joints(self) -> tuple[Joint, Joint] | None:
        read, write = self._read.joint, self._write.joint
        return None if read is None or write is None else (read, write)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x.reshape(-1, x.shape[-1])).view(x.shape)

    def compute(self, x_TE: Tensor) -> Tensor:
        made_TO = None
        if self._read.joint is not None and self._read.joint.bias is None:
            made_TO = self._read.side_by_side(x_TE)
        inner_TF = native.swiglu(*self._read(x_TE)) if made_TO is None else native.swiglu(made_TO)
        (made_TE,) = self._write(inner_TF)
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
        self._own_hooks = (module._forward_pre_hooks, module._forward_hooks)
        self._always = sum(map(len, self._own_hooks))  # what tells routes where they are
        self._before, self._behind = module.input_layernorm, module.post_attention_layernorm
        self._attention = attention
        self._mlp = mlp

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        plan, rotation = given.get("graft_plan"), given.get("position_embeddings")
        if any(self._hooks) or rotation is None or not self.serves(plan, hidden_states):
            stock: Tensor = self._stock(hidden_states, **given)
            return stock
        stream_TE = hidden_states.reshape(-1, hidden_states.shape[-1]).clone()
        return self.compute(None, stream_TE, rotation, plan).add_(stream_TE).view(hidden_states.shape)

    def is_looked_into(self) -> bool:
        return any(self._hooks) or sum(map(len, self._own_hooks)) > self._always

    def serves(self, plan: object, like: Tensor) -> TypeGuard[AttentionPlan]:
        """Whether it can work in the cache of that plan with activations like these."""
        return self._attention.serves(plan, like)

    def parts(self) -> Parts | None:
        """None where its attention or its MLP has more to it."""
        attention, mlp = self._attention, self._mlp
        joints = attention.joints, mlp.joints
        if joints[0] is None or joints[1] is None or attention.head_norms is None:
            return None
        module = attention.module
        return Parts(
            *(self._before, self._behind, *joints[0], *joints[1]),
            head_norms=attention.head_norms,
            number=int(module.layer_idx),
            window=attention.window,
            dim=module.head_dim,
            scale=module.scaling,
        )

    def compute(
        self, pending_TE: Tensor | None, stream_TE: Tensor, rotation: tuple[Tensor, Tensor], plan: AttentionPlan
    ) -> Tensor:
        """What its MLP adds to the stream, which gains what was pending and what its attention adds."""
        x_TE = _norm_of_sum(self._before, pending_TE, stream_TE)
        x_TE = _norm_of_sum(self._behind, self._attention.attend(x_TE, rotation, plan), stream_TE)
        return self._mlp.compute(x_TE)

    def compute_wanted(
        self,
        pending_TE: Tensor | None,
        stream_TE: Tensor,
        rotation: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        active: Active,
        wanted_R: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What `compute` gives for some of the tokens, and their stream: keys and values are those of all."""
        x_TE = _norm_of_sum(self._before, pending_TE, stream_TE)
        seen_RQ = self._attention.read(x_TE, rotation, plan).index_select(0, wanted_R)
        stream_RE = stream_TE.index_select(0, wanted_R)
        with active.for_the_wanted():
            x_RE = _norm_of_sum(self._behind, self._attention.write(seen_RQ), stream_RE)
            return self._mlp.compute(x_RE), stream_RE


class _Decoder:
    """Every layer, each sum one pass with the norm behind it. Where a hook looks into a layer, the stock decoder.

    Behind the last attention only those tokens go on whose logits are wanted; the others' hidden states are zeros.
    """

    def __init__(self, module: Any, layers: Sequence[_Layer]) -> None:
        self._module = module
        self._stock = module.forward
        self._layers = layers
        parts = [layer.parts() for layer in layers]
        known = [part for part in parts if part is not None]
        self._decode = Decode(known, module.norm.active) if len(known) == len(parts) and fits(known) else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        plan = others.get("graft_plan")
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        like = self._module.embed_tokens.weight if inputs_embeds is None else inputs_embeds
        if (
            position_ids is None
            or others.get("attention_mask") is not None
            or self._module.norm.active.routes is not None
            or not self._layers[0].serves(plan, like)
            or any(layer.is_looked_into() for layer in self._layers)
        ):
            stock: BaseModelOutputWithPast = self._stock(position_ids=position_ids, **given, **others)
            return stock
        x = self._module.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds.clone()
        rotation = self._module.rotary_emb(x, position_ids)
        active = self._module.norm.active
        wanted_R = active.wanted_R
        if wanted_R is not None and len(wanted_R) == x.shape[1]:
            wanted_R = None
        pending, stream = self._compute(x[0], rotation, plan, active, wanted_R)
        if wanted_R is None:
            return BaseModelOutputWithPast(last_hidden_state=_norm_of_sum(self._module.norm, pending, stream)[None])
        hidden_TE = torch.zeros_like(x[0])
        if len(wanted_R):
            with active.for_the_wanted():
                hidden_TE.index_copy_(0, wanted_R, _norm_of_sum(self._module.norm, pending, stream))
        return BaseModelOutputWithPast(last_hidden_state=hidden_TE[None])

    def _compute(
        self,
        stream_TE: Tensor,
        rotation: tuple[Tensor, Tensor],
        plan: AttentionPlan,
        active: Active,
        wanted_R: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """What the last MLP adds to the stream, and the stream, which has all else by then: of the wanted tokens."""
        if self._decode is not None and self._decode.serves(plan):
            return self._decode.compute(stream_TE, rotation, plan, wanted_R)
        pending_TE = None
        for layer in self._layers if wanted_R is None else self._layers[:-1]:
            pending_TE = layer.compute(pending_TE, stream_TE, rotation, plan)
        if wanted_R is not None:
            return self._layers[-1].compute_wanted(pending_TE, stream_TE, rotation, plan, active, wanted_R)
        assert pending_TE is not None
        return pending_TE, stream_TE


def _norm_of_sum(norm: GraftedNorm, pending_TE: Tensor | None, stream_TE: Tensor) -> Tensor:
    """Of the stream, once it has gained what is pending. Norms see (1, T, E)."""
    if pending_TE is None:
        return norm.forward(stream_TE[None])[0]
    return norm.of_sum(pending_TE[None], stream_TE[None])[0]


def _head_norms(norms: tuple[object, object]) -> HeadNorms | None:
    """Of queries and keys, each None where there is none."""
    known = [norm for norm in norms if isinstance(norm, GraftedNorm) and norm.fast is not None]
    if len(known) != sum(norm is not None for norm in norms):
        return None
    table_2 = head_norms(*(norm.fast if isinstance(norm, GraftedNorm) else None for norm in norms))
    return HeadNorms(table_2, frozenset(norm.name for norm in known))


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}".removeprefix(MODELS)


def _are_grafted(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), GraftedLinear) for name in names)


def _is_silu(module: Any) -> bool:
    return isinstance(module.act_fn, nn.SiLU) or type(module.act_fn).__name__ == "SiLUActivation"
