"""The parents of a fusion: which versions they are, what they may be, and what each adds to every Linear.

Read are IA3, and the kinds that are low-rank terms at each Linear, by the formulas of the hub's table, as servers do;
DoRA, whose delta is of full rank, for the methods that cut the rank anyway; VeRA through PEFT.
Every other kind, option or tensor is refused by name. Nothing is left out in silence.

R rank, I in, O out.
Law: the sum over the parents of weight * (B A, bias) is what a server's own mixture of them adds.
Source: hub/families; peft 0.21.2, ia3/layer.py; docs/decisions/0003 for IA3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hub.base import Base, Modules
from hub.contract import Hub
from hub.errors import TensorsUnusable
from hub.families import lora
from hub.families.change import Change, Found
from hub.families.method import TENSOR_PREFIX, AtLinear
from hub.manifest import WEIGHTS_FILE, Manifest
from hub.methods import METHODS
from hub.ref import Reference, Term
from hub.targets import feedforward, target_modules
from trainer.errors import FusionRefused
from trainer.factors import Factors, factorise, whole
from trainer.stock_linears import StockLinears

# The kinds that are low-rank terms at each Linear, and what those are.
_LOW_RANK: Final = ("adalora", "loha", "delora", "hra", "miss")
AT_LINEAR: Final[Mapping[str, AtLinear]] = {
    "lora": lora.AT_LINEAR,
    **{row.kind: row.at_linear for row in METHODS.values() if row.kind in _LOW_RANK and row.at_linear is not None},
}
# The kinds whose delta PEFT's own get_delta_weight gives, of the rank that the manifest tells.
BY_PEFT: Final = ("vera",)
KINDS: Final = (*AT_LINEAR, *BY_PEFT, "ia3")

# What of a LoRA's config is acted on here, and what acts while training only or is the hub's own business.
_ACTED_ON: Final = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "bias"}
    | {"base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    | {"fan_in_fan_out", "inference_mode", "task_type", "auto_mapping", "peft_version", "revision"}
)
_INERT: Final = frozenset(
    {"init_lora_weights", "lora_dropout", "eva_config", "corda_config", "lora_ga_config", "loftq_config"}
    | {"megatron_core", "qalora_group_size", "runtime_config"}
)
_NEUTRAL: Final[tuple[Any, ...]] = (None, False, [], {}, "")
# What any kind may carry beside its delta.
_BESIDE: Final = ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")


@dataclass(frozen=True)
class Parent:
    """One version and its weight in the mixture."""

    name: str
    version: int
    digest: str
    weight: float
    manifest: Manifest

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def record(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "digest": self.digest, "weight": self.weight}


@dataclass(frozen=True)
class Delta:
    """What one parent adds: matrices and biases by Linear; for IA3 the scales less one, (O, 1) or (1, I).

    A matrix of full rank is made anew each time that it is asked for, so that never all of them are in memory.
    """

    linears: Mapping[str, Factors] = field(default_factory=dict)
    full: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    biases_O: Mapping[str, Tensor] = field(default_factory=dict)
    excesses: Mapping[str, Tensor] = field(default_factory=dict)

    def at(self, module: str) -> Factors | None:
        """The matrix that is added to a Linear's weight."""
        return whole(self.full[module]()) if module in self.full else self.linears.get(module)


def resolve_parents(hub: Hub, terms: Sequence[Term]) -> tuple[Parent, ...]:
    """The versions that the terms mean now; the same version twice is one parent with the sum of the weights."""
    found: dict[str, Parent] = {}
    for term in terms:
        resolved = hub.resolve(term.reference)
        before = found.get(resolved.digest)
        weight = term.weight + (before.weight if before else 0.0)
        manifest = before.manifest if before else hub.manifest(resolved.digest)
        found[resolved.digest] = Parent(resolved.name, resolved.version, resolved.digest, weight, manifest)
    for parent in found.values():
        if parent.weight == 0:
            raise FusionRefused(f"the weight of {parent} is 0: leave it out")
        if not math.isfinite(parent.weight):
            raise FusionRefused(f"the weight of {parent} is {parent.weight}, not a finite number")
    return tuple(found.values())


