"""What an adapter of any family may bring beside its own tensors: whole modules, rows of the vocabulary, norms' biases.

Each becomes the difference to the base: `modules_to_save` (a copy of a head, an embedding, a norm or a Linear),
`trainable_token_indices` (rows of the embedding, and of a head that is tied to it), and, with `bias: all`, the biases
of norms. PEFT also writes the base's own embedding and head beside an adapter of them; a copy must equal the base's.
Law: every tensor is taken out or left to the family; one module is changed in one way only.

V vocabulary, E embedding size, O out, I in, F features of a norm, N rows that differ.
Source: peft 0.21.2, utils/other.py `ModulesToSaveWrapper`, `TrainableTokensWrapper`; utils/save_and_load.py
`get_peft_model_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.linears import ROOT, expect
from server.adapters.lowering.target import Target
from server.errors import AdapterIncompatible
from server.primitives.bias import Bias
from server.primitives.delta import Delta
from server.primitives.gain import Gain
from server.primitives.site import EmbeddingShape, NormShape, SiteValue

SAVED = "modules_to_save."  # stands before the name of a parameter in files that keep PEFT's inner names
ROWS = "token_adapter.trainable_tokens_delta"
COPY = "base_layer."


@dataclass(slots=True)
class Whole:
    """The tensors that are left, and what was made of the others, by module."""

    config: Mapping[str, Any]
    left: dict[str, Tensor]
    target: Target
    values: dict[str, SiteValue]

    def add(self, module: str, value: SiteValue) -> None:
        if module in self.values:
            raise AdapterIncompatible(f"{module} is changed twice by one adapter")
        self.values[module] = value

    def take(self, module: str, part: str, *shape: int) -> Tensor:
        """In fp32. Raises: AdapterIncompatible when it is missing or of another shape."""
        tensor = self.left.pop(f"{ROOT}{module}.{part}", None)
        if tensor is None:
            raise AdapterIncompatible(f"{module} lacks {part}")
        expect(module, part, tensor, shape)
        return tensor.float()

    def embedding(self) -> EmbeddingShape:
        if self.target.embedding is None:
            raise AdapterIncompatible("this base's embedding is no table of rows, and no adapter is served on it")
        return self.target.embedding


def take_whole(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target
) -> tuple[Mapping[str, SiteValue], Mapping[str, Tensor]]:
    """What all families share, and the tensors that are the family's own. Raises: AdapterIncompatible."""
    whole = Whole(config, dict(tensors), target, {})
    _take_saved(whole)
    _take_rows(whole)
    _take_norm_biases(whole)
    _check_copies(whole)
    return whole.values, whole.left


def weight_delta(new_OI: Tensor, base_OI: Tensor, target: Target, *, factor: float = 1.0) -> Delta | None:
    """The difference of two weights, times `factor`, without the rows that are the same in the dtype of the base."""
    new_OI = new_OI.to(base_OI.device)
    rows_N = (new_OI.to(target.dtype) != base_OI.to(target.dtype)).any(1).nonzero().flatten()
    if not len(rows_N):
        return None
    if len(rows_N) == len(base_OI):
        return Delta(target.place((new_OI - base_OI) * factor))
    return Delta(target.place((new_OI[rows_N] - base_OI[rows_N]) * factor), rows_N.to(target.device))


def row_values(
    indices: Sequence[int], rows_NE: Tensor, target: Target, *, module: str, factor: float = 1.0
) -> SiteValue:
    """Some rows of the embedding's or the head's weight replaced. Raises: AdapterIncompatible."""
    vocabulary = len(target.weight(module))
    for index in indices:
        if not 0 <= index < vocabulary:
            raise AdapterIncompatible(f"token {index} of {module} is outside the vocabulary of {vocabulary}")
    if len(set(indices)) < len(indices):
        raise AdapterIncompatible(f"the token indices of {module} name one token twice")
    rows_N, order = torch.tensor(list(indices), device=target.device, dtype=torch.long).sort()
    base_NE = target.weight(module).index_select(0, rows_N)
    changed_NE = rows_NE.to(base_NE.device).index_select(0, order) - base_NE
    return SiteValue(delta=Delta(target.place(changed_NE * factor), rows_N)) if len(rows_N) else SiteValue()


def norm_value(shape: NormShape, weight_F: Tensor | None, bias_F: Tensor | None, target: Target) -> SiteValue:
    """A norm with another weight, another bias, or both."""
    gain = bias = None
    if weight_F is not None:
        gain = Gain(target.place(weight_F.to(shape.weight_F.device) - shape.weight_F.float()))
    if bias_F is not None:
        assert shape.bias_F is not None
        bias = Bias(target.place(bias_F.to(shape.bias_F.device) - shape.bias_F.float()))
    return SiteValue(gain=gain, bias=bias)


def head_takes_rows(head: str, target: Target) -> None:
    """Raises: AdapterIncompatible for a head whose bias PEFT would drop: it multiplies with the rows alone."""
    shape = target.sites.get(head)
    if shape is None or shape.bias_O is not None:
        raise AdapterIncompatible(f"trained rows of {head}: PEFT drops this head's bias with them, so it is not served")


