"""Fused versions, built offline: the adapters of a mixture in, one plain adapter with its parents and its error out.

Every method works on deltas, what an adapter adds to a Linear's weight, never on A and B apart:
* cat: the exact weighted sum, the parents' factors side by side; the rank is the sum of theirs.
* linear: the exact weighted sum at the smallest rank that holds it; for IA3 the sum of the scales around one.
* svd: the nearest matrix to the weighted sum of a given rank, or of the least rank that keeps a share of its energy.
* ties, dare_ties, dare_linear, magnitude_prune: the merge of the dense deltas (`trainer.merging`), then as svd.
Biases are added, or merged by the same method, and never approximated.

The error is measured on what is stored, in the Frobenius norm, against the exact weighted sum of the deltas.
Law: the same mixture of the same versions gives the same bytes; nothing is left out of a parent in silence.
See docs/decisions/0014.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from hub.base import Base, Modules, describe_base, find_base, find_local_base, modules, name_of
from hub.contract import Hub
from hub.methods import Limits
from hub.ref import Term
from trainer import plain
from trainer.base import OpenBase, choose_device, library_versions, open_base
from trainer.card import fusion_card
from trainer.errors import FusionRefused
from trainer.export import SCHEMA_VERSION
from trainer.factors import (
    CANCELLED,
    ROUNDING,
    Chooser,
    Factors,
    at_most,
    compress,
    compress_dense,
    concatenate,
    distance,
    everything,
    norm,
    share_of_energy,
    stored,
    weighted,
)
from trainer.merging import MERGES, Thinning, Vector
from trainer.parents import (
    BY_PEFT,
    Delta,
    Parent,
    check_parents,
    delta_by_peft,
    fetch,
    of_full_rank,
    ranks,
    read_delta,
    resolve_parents,
)
from trainer.progress import SILENT, Counter, counted
from trainer.stock_linears import stock_linears

SUMS: Final = ("cat", "linear")
RECORD: Final = "fuse"
LIMITS: Final = Limits()


@dataclass(frozen=True)
class Plan:
    """How to fuse. Without rank and energy, a method that needs one takes the largest rank of the parents."""

    method: str
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    seed: int = 0

    @property
    def record(self) -> dict[str, Any]:
        asked = {"rank": self.rank, "energy": self.energy, "density": self.density}
        dice = {"seed": self.seed} if self.method.startswith("dare") else {}
        return {"method": self.method, **{key: value for key, value in asked.items() if value is not None}, **dice}


@dataclass(frozen=True)
class Fused:
    """What was written."""

    parents: tuple[Parent, ...]
    recipe: Mapping[str, Any]
    metrics: Mapping[str, Any]
    base_folder: Path


@dataclass(frozen=True)
class Measured:
    """Frobenius norms at one Linear: of the exact sum and the distance to it, of the merge and the distance to that."""

    factors: Factors
    size: float
    error: float
    merged: float
    cut: float


def fuse(
    hub: Hub,
    terms: Sequence[Term],
    folder: Path,
    *,
    plan: Plan,
    work: Path,
    base: str | None = None,
    device: str = "auto",
    limits: Limits = LIMITS,
    report: Counter = SILENT,
) -> Fused:
    """Write the fused adapter into an empty folder; `work` is scratch space.

    Raises: FusionRefused before anything is fetched, wherever the parents' records tell; TrainError, HubError.
    """
    parents = resolve_parents(hub, terms)
    found = find_local_base(declared_base(parents)) if base is None else find_base(base)
    described = describe_base(found, name=name_of(found, declared_base(parents)))
    check_parents(parents, described)
    known = modules(found)
    check_plan(plan, parents, known, limits)
    on = choose_device(device)
    opened = open_base(str(found))
    folders = [fetch(hub, parent, work / str(number)) for number, parent in enumerate(parents)]
    deltas = read_deltas(parents, folders, known, described.model_type, opened, on)
    stock = plain.Stock(known, described.model_type, declared_base(parents))
    if parents[0].manifest.kind == "ia3":
        scales = fused_scales(parents, deltas)
        plain.write_ia3(folder, scales, stock)
        metrics = scale_errors(scales)
    else:
        linears, biases, metrics = fused_linears(parents, deltas, known, plan, limits, on, report)
        plain.write_lora(folder, linears, biases, stock)
    recipe = record(plan, parents, described)
    card = fusion_card(recipe, metrics)
    report.note("writing golden rows")
    prompts = plain.golden_prompts(folders, opened)
    plain.finish(folder, opened, prompts, on, recipe=recipe, metrics=metrics, card=card)
    return Fused(parents, recipe, metrics, found)


def declared_base(parents: Sequence[Parent]) -> str:
    manifest = parents[0].manifest
    return str(manifest.config.get("base_model_name_or_path") or manifest.base.name)


def check_plan(plan: Plan, parents: Sequence[Parent], known: Modules, limits: Limits) -> None:
    """What the parents' records alone rule out. Raises: FusionRefused."""
    if parents[0].manifest.kind == "ia3":
        if plan.method != "linear":
            raise FusionRefused(f"{plan.method} is for low-rank deltas; ia3 is fused by linear, around one")
        return
    full = next((parent for parent in parents if of_full_rank(parent.manifest)), None)
    if full is not None and plan.method in SUMS:
        raise FusionRefused(
            f"{full} has use_dora, which scales the base's rows: what it adds is of full rank, which {plan.method} "
            "cannot hold; svd --rank approximates and tells the error, a server mixes it exactly"
        )
    if plan.rank is not None and plan.rank > limits.max_rank:
        raise FusionRefused(f"rank {plan.rank} is above max_rank {limits.max_rank} (the largest that the hub accepts)")
    if plan.method == "cat":
        module, rank = max(ranks(parents, known).items(), key=lambda item: item[1])
        if rank > limits.max_rank:
            raise FusionRefused(
                f"cat makes rank {rank} at {module}, which is above max_rank {limits.max_rank} (the largest that the "
                "hub accepts): linear finds a smaller one where there is one, svd --rank approximates"
            )