def check_parents(parents: Sequence[Parent], base: Base) -> None:
    """Raises: FusionRefused for another base, a kind that is not fused, an option of it, or kinds that do not mix."""
    for parent in parents:
        theirs = parent.manifest.base
        if theirs.fingerprint != base.fingerprint:
            raise FusionRefused(
                f"{parent} was made for base {theirs.name} (fingerprint {theirs.fingerprint[:12]}), but the fusion is "
                f"on {base.name} (fingerprint {base.fingerprint[:12]}): {differences(theirs, base)}"
            )
        reason = why_not_fused(parent.manifest)
        if reason is not None:
            raise FusionRefused(
                f"{parent} cannot be fused into one file: {reason}; a server still mixes it at run time"
            )
    kinds = {parent.manifest.kind == "ia3" for parent in parents}
    if len(kinds) > 1:
        scaled = next(parent for parent in parents if parent.manifest.kind == "ia3")
        raise FusionRefused(
            f"{scaled} is ia3, which scales, and the others add: no one file holds both; "
            "a server mixes them at run time"
        )


def differences(one: Base, other: Base) -> str:
    """Each fact in which two bases differ, with both values."""
    facts, others = (base.model_dump(exclude={"name", "revision", "fingerprint"}) for base in (one, other))
    return ", ".join(f"{key} {facts[key]} against {others[key]}" for key in facts if facts[key] != others[key])


def why_not_fused(manifest: Manifest) -> str | None:
    """The reason that an adapter has no plain LoRA or IA3 form here, or None."""
    config, kind = manifest.config, manifest.kind
    if kind not in KINDS:
        why = "it acts by virtual tokens" if manifest.virtual_tokens else "it is no low-rank term at each Linear"
        return f"kind {kind} is none of {', '.join(KINDS)} ({why})"
    if kind in BY_PEFT and config.get("bias", "none") != "none":
        return f"its option bias {config['bias']}, which PEFT's delta leaves out"
    asked = [key for key, value in sorted(config.items()) if value not in _NEUTRAL]
    strange = [key for key in asked if key in _BESIDE or (kind == "lora" and key not in _ACTED_ON | _INERT)]
    return f"its option {strange[0]} has no plain LoRA form" if strange else None


def of_full_rank(manifest: Manifest) -> bool:
    """DoRA scales the base's rows: what it adds to a weight is of no low rank."""
    return bool(manifest.config.get("use_dora"))


def ranks(parents: Sequence[Parent], modules: Modules) -> Mapping[str, int]:
    """The sum of the parents' ranks at each Linear, as their configs tell it."""
    total: dict[str, int] = {}
    for parent in parents:
        config, kind = parent.manifest.config, parent.manifest.kind
        for module in target_modules(config, modules):
            at = AT_LINEAR.get(kind)
            rank = at.part(config, module, modules.linears[module]).rank if at else parent.manifest.rank
            total[module] = total.get(module, 0) + (rank or 0)
    return total


def fetch(hub: Hub, parent: Parent, folder: Path) -> Path:
    """Every byte of it, re-hashed."""
    hub.pull(Reference(parent.name, parent.digest), folder)
    return folder


def read_delta(parent: Parent, folder: Path, stock: StockLinears, modules: Modules) -> Delta:
    """From its own tensors, but for the kinds that PEFT reads.

    Raises: FusionRefused for a tensor that has no meaning here, BaseUnfit.
    """
    config, kind = parent.manifest.config, parent.manifest.kind
    tensors = load_file(folder / WEIGHTS_FILE)
    if kind == "ia3":
        delta = _ia3(config, tensors)
    else:
        own = _own_biases(config, tensors, stock)
        delta = _changed(parent, tensors, stock, target_modules(config, modules))
        delta = Delta(delta.linears, delta.full, _added(delta.biases_O, own))
    if tensors:
        raise FusionRefused(f"{parent} has {min(tensors)}, which has no plain LoRA form")
    strange = sorted({*delta.linears, *delta.full, *delta.biases_O, *delta.excesses} - stock.linears.keys())
    if strange:
        raise FusionRefused(f"{parent} adapts {strange[0]}, which is no Linear inside the network")
    return delta


