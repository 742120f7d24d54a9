"""Grafting: every Linear of a stock network, its embedding and its norms are replaced by ones that ask the step's
adapters.

The base product always runs without its bias, whether adapters are active or not, so that a request to the bare base is
bit-identical in any company. Weights stay where they are: a head that is tied to the embedding shares its weight still.
The output head sees only the tokens whose logits are wanted, and so asks for their gates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model.norms import Unit, embedding_factor, norm_shape, prove_norm
from server.primitives.gates import Gates
from server.primitives.site import (
    Active,
    EmbeddingShape,
    NormShape,
    SiteShape,
    apply_embedding,
    apply_norm,
    apply_site,
)

GatesOf = Callable[[Active], Gates | None]


@dataclass(frozen=True, slots=True)
class Sites:
    """Where adapters can act on a grafted network, by module name."""

    linears: Mapping[str, SiteShape]
    norms: Mapping[str, NormShape]
    embedding: EmbeddingShape | None


def gates_of_all(active: Active) -> Gates | None:
    return active.gates


def gates_of_wanted(active: Active) -> Gates | None:
    return active.wanted_gates


class GraftedLinear(nn.Module):
    """A base Linear and its Site. x is (1, T, I) or (T, I): the packed tokens of the step, in order."""

    def __init__(self, name: str, base: nn.Module, active: Active, gates_of: GatesOf) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.active = active
        self.gates_of = gates_of
        self.base_bias = _detach_bias(base)
        self.product = _bare_product(base)

    def forward(self, x: Tensor) -> Tensor:
        y = self._mixed(x)
        if self.active.routes is not None:
            self.active.routes.add(self.name, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y

    def _mixed(self, x: Tensor) -> Tensor:
        """With the static mixtures of the step's tokens."""
        operand = self.active.operands.get(self.name)
        gates = self.gates_of(self.active)
        if operand is None or gates is None:
            y = self.product(x)
            return y if self.base_bias is None else y + self.base_bias
        x_TI = x.reshape(-1, x.shape[-1])
        _check_count(self.name, x_TI.shape[0], gates)
        y_TO = apply_site(x_TI, gates, operand, self.product, self.base_bias)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


class GraftedEmbedding(nn.Module):
    """The base's embedding and its Site. Ids are (1, T)."""

    def __init__(self, name: str, base: nn.Module, active: Active) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.active = active

    @property
    def weight(self) -> Tensor:
        """Some networks ask for its dtype or device."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        operand = self.active.operands.get(self.name)
        gates = self.active.gates
        if operand is None or gates is None:
            return self.base(ids)
        ids_T = ids.reshape(-1)
        _check_count(self.name, len(ids_T), gates)
        return apply_embedding(ids_T, gates, operand, self.base).view(*ids.shape, -1)


class GraftedNorm(nn.Module):
    """A norm of the base and its Site."""

    def __init__(self, name: str, base: nn.Module, unit: Unit, active: Active) -> None:
        super().__init__()
        self.name = name
        self.base = base
        self.unit = unit.norm
        self.axis = unit.axis
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        operand = self.active.operands.get(self.name)
        gates = self.active.gates
        if operand is None or gates is None:
            return y
        _check_count(self.name, x.shape[self.axis], gates)
        return apply_norm(y, lambda: self.unit(x), gates, operand, axis=self.axis)


def graft_network(
    network: nn.Module, active: Active, seen: Mapping[str, Sequence[Tensor]], lengths: Sequence[int]
) -> Sites:
    """Replace every Linear, the embedding and the norms in place.

    `seen` holds what each norm was called with on probes of those lengths: see `norm_inputs`. A norm or an embedding
    that does not compute what its adapters need stays as it is, and no adapter is served there.
    """
    head = network.get_output_embeddings()  # type: ignore[operator]
    table = network.get_input_embeddings()  # type: ignore[operator]
    linears: dict[str, SiteShape] = {}
    norms: dict[str, NormShape] = {}
    embedding, head_name = None, ""
    factor = embedding_factor(table)
    for name, module in list(network.named_modules()):
        grafted: nn.Module
        if isinstance(module, nn.Linear | Conv1D):
            gates_of = gates_of_wanted if module is head else gates_of_all
            head_name = name if module is head else head_name
            grafted = GraftedLinear(name, module, active, gates_of)
            linears[name] = SiteShape(*_features(module), grafted.base_bias, isinstance(module, Conv1D))
        elif module is table and factor is not None:
            embedding = EmbeddingShape(name, len(table.weight), table.weight.shape[1], factor, "", tied=False)
            grafted = GraftedEmbedding(name, module, active)
        elif name in seen and (unit := prove_norm(module, seen[name], lengths)) is not None:
            norms[name] = norm_shape(module)
            grafted = GraftedNorm(name, module, unit, active)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, grafted)
    if embedding is not None:
        tied = head is not None and head.weight is table.weight
        embedding = replace(embedding, head=head_name, tied=tied)
    return Sites(linears, norms, embedding)


def _check_count(name: str, tokens: int, gates: Gates) -> None:
    if tokens != gates.gates_TK.shape[0]:
        raise ValueError(f"{name} saw {tokens} tokens of a step of {gates.gates_TK.shape[0]}")


def _features(module: nn.Linear | Conv1D) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def _detach_bias(base: nn.Module) -> Tensor | None:
    bias = base.bias
    if not isinstance(bias, Tensor):
        return None
    if not isinstance(base, Conv1D):
        base.register_parameter("bias", None)
    return bias.detach()


def _bare_product(base: nn.Module) -> Callable[[Tensor], Tensor]:
    weight = base.weight
    assert isinstance(weight, Tensor)
    if isinstance(base, Conv1D):
        return lambda x: torch.matmul(x, weight)
    if type(base) is nn.Linear:
        return lambda x: F.linear(x, weight)
    return base  # a quantized Linear (bitsandbytes), whose bias is gone
