"""LoRA on the embedding: the look-up plus a low-rank term, whose A has a column for each token.

The base may multiply its rows with a factor (Gemma), and so is what is added. DoRA scales the embedding's features, by
norms that are taken before that factor. A head that is tied to the embedding keeps the base's weight, as in PEFT.

r rank, V vocabulary, E embedding size.
Source: Hu et al. 2021 (arXiv:2106.09685); peft 0.21.2, tuners/lora/layer.py `Embedding`, variants.py
`DoraEmbeddingVariant`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from server.adapters.lowering.linears import ROOT, expect
from server.adapters.lowering.target import Target
from server.errors import AdapterIncompatible
from server.primitives.lowrank import LowRank
from server.primitives.scale import Scale
from server.primitives.site import EmbeddingShape, SiteValue

A, B, MAGNITUDE = "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"


def split(tensors: Mapping[str, Tensor], shape: EmbeddingShape | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the embedding, by what stands behind its name, and all others."""
    start = f"{ROOT}{shape.name}." if shape is not None else None
    own = {} if start is None else {name: tensor for name, tensor in tensors.items() if name.startswith(start)}
    rest = {name: tensor for name, tensor in tensors.items() if name not in own}
    return {name.removeprefix(str(start)): tensor for name, tensor in own.items()}, rest


def lower_rows(tensors: Mapping[str, Tensor], target: Target, *, rank: int, scaling: float) -> SiteValue:
    """y += s B A[:, id]."""
    A_rV, B_Er, factor = _factors(tensors, target, rank=rank, more={})
    return SiteValue(lowrank=LowRank(target.place(A_rV), target.place(B_Er * scaling * factor)))


def lower_dora_rows(tensors: Mapping[str, Tensor], target: Target, *, rank: int, scaling: float) -> SiteValue:
    """The base's row and s B A[:, id], times m / ||W + s A' B'||, the norm of each feature."""
    assert target.embedding is not None
    more = {MAGNITUDE: (target.embedding.features,)}
    A_rV, B_Er, factor = _factors(tensors, target, rank=rank, more=more)
    weight_VE = target.weight(target.embedding.name)
    A_rV, B_Er = A_rV.to(weight_VE.device), B_Er.to(weight_VE.device) * scaling
    norms_E = torch.linalg.vector_norm(weight_VE + (B_Er @ A_rV).t(), dim=0)
    dora_E = tensors[MAGNITUDE].float().to(weight_VE.device) / norms_E
    return SiteValue(
        scale_out=Scale(target.place(dora_E - 1)),
        lowrank=LowRank(target.place(A_rV), target.place(dora_E[:, None] * B_Er * factor)),
    )


def _factors(
    tensors: Mapping[str, Tensor], target: Target, *, rank: int, more: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor, Tensor, float]:
    """A and B in fp32, when these and `more` are all there is and fit, and what the base multiplies its rows with."""
    shape = target.embedding
    assert shape is not None
    wanted = {A: (rank, shape.vocabulary), B: (shape.features, rank), **more}
    if tensors.keys() != wanted.keys():
        raise AdapterIncompatible(f"{shape.name} has {sorted(tensors)} where {sorted(wanted)} are expected")
    for part, sizes in wanted.items():
        expect(shape.name, part, tensors[part], sizes)
    return tensors[A].float(), tensors[B].float(), shape.factor
