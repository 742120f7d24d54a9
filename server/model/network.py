"""The base at work: a stock causal language model, grafted, that computes one packed step.

T packed tokens of the step, R rows whose logits are wanted, V virtual tokens, E embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from server.kernels.gathered import Gathered
from server.model.attention import AttentionPlan, Span
from server.model.grafted import GraftedEmbedding, GraftedLinear, Joint
from server.model.kv import KvCache
from server.model.places import Places
from server.primitives.experts import ParameterShape
from server.primitives.gates import Gates
from server.primitives.prefix import LayerShape, Prefix
from server.primitives.route import Routes, reading
from server.primitives.site import Active, EmbeddingShape, NormShape, SiteOperand, SiteShape


@dataclass(frozen=True, slots=True)
class Batch:
    """One step on the device: packed decodes, then prompt chunks."""

    ids_T: Tensor
    positions_T: Tensor
    plan: AttentionPlan
    wanted_R: Tensor
    gates: Gates | None
    operands: Mapping[str, SiteOperand]
    gathered: Gathered | None = None
    wanted_gates: Gates | None = None  # those of wanted_R, for the output head
    routes: Routes | None = None


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What the rest of the server must know of the base."""

    name: str
    layers: tuple[LayerShape, ...]
    sites: Mapping[str, SiteShape]
    norms: Mapping[str, NormShape]
    embedding: EmbeddingShape | None
    places: frozenset[str]
    hidden_size: int
    vocab_size: int
    context: int
    end_ids: frozenset[int]
    dtype: torch.dtype
    device: torch.device
    quantized: bool
    parameters: Mapping[str, ParameterShape] = field(default_factory=dict)  # weights of routers and experts
    decoder_layers: tuple[str, ...] = ()  # module names; none where they could not be told
    groups: tuple[tuple[str, ...], ...] = ()  # of Linears that read the same input
    numbers: Mapping[str, int] = field(default_factory=dict)  # of Linears and norms: see `server.model.grafted.Sites`
    weight_bytes: int = 0  # of the base in memory, as it is held


class Network:
    def __init__(self, stock: nn.Module, facts: BaseFacts, active: Active, places: Places) -> None:
        self._stock = stock
        self._active = active
        self._places = places
        self.facts = facts

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """Logits (R, vocabulary) in fp32; fills the plan's KV rows."""
        self._active.operands, self._active.gathered, self._active.gates = batch.operands, batch.gathered, batch.gates
        self._active.wanted_gates, self._active.wanted_R = batch.wanted_gates, batch.wanted_R
        self._active.routes = batch.routes
        self._places.arm(batch.operands)
        out = self._stock(
            input_ids=batch.ids_T[None],
            position_ids=batch.positions_T[None],
            use_cache=False,
            logits_to_keep=batch.wanted_R,
            graft_plan=batch.plan,
        )
        return out.logits[0].float()

    def forward_with_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits of `forward`, and the hidden states (T, E) that enter the middle layer, in fp32.

        Only where the base's layers could be told apart.
        """
        layers = self.facts.decoder_layers
        seen: list[Tensor] = []

        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        watching = self._stock.get_submodule(layers[len(layers) // 2]).register_forward_pre_hook(look, with_kwargs=True)
        try:
            logits_RV = self.forward(batch)
        finally:
            watching.remove()
        return logits_RV, seen[0][0].float()

    @torch.inference_mode()
    def reading(self, prompt_ids: Sequence[int]) -> Tensor:
        """What a trained router reads of a prompt (E), in fp32: the table's own rows, not as the base scales them."""
        table: Any = self._stock.get_input_embeddings()  # type: ignore[operator]
        rows = torch.tensor(prompt_ids, device=self.facts.device)
        return reading(table.weight[rows])

    @torch.inference_mode()
    def compile_prefix(self, embeddings_VE: Tensor, *, block_size: int, after: Prefix | None = None) -> Prefix:
        """The KV that virtual tokens leave in the bare base, at the first positions or behind another prefix."""
        start = after.length if after is not None else 0
        stop = start + embeddings_VE.shape[0]
        cache = self.new_cache(-(-stop // block_size), block_size)
        if after is not None:
            cache.load(after, (0, start), range(start))
        positions = torch.arange(start, stop, device=self.facts.device)
        blocks = torch.arange(cache.blocks, device=self.facts.device)[None]
        plan = AttentionPlan(cache, positions, None, None, [Span(stop - start, stop, blocks)])
        self._active.operands, self._active.gathered, self._active.gates = {}, None, None
        self._active.wanted_gates, self._active.wanted_R, self._active.routes = None, None, None
        self._stock(
            inputs_embeds=embeddings_VE.to(self.facts.device, self.facts.dtype)[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=torch.zeros(1, dtype=torch.long, device=self.facts.device),  # nobody reads them
            graft_plan=plan,
        )
        return cache.read(range(start, stop))

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """The (O, I) weight of a grafted Linear, or the embedding's, in fp32, not to be written to."""
        grafted = self._stock.get_submodule(name)
        if isinstance(grafted, GraftedEmbedding):
            return grafted.weight.detach().float()
        assert isinstance(grafted, GraftedLinear)
        return grafted.weight()

    def joints(self) -> list[Joint]:
        """The Linears that adapters may change, those that read the same input together."""
        linears = [module for module in self._stock.modules() if isinstance(module, GraftedLinear)]
        return list({id(linear.joint): linear.joint for linear in linears}.values())

    def new_cache(self, blocks: int, block_size: int) -> KvCache:
        facts = self.facts
        return KvCache(facts.layers, blocks=blocks, block_size=block_size, dtype=facts.dtype, device=facts.device)


def span_plan(cache: KvCache, chunks: Sequence[tuple[int, int, Sequence[int]]]) -> AttentionPlan:
    """A plan of prompt chunks alone, each (count, length so far, blocks): for probes."""
    spans = []
    rows: list[int] = []
    for count, length, blocks in chunks:
        spans.append(Span(count, length, torch.tensor([list(blocks)], device=cache.keys[0].device)))
        rows += [
            blocks[position // cache.block_size] * cache.block_size + position % cache.block_size
            for position in range(length - count, length)
        ]
    return AttentionPlan(cache, torch.tensor(rows, device=cache.keys[0].device), None, None, spans)
