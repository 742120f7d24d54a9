"""The parents of a fusion: which versions they are, what they may be, and what each adds to every Linear.

Read are the plain LoRA kinds and IA3 from their own tensors, and the kinds whose delta PEFT itself gives as a low-rank
matrix; every other kind, option or tensor is refused by name. Nothing is left out in silence.

R rank, I in, O out.
Law: the sum over the parents of weight * (B A, bias) is what a server's own mixture of them adds.
Source: peft 0.21.2, tuners/lora/layer.py, ia3/layer.py; docs/decisions/0003 for IA3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hub.base import Base, Modules
from hub.contract import Hub
from hub.families.linears import pattern_rank
from hub.families.method import TENSOR_PREFIX
from hub.manifest import WEIGHTS_FILE, Manifest
from hub.ref import Reference, Term
from hub.targets import feedforward, pattern_value, target_modules
from trainer.errors import FusionRefused
from trainer.factors import Factors, factorise

# The kinds whose delta PEFT's own get_delta_weight gives, of the rank that the manifest tells.
BY_PEFT: Final = ("adalora", "vera", "loha", "delora")
KINDS: Final = ("lora", *BY_PEFT, "ia3")

# What of a LoRA's config is acted on here, and what acts while training only or is the hub's own business.
_ACTED_ON: Final = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "bias"}
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
    """What one parent adds: low-rank matrices and biases by Linear; for IA3 the scales less one, (O, 1) or (1, I)."""

    linears: Mapping[str, Factors] = field(default_factory=dict)
    biases_O: Mapping[str, Tensor] = field(default_factory=dict)
    excesses: Mapping[str, Tensor] = field(default_factory=dict)


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
        why = "it acts by virtual tokens" if manifest.virtual_tokens else "PEFT gives no low-rank delta of it"
        return f"kind {kind} is none of {', '.join(KINDS)} ({why})"
    if config.get("use_dora"):
        return "use_dora scales the base's rows, which no low-rank delta holds"
    if kind in BY_PEFT and config.get("bias", "none") != "none":
        return f"bias {config['bias']} of {kind} (only lora's own is read)"
    asked = [key for key, value in sorted(config.items()) if value not in _NEUTRAL]
    strange = [key for key in asked if key in _BESIDE or (kind == "lora" and key not in _ACTED_ON | _INERT)]
    return f"its option {strange[0]} has no plain LoRA form" if strange else None


def ranks(parents: Sequence[Parent], modules: Modules) -> Mapping[str, int]:
    """The sum of the parents' ranks at each Linear, as their configs tell it."""
    total: dict[str, int] = {}
    for parent in parents:
        config, kind = parent.manifest.config, parent.manifest.kind
        for module in target_modules(config, modules):
            rank = pattern_rank(config, module) if kind == "lora" else parent.manifest.rank or 0
            total[module] = total.get(module, 0) + rank
    return total


def fetch(hub: Hub, parent: Parent, folder: Path) -> Path:
    """Every byte of it, re-hashed."""
    hub.pull(Reference(parent.name, parent.digest), folder)
    return folder


def read_delta(parent: Parent, folder: Path, base_biases: Mapping[str, Tensor], linears: Sequence[str]) -> Delta:
    """From its own tensors: a LoRA or an IA3. Raises: FusionRefused for a tensor that has no meaning here."""
    config = parent.manifest.config
    tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    delta = _ia3(config, tensors) if parent.manifest.kind == "ia3" else _lora(config, tensors, base_biases)
    if tensors:
        raise FusionRefused(f"{parent} has {min(tensors)}, which has no plain LoRA form")
    strange = sorted({*delta.linears, *delta.biases_O, *delta.excesses} - set(linears))
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


def _lora(config: Mapping[str, Any], tensors: dict[str, Tensor], base_biases: Mapping[str, Tensor]) -> Delta:
    """Takes out of `tensors` what it understands."""
    linears, biases = {}, {}
    for name in sorted(name for name in tensors if name.endswith(".lora_A.weight")):
        module = name.removesuffix(".lora_A.weight").removeprefix(TENSOR_PREFIX)
        root = f"{TENSOR_PREFIX}{module}"
        scaling = lora_scaling(config, module)
        A_RI, B_OR = tensors.pop(name), tensors.pop(f"{root}.lora_B.weight")
        linears[module] = Factors(A_RI, B_OR.double() * scaling)
        if config.get("lora_bias"):
            biases[module] = tensors.pop(f"{root}.lora_B.bias").double() * scaling
    if config.get("bias", "none") != "none":
        for module, own in base_biases.items():
            for part in ("base_layer.bias", "bias"):
                trained = tensors.pop(f"{TENSOR_PREFIX}{module}.{part}", None)
                if trained is not None:
                    biases[module] = biases.get(module, 0) + (trained.double() - own.double())
    return Delta(linears, biases)


def lora_scaling(config: Mapping[str, Any], module: str) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA, both by pattern."""
    rank = pattern_rank(config, module)
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _ia3(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Delta:
    excesses = {}
    for name in sorted(tensors):
        if name.endswith(".ia3_l"):
            module = name.removesuffix(".ia3_l").removeprefix(TENSOR_PREFIX)
            wide = (1, -1) if feedforward(config, module) else (-1, 1)
            excesses[module] = tensors.pop(name).double().reshape(wide) - 1
    return Delta(excesses=excesses)