def _take_saved(whole: Whole) -> None:
    """Every module whose name ends like one of the config's: PEFT compares ends without a dot, and so do we."""
    wanted = whole.config.get("modules_to_save") or ()
    if not wanted:
        return
    if isinstance(wanted, str):
        raise AdapterIncompatible(f"modules_to_save is the text {wanted}, which PEFT reads letter by letter")
    wanted = tuple(wanted)
    target = whole.target
    named = [module for module in _served(target) if module.endswith(wanted)]
    missing = [name for name in wanted if not any(module.endswith(name) for module in named)]
    if missing:
        raise AdapterIncompatible(f"modules_to_save names {missing[0]}, which is no Linear, norm or embedding here")
    for module in named:
        for part in ("weight", "bias"):  # two spellings of one tensor
            inner = whole.left.pop(f"{ROOT}{module}.{SAVED}{part}", None)
            if inner is not None and whole.left.setdefault(f"{ROOT}{module}.{part}", inner) is not inner:
                raise AdapterIncompatible(f"{module} is saved twice")
        whole.add(module, _saved(whole, module))


def _saved(whole: Whole, module: str) -> SiteValue:
    target = whole.target
    if module in target.norms:
        norm = target.norms[module]
        size = len(norm.weight_F)
        bias_F = None if norm.bias_F is None else whole.take(module, "bias", size)
        return norm_value(norm, whole.take(module, "weight", size), bias_F, target)
    if module not in target.sites:
        shape = whole.embedding()
        weight_VE = whole.take(module, "weight", shape.vocabulary, shape.features)
        return SiteValue(delta=weight_delta(weight_VE, target.weight(module), target, factor=shape.factor))
    site = target.sites[module]
    weight = target.weight(module)
    stored = (site.in_features, site.out_features) if site.transposed else (site.out_features, site.in_features)
    new = whole.take(module, "weight", *stored)
    made = weight_delta(new.t() if site.transposed else new, weight, target)
    bias = None
    if site.bias_O is not None:
        own_O = whole.take(module, "bias", site.out_features)
        bias = Bias(target.place(own_O.to(site.bias_O.device) - site.bias_O.float()))
    return SiteValue(delta=made, bias=bias)


def _take_rows(whole: Whole) -> None:
    asked = whole.config.get("trainable_token_indices")
    if not asked:
        return
    shape = whole.embedding()
    given: dict[str, list[int]] = {}
    for name, indices in (asked if isinstance(asked, dict) else {shape.name: asked}).items():
        module = next((module for module in (shape.name, shape.head) if module.endswith(name)), None)
        if module is None or module in given:
            raise AdapterIncompatible(f"trainable_token_indices names {name}, which is no embedding or head of its own")
        given[module] = list(indices)
    if shape.tied and given.get(shape.head) == given.get(shape.name):
        del given[shape.head]  # PEFT keeps one set of rows for both
    follows = shape.tied and shape.name in given and shape.head not in given
    for module, indices in given.items():
        rows_NE = whole.take(module, ROWS, len(indices), shape.features)
        if module == shape.head or follows:
            head_takes_rows(shape.head, whole.target)
            whole.add(shape.head, row_values(indices, rows_NE, whole.target, module=shape.head))
        if module == shape.name:
            whole.add(module, row_values(indices, rows_NE, whole.target, module=module, factor=shape.factor))


def _take_norm_biases(whole: Whole) -> None:
    if whole.config.get("bias", "none") != "all":
        return
    for module, norm in whole.target.norms.items():
        if norm.bias_F is not None:
            whole.add(module, norm_value(norm, None, whole.take(module, "bias", len(norm.bias_F)), whole.target))


def _check_copies(whole: Whole) -> None:
    """The base's own embedding and head, wrapped where the adapter adapts them: equal to what is served, or refused."""
    shape = whole.target.embedding
    modules = [] if shape is None else [shape.name, shape.head]
    for module in modules:
        for part in (f"{COPY}weight", "weight"):
            copy = whole.left.pop(f"{ROOT}{module}.{part}", None)
            if copy is not None:
                _demand_equal(copy, whole.target.weight(module), whole.target, what=f"{part} of {module}")
        site = whole.target.sites.get(module)
        if site is None or site.bias_O is None or whole.config.get("bias", "none") != "none":
            continue
        copy = whole.left.pop(f"{ROOT}{module}.{COPY}bias", None)
        if copy is not None:
            _demand_equal(copy, site.bias_O, whole.target, what=f"{COPY}bias of {module}")


def _demand_equal(copy: Tensor, base: Tensor, target: Target, *, what: str) -> None:
    """In the coarser of the two dtypes: the one rounds what the other has."""
    if copy.shape != base.shape:
        raise AdapterIncompatible(
            f"{what} has shape {list(copy.shape)}, this base has {list(base.shape)}: a vocabulary of another size is "
            "not served"
        )
    copy = copy.to(base.device)
    same = torch.equal(copy, base.to(copy.dtype)) or torch.equal(copy.to(target.dtype), base.to(target.dtype))
    if not same:
        raise AdapterIncompatible(f"{what} is no copy of the base's own: train it by modules_to_save to have it served")


def _served(target: Target) -> list[str]:
    return [*target.sites, *target.norms, *([target.embedding.name] if target.embedding else [])]