def read_deltas(
    parents: Sequence[Parent],
    folders: Sequence[Path],
    known: Modules,
    model_type: str,
    opened: OpenBase,
    device: torch.device,
) -> list[Delta]:
    """What each parent adds; the base's weights are loaded whole only for the kinds that PEFT itself reads."""
    inside = {module: known.linears[module] for module in opened.anatomy.linears if module in known.linears}
    stock = stock_linears(opened.folder, model_type, inside)
    deltas: list[Delta] = []
    model: Any = None
    for parent, folder in zip(parents, folders, strict=True):
        if parent.manifest.kind not in BY_PEFT:
            deltas.append(read_delta(parent, folder, stock, known))
            continue
        model = opened.load_weights(device) if model is None else model
        delta, model = delta_by_peft(parent, folder, model)
        deltas.append(delta)
    return deltas


def fused_linears(
    parents: Sequence[Parent],
    deltas: Sequence[Delta],
    known: Modules,
    plan: Plan,
    limits: Limits,
    device: torch.device,
    report: Counter,
) -> tuple[Mapping[str, Factors], Mapping[str, Tensor], dict[str, Any]]:
    """Each Linear that is left with a delta, each bias, and how far all of it is from the exact sum."""
    choose = chooser(plan, parents, limits)
    adapted = [m for m in known.linears if any(m in delta.linears or m in delta.full for delta in deltas)]
    measured: dict[str, Measured] = {}
    for module in counted(adapted, "Linears fused", report):
        given = [(parent, delta.at(module)) for parent, delta in zip(parents, deltas, strict=True)]
        found = [(parent, factors) for parent, factors in given if factors is not None]
        fused = fused_linear(found, module, plan, choose, device)
        if fused.factors.rank > limits.max_rank:
            raise FusionRefused(
                f"{plan.method} makes rank {fused.factors.rank} at {module}, which is above max_rank {limits.max_rank} "
                "(the largest that the hub accepts): svd --rank approximates"
            )
        measured[module] = fused
    linears = {module: one.factors for module, one in measured.items() if one.factors.rank}
    biases = fused_biases(parents, deltas, plan)
    if not linears and not biases:
        raise FusionRefused("nothing is left: the deltas cancel each other out")
    return linears, biases, errors(measured) | below_energy(measured, plan.energy)


def fused_linear(
    terms: Sequence[tuple[Parent, Factors]], module: str, plan: Plan, choose: Chooser, device: torch.device
) -> Measured:
    """One Linear: the parents' deltas there, fused, with the distance of the stored result from their exact sum."""
    parts = [
        weighted(parent.weight, Factors(factors.A_RI.to(device), factors.B_OR.to(device))) for parent, factors in terms
    ]
    exact = concatenate(parts)
    size = norm(exact)
    if size <= CANCELLED * sum(norm(part) for part in parts):
        size, exact = 0.0, Factors(exact.A_RI[:0], exact.B_OR[:, :0])
    if plan.method not in MERGES:
        made = exact if plan.method == "cat" else compress(exact, choose)
        factors = stored(made)
        error = distance(factors, exact)
        return Measured(factors, size, error, size, error)
    vectors = [
        Vector(parent.weight, one.dense, f"{parent.digest}/{module}")
        for parent, one in ((parent, Factors(f.A_RI.to(device), f.B_OR.to(device))) for parent, f in terms)
    ]
    merged = MERGES[plan.method](vectors, thinning(plan))
    factors = stored(compress_dense(merged, choose))
    approximation = factors.dense()
    error = float(torch.linalg.matrix_norm(approximation - exact.dense()))
    cut = float(torch.linalg.matrix_norm(approximation - merged))
    return Measured(factors, size, error, float(torch.linalg.matrix_norm(merged)), cut)


