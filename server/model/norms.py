"""What adapters of norms and embeddings rest on, proved for each module of a base before it serves.

A norm computes y = n * (w + c) + b, with n the normalised x, and c zero (Llama) or one (Gemma). Its architecture is not
asked: a copy of the stock module gets the weight at which it gives n, and what it gives, times the base's own weight,
must be what the stock module gives on what it was called with. So every RMSNorm and LayerNorm is one case, and what is
neither is left alone. An embedding gives its row, times one factor for all (Gemma).

F features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from server.kernels import native
from server.primitives.site import NormShape

# Relative to the largest output: products of one rounding each, in the dtype of the base.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


TINY = 1e-3  # of inputs of size one: their mean square is of the size of any epsilon


@dataclass(frozen=True, slots=True)
class Unit:
    """A norm with a weight of one and no bias, and the axis along which it sees the tokens."""

    norm: nn.Module
    axis: int


@contextmanager
def norm_inputs(network: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """What every module that looks like a norm is called with, by its name, until the end of the block."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in network.named_modules():
        if not _looks_like_norm(module):
            continue

        def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], name: str = name) -> None:
            if len(given) == 1 and not named and isinstance(given[0], Tensor):
                seen.setdefault(name, []).append(given[0])

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def prove_norm(norm: nn.Module, seen: Sequence[Tensor], lengths: Sequence[int]) -> Unit | None:
    """The norm with a weight of one and without bias, or None where it is no such norm, or not one row per token.

    It was called once on each probe, of these numbers of tokens.
    """
    axis = _token_axis(seen, lengths)
    if axis is None:
        return None
    for unit, c in ((_with_weight(norm, 1.0), 0.0), (_with_weight(norm, 0.0), 1.0)):
        if all(_holds(norm, unit, x, c=c) for x in seen):
            return Unit(unit, axis)
    return None


@dataclass(frozen=True, slots=True)
class NativeNorm:
    """An RMSNorm in one pass."""

    weight_F: Tensor
    offset: float
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return native.rms_norm(x, self.weight_F, offset=self.offset, eps=self.eps)

    def of_sum(self, x: Tensor, y: Tensor) -> Tensor:
        """That of y + x, which y becomes."""
        return native.add_and_norm(x, y, self.weight_F, offset=self.offset, eps=self.eps)


def fast_norm(norm: nn.Module, seen: Sequence[Tensor]) -> NativeNorm | None:
    """The native RMSNorm that gives what this module gives, or None where none does."""
    weight = norm.weight
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or getattr(norm, "bias", None) is not None:
        return None
    weight_F = weight.detach()
    if not native.serves(weight_F.device, weight_F.dtype) or any(x.dtype != weight_F.dtype for x in seen):
        return None
    for offset in (0.0, 1.0):
        made = NativeNorm(weight_F, offset, eps)
        if all(_close(norm(x), made(x)) for whole in seen for x in (whole, whole * TINY)):
            return made
    return None


def head_norms(*norms: NativeNorm | None) -> npt.NDArray[np.void]:
    """As HEAD_NORM. Whoever holds it holds the norms, too."""
    table = np.zeros(len(norms), native.HEAD_NORM)
    for row, norm in zip(table, norms, strict=True):
        if norm is not None:
            row["weight"], row["offset"], row["eps"] = norm.weight_F.data_ptr(), norm.offset, norm.eps
    return table


def norm_shape(norm: nn.Module) -> NormShape:
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    return NormShape(weight.detach(), bias.detach() if isinstance(bias, Tensor) else None)


def embedding_factor(embedding: nn.Module) -> float | None:
    """What the embedding multiplies its rows with, or None where it does something else."""
    weight = embedding.weight
    if not isinstance(embedding, nn.Embedding) or not isinstance(weight, Tensor) or embedding.max_norm is not None:
        return None
    ids = torch.linspace(0, len(weight) - 1, min(len(weight), 64), device=weight.device).long()
    rows, given = weight.index_select(0, ids), embedding(ids[None])[0]
    scale = getattr(embedding, "embed_scale", None)
    factor = 1.0 if scale is None else torch.as_tensor(scale).to(weight.dtype).item()
    return factor if torch.equal(given, rows * torch.tensor(factor, dtype=weight.dtype)) else None


def _looks_like_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    return weight is not None and weight.dim() == 1 and own.keys() <= {"weight", "bias"} and not [*module.children()]


def _token_axis(seen: Sequence[Tensor], lengths: Sequence[int]) -> int | None:
    """The one axis that is as long as each probe; the features and the heads are the same for all."""
    shapes = [tuple(x.shape) for x in seen]
    if len(shapes) != len(lengths) or len({len(shape) for shape in shapes}) != 1:
        return None
    changing = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    if len(changing) != 1 or [shape[changing[0]] for shape in shapes] != list(lengths):
        return None
    return changing[0]


def _with_weight(norm: nn.Module, value: float) -> nn.Module:
    made = copy.deepcopy(norm).requires_grad_(False)
    assert isinstance(made.weight, Tensor)
    made.weight.fill_(value)
    if isinstance(getattr(made, "bias", None), Tensor):
        made.bias.zero_()  # type: ignore[operator]
    return made


def _holds(norm: nn.Module, unit: nn.Module, x: Tensor, *, c: float) -> bool:
    """Whether y = n * (w + c) + b."""
    shape = norm_shape(norm)
    y, n = norm(x), unit(x)
    if y.shape != x.shape or x.shape[-1] != len(shape.weight_F):
        return False
    expected = n.float() * (shape.weight_F.float() + c)
    if shape.bias_F is not None:
        expected = expected + shape.bias_F.float()
    limit = TOLERANCE[y.dtype] * y.float().abs().max().item()
    return (y.float() - expected).abs().max().item() <= limit


def _close(one: Tensor, other: Tensor) -> bool:
    limit = TOLERANCE[one.dtype] * one.float().abs().max().item()
    return (one.float() - other.float()).abs().max().item() <= limit