def delta_by_peft(parent: Parent, folder: Path, model: nn.Module) -> tuple[Delta, nn.Module]:
    """As PEFT computes it, put on the base and taken off again; the base is handed back."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, str(folder)).eval()
    rank = parent.manifest.rank or 1
    linears = {name: _peft_factors(parent, name, layer, rank) for name, layer in _adapted(wrapped)}
    return Delta(linears), wrapped.unload()


def _adapted(wrapped: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in wrapped.named_modules():
        if hasattr(layer, "get_delta_weight") and hasattr(layer, "base_layer"):
            yield name.removeprefix(TENSOR_PREFIX), layer


def _peft_factors(parent: Parent, name: str, layer: Any, rank: int) -> Factors:
    with torch.inference_mode():
        delta = layer.get_delta_weight("default")
        if type(layer.get_base_layer()).__name__ == "Conv1D":
            delta = delta.mT
        found = factorise(delta, rank)
    if found is None:
        raise FusionRefused(f"{parent}: PEFT's delta at {name} is not of rank {rank}")
    return found


def _own_biases(config: Mapping[str, Any], tensors: dict[str, Tensor], stock: StockLinears) -> Mapping[str, Tensor]:
    """What the adapter adds to the base's own biases. Takes them out of `tensors`."""
    found = {}
    for module in stock.linears if config.get("bias", "none") != "none" else ():
        for part in ("base_layer.bias", "bias"):
            own = stock.bias(module) if f"{TENSOR_PREFIX}{module}.{part}" in tensors else None
            if own is not None:
                found[module] = tensors.pop(f"{TENSOR_PREFIX}{module}.{part}").double() - own.double()
    return found


def _changed(parent: Parent, tensors: dict[str, Tensor], stock: StockLinears, targeted: Sequence[str]) -> Delta:
    """What the hub's table says that the adapter changes at each Linear. Takes out of `tensors` what it reads."""
    config, at = parent.manifest.config, AT_LINEAR[parent.manifest.kind]
    linears: dict[str, Factors] = {}
    full: dict[str, Callable[[], Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for module in targeted:
        linear = stock.linears.get(module)
        if linear is None:
            raise FusionRefused(f"{parent} adapts {module}, which is no Linear inside the network")
        root = f"{TENSOR_PREFIX}{module}"
        demanded = at.part(config, module, linear).shapes
        missing = [part for part in demanded if f"{root}.{part}" not in tensors]
        if missing:
            raise FusionRefused(f"{parent} lacks {root}.{missing[0]}")
        # In fp64, for what cancels must come to nothing; the formulas take any dtype, and of the base fp32.
        given = {part: tensors.pop(f"{root}.{part}").double() for part in demanded}
        weight = partial(stock.weight, module)
        found = Found(module, linear.inputs, linear.outputs, given, stock.bias(module), weight)
        try:
            change = at.change(config, found)
        except TensorsUnusable as error:
            raise FusionRefused(f"{parent}: {module}: {error}") from error
        A_RI, B_OR = change.A_RI, change.B_OR
        assert A_RI is not None and B_OR is not None, "these kinds are low-rank terms"
        B_OR = B_OR * change.scaling
        if not (A_RI.isfinite().all() and B_OR.isfinite().all()):
            raise FusionRefused(f"{parent}: what it adds to {module} is no finite number")
        if change.excess_out_O is None:
            linears[module] = Factors(A_RI, B_OR)
        else:
            full[module] = partial(_of_full_rank, change, weight)
        if change.bias_O is not None:
            biases[module] = change.bias_O.double()
    return Delta(linears, full, biases)


def _of_full_rank(change: Change, weight: Callable[[], Tensor]) -> Tensor:
    """What scaled rows and a low-rank term beside them add to a weight (O, I), in fp64."""
    assert change.A_RI is not None and change.B_OR is not None and change.excess_out_O is not None
    scaled_OI = change.excess_out_O.double()[:, None] * weight().double()
    return scaled_OI + change.scaling * (change.B_OR.double() @ change.A_RI.double())


def _added(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {**one, **{module: bias + one[module] if module in one else bias for module, bias in other.items()}}


def _ia3(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Delta:
    excesses = {}
    for name in sorted(tensors):
        if name.endswith(".ia3_l"):
            module = name.removesuffix(".ia3_l").removeprefix(TENSOR_PREFIX)
            wide = (1, -1) if feedforward(config, module) else (-1, 1)
            excesses[module] = tensors.pop(name).double().reshape(wide) - 1
    return Delta(excesses=excesses)