def fused_biases(parents: Sequence[Parent], deltas: Sequence[Delta], plan: Plan) -> Mapping[str, Tensor]:
    """The biases of all parents, summed or merged as the matrices are; those that come to nothing are left out."""
    found: dict[str, list[tuple[Parent, Tensor]]] = {}
    for parent, delta in zip(parents, deltas, strict=True):
        for module, bias in delta.biases_O.items():
            found.setdefault(module, []).append((parent, bias))
    made = {module: fused_bias(terms, module, plan) for module, terms in found.items()}
    return {module: bias for module, bias in made.items() if bias.any()}


def fused_bias(terms: Sequence[tuple[Parent, Tensor]], module: str, plan: Plan) -> Tensor:
    if plan.method not in MERGES:
        return torch.stack([parent.weight * bias.double() for parent, bias in terms]).sum(0)
    vectors = [Vector(parent.weight, bias.double, f"{parent.digest}/{module}.bias") for parent, bias in terms]
    return MERGES[plan.method](vectors, thinning(plan))


def fused_scales(parents: Sequence[Parent], deltas: Sequence[Delta]) -> Mapping[str, Tensor]:
    """1 + sum_k w_k (l_k - 1). Raises: FusionRefused where one scales a Linear's input and another its output."""
    total: dict[str, Tensor] = {}
    for parent, delta in zip(parents, deltas, strict=True):
        for module, excess in delta.excesses.items():
            before = total.get(module, torch.ones_like(excess))
            if before.shape != excess.shape:
                raise FusionRefused(f"{parent} scales one side of {module} and another parent the other side")
            total[module] = before + parent.weight * excess
    return total


def chooser(plan: Plan, parents: Sequence[Parent], limits: Limits) -> Chooser:
    if plan.method in SUMS:
        return everything
    if plan.energy is not None:
        return share_of_energy(plan.energy, limit=limits.max_rank)
    return at_most(plan.rank or max(parent.manifest.rank or 1 for parent in parents))


def thinning(plan: Plan) -> Thinning:
    assert plan.density is not None
    return Thinning(plan.density, plan.seed)


def errors(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Relative to the exact sum, over all Linears and at the worst of them; `rank_error` is relative to the merge."""

    def total(part: Callable[[Measured], float]) -> float:
        return math.hypot(*(part(one) for one in measured.values()))

    worst = max(measured, key=lambda module: share(measured[module].error, measured[module].size), default=None)
    return {
        "relative_error": share(total(lambda one: one.error), total(lambda one: one.size)),
        "rank_error": share(total(lambda one: one.cut), total(lambda one: one.merged)),
        "worst_relative_error": 0.0 if worst is None else share(measured[worst].error, measured[worst].size),
        "worst_linear": worst,
        "linears_fused": len(measured),
        "linears": {
            module: {"rank": one.factors.rank, "relative_error": share(one.error, one.size)}
            for module, one in measured.items()
        },
    }


def below_energy(measured: Mapping[str, Measured], energy: float | None) -> dict[str, int]:
    """How many Linears keep less than was asked, because max_rank cut them off."""
    if energy is None:
        return {}
    kept = [1 - share(one.cut, one.merged) ** 2 for one in measured.values()]
    return {"linears_below_energy": sum(one < energy - ROUNDING for one in kept)}


def scale_errors(scales: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of IA3 only rounding is lost, when the sums are stored in fp32."""
    rounding = [float(torch.linalg.vector_norm(scale.float().double() - scale)) for scale in scales.values()]
    size = [float(torch.linalg.vector_norm(scale - 1)) for scale in scales.values()]
    return {"relative_error": share(math.hypot(*rounding), math.hypot(*size)), "linears_fused": len(scales)}


def share(part: float, whole: float) -> float:
    """Of a sum that cancels out, whatever is left is all of it."""
    return part / whole if whole else float(part > 0)


def record(plan: Plan, parents: Sequence[Parent], base: Base) -> dict[str, Any]:
    """The content of recipe.json: the manifest takes its parents and keeps the rest."""
    return {
        "schema_version": SCHEMA_VERSION,
        "method": RECORD,
        "base": base.name,
        "fusion": plan.record,
        "parents": [parent.digest for parent in parents],
        "lineage": [parent.record for parent in parents],
        "versions": dict(library_versions()),
    }
