"""A whole fine-tune as a low-rank adapter: per Linear the nearest matrix of low rank to the difference of two models.

Both models are read tensor by tensor from their safetensors, so that memory holds two tensors, never two models; base
and fine-tune may lie in other shards and other dtypes, and are subtracted in fp32. What differs outside the Linears
cannot be part of it: it is measured, named and recorded, or refused with --strict.

Law: a change of rank N at the Linears alone is found exactly by --rank N; --energy E keeps at least E of the squared
norm of every Linear's difference, unless the largest rank cuts it off, which is counted.
Source: Eckart and Young 1936; the same idea as mergekit's extract-lora and PEFT's convert_to_lora.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from hub.base import (
    StoredTensor,
    conv1d_layers,
    describe_base,
    find_base,
    modules,
    name_of,
    stored_tensors,
)
from hub.digest import sha256_of_stream
from trainer import plain
from trainer.base import NO_REMOTE_CODE, choose_device, library_versions, open_base
from trainer.card import extraction_card
from trainer.errors import ExtractionRefused
from trainer.export import SCHEMA_VERSION
from trainer.factors import Chooser, Factors, at_most, compress_dense, share_of_energy, stored
from trainer.parents import differences
from trainer.progress import SILENT, Counter, counted

RECORD: Final = "extract"
HEAD: Final = "lm_head.weight"
EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight")
FLOATS: Final = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Plan:
    """Either a rank for every Linear, or a share of the squared norm with the largest rank that it may take."""

    rank: int | None
    energy: float | None
    max_rank: int

    @property
    def record(self) -> dict[str, Any]:
        return {"rank": self.rank} if self.energy is None else {"energy": self.energy, "max_rank": self.max_rank}

    @property
    def choose(self) -> Chooser:
        if self.energy is not None:
            return share_of_energy(self.energy, limit=self.max_rank)
        assert self.rank is not None
        return at_most(self.rank)


@dataclass(frozen=True)
class Pair:
    """One tensor in both models; None where a model does not have it."""

    name: str
    base: StoredTensor | None
    tuned: StoredTensor | None


@dataclass(frozen=True)
class LeftOut:
    """A tensor that differs outside the Linears: the norm of its change, and that against the base's, if it has one."""

    change: float
    relative: float | None
    alone: bool = False  # only one of the models has it

    def __str__(self) -> str:
        if self.alone:
            return "in one model only"
        return f"by a norm of {self.change:.2g}" if self.relative is None else f"by {self.relative:.2g} of its norm"


@dataclass(frozen=True)
class Found:
    """One Linear: its factors, the norm of its difference, and what is lost of it."""

    factors: Factors
    size: float
    error: float
    capped: bool


@dataclass(frozen=True)
class Extracted:
    recipe: Mapping[str, Any]
    metrics: Mapping[str, Any]
    base_folder: Path


def extract(
    base_name: str,
    tuned_name: str,
    folder: Path,
    *,
    plan: Plan,
    strict: bool = False,
    device: str = "auto",
    report: Counter = SILENT,
) -> Extracted:
    """Write the adapter into an empty folder. Raises: ExtractionRefused, TrainError, HubError."""
    base_folder, tuned_folder = find_base(base_name), find_base(tuned_name)
    check_same_shape(base_folder, base_name, tuned_folder, tuned_name)
    opened = open_base(str(base_folder))
    weights = {f"{module}.weight": module for module in opened.anatomy.linears}
    pairs = paired(base_folder, tuned_folder, read_names(base_folder))
    linears = [pair for pair in pairs if pair.name in weights and pair.base and pair.tuned]
    if plan.energy is not None and not plain.patterns_fit(len(linears)):
        raise ExtractionRefused(
            f"{len(linears)} Linears of ranks of their own are above what a config holds: use --rank"
        )
    on = choose_device(device)
    others = [pair for pair in pairs if pair not in set(linears)]
    left_out = compared(others, on, report)
    if strict and left_out:
        raise ExtractionRefused(
            f"outside its Linears {tuned_name} differs in {len(left_out)} tensors: {told(left_out)}"
        )
    model_type = describe_base(base_folder).model_type
    found = {
        weights[pair.name]: one
        for pair in counted(linears, "Linears decomposed", report)
        if (one := decomposed(pair, plan, transposed(pair, model_type), on)) is not None
    }
    if not found:
        raise ExtractionRefused(f"no Linear of {tuned_name} differs from {base_name}: there is nothing to extract")
    metrics = errors(found, left_out)
    recipe = record(base_name, base_folder, tuned_name, tuned_folder, plan)
    factors = {module: one.factors for module, one in found.items()}
    plain.write_lora(folder, factors, {}, plain.Stock(modules(base_folder), model_type, base_name))
    report.note("writing golden rows")
    prompts = plain.golden_prompts([], opened)
    card = extraction_card(recipe, metrics)
    plain.finish(folder, opened, prompts, on, recipe=recipe, metrics=metrics, card=card)
    return Extracted(recipe, metrics, base_folder)


def check_same_shape(base: Path, base_name: str, tuned: Path, tuned_name: str) -> None:
    one, other = describe_base(base), describe_base(tuned)
    if one.fingerprint != other.fingerprint:
        hint = ""
        if other.tokenizer is None and one.tokenizer is not None:
            hint = "; if it is the base's tokenizer, put that tokenizer.json beside it"
        raise ExtractionRefused(
            f"{tuned_name} is no fine-tune of {base_name} in shape and tokenizer: {differences(one, other)}"
            f" (base against fine-tune){hint}"
        )


def read_names(folder: Path) -> frozenset[str]:
    """The tensors that the network takes from a file; whatever else is stored there is passed over at load."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, **NO_REMOTE_CODE)
    with torch.device("meta"):
        return frozenset(AutoModelForCausalLM.from_config(config, **NO_REMOTE_CODE).state_dict())


def paired(base: Path, tuned: Path, known: frozenset[str]) -> list[Pair]:
    """Every tensor of the network that either model has, by name."""
    ours, theirs = stored_tensors(base), stored_tensors(tuned)
    if (HEAD in ours) != (HEAD in theirs):  # one of them is tied to its embedding
        ours, theirs = with_head(ours), with_head(theirs)
    pairs = [Pair(name, ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])]
    return [pair for pair in pairs if is_compared(pair, known)]


def is_compared(pair: Pair, known: frozenset[str]) -> bool:
    """Masks and counters are not; what only one model has is, where the network reads it."""
    dtypes = [entry.dtype for entry in (pair.base, pair.tuned) if entry is not None]
    if len(dtypes) == 1 and pair.name not in known:
        return False
    if all(dtype in FLOATS for dtype in dtypes):
        return True
    if pair.name in known or any(dtype.startswith("F") for dtype in dtypes):
        raise ExtractionRefused(f"{pair.name} is stored as {' and '.join(dtypes)}; read are {', '.join(FLOATS)}")
    return False


def with_head(tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    embedding = next((entry for name, entry in tensors.items() if name.endswith(EMBEDDINGS)), None)
    return tensors if HEAD in tensors or embedding is None else {**tensors, HEAD: embedding}


def compared(others: Sequence[Pair], device: torch.device, report: Counter) -> Mapping[str, LeftOut]:
    """Those that differ, by name."""
    found = {}
    for pair in counted(others, "other tensors compared", report):
        if pair.base is None or pair.tuned is None:
            alone = pair.base or pair.tuned
            assert alone is not None
            found[pair.name] = LeftOut(_norm(read(alone, device)), None, alone=True)
            continue
        before, after = read(pair.base, device), read(pair.tuned, device)
        if before.shape != after.shape:
            raise ExtractionRefused(
                f"{pair.name} is {list(before.shape)} in the base, {list(after.shape)} in the other"
            )
        change = _norm(finite(after - before, pair.name))
        if change:
            found[pair.name] = LeftOut(change, change / _norm(before) if before.any() else None)
    return found


def decomposed(pair: Pair, plan: Plan, turned: bool, device: torch.device) -> Found | None:
    """None where the two models do not differ."""
    assert pair.base is not None and pair.tuned is not None
    before, after = read(pair.base, device), read(pair.tuned, device)
    if before.shape != after.shape:
        raise ExtractionRefused(f"{pair.name} is {list(before.shape)} in the base, {list(after.shape)} in the other")
    difference = finite(after - before, pair.name).double()
    if not difference.any():
        return None
    difference_OI = difference.mT if turned else difference
    factors = stored(compress_dense(difference_OI, plan.choose))
    size, error = _norm(difference_OI), _norm(difference_OI - factors.dense())
    short = plan.energy is not None and 1 - (error / size) ** 2 < plan.energy and factors.rank == plan.max_rank
    return Found(factors, size, error, short)


def transposed(pair: Pair, model_type: str) -> bool:
    """GPT-2 stores the weights of its Linears (I, O)."""
    return pair.name.removesuffix(".weight").rpartition(".")[2] in conv1d_layers(model_type)


def read(entry: StoredTensor, device: torch.device) -> Tensor:
    with safe_open(entry.file, framework="pt") as source:
        return source.get_tensor(entry.name).to(device, torch.float32)


def finite(tensor: Tensor, name: str) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ExtractionRefused(f"{name} holds NaN or infinite values")
    return tensor


def errors(found: Mapping[str, Found], left_out: Mapping[str, LeftOut]) -> dict[str, Any]:
    """Relative to the difference of the two models: at the Linears, at the worst of them, and with what is left out."""
    size = math.hypot(*(one.size for one in found.values()))
    error = math.hypot(*(one.error for one in found.values()))
    aside = math.hypot(*(one.change for one in left_out.values()))
    worst = max(found, key=lambda module: found[module].error / found[module].size)
    return {
        "relative_error": error / size,
        "whole_relative_error": math.hypot(error, aside) / math.hypot(size, aside),
        "worst_relative_error": found[worst].error / found[worst].size,
        "worst_linear": worst,
        "largest_rank": max(one.factors.rank for one in found.values()),
        "linears_below_energy": sum(one.capped for one in found.values()),
        "linears": {
            module: {"rank": one.factors.rank, "relative_error": one.error / one.size} for module, one in found.items()
        },
        "left_out": {
            name: {"relative_change": one.relative, "norm": one.change, "in_one_model_only": one.alone}
            for name, one in left_out.items()
        },
    }


def told_of(metrics: Mapping[str, Any]) -> str:
    """What came out, for people."""
    lines = [
        f"{len(metrics['linears'])} Linears, rank up to {metrics['largest_rank']}: {metrics['relative_error']:.3g} "
        f"of their change is lost (worst: {metrics['worst_relative_error']:.3g} at {metrics['worst_linear']})"
    ]
    if metrics["linears_below_energy"]:
        lines.append(f"{metrics['linears_below_energy']} Linears keep less than was asked, at the largest rank")
    left_out = {
        name: LeftOut(one["norm"], one["relative_change"], one["in_one_model_only"])
        for name, one in metrics["left_out"].items()
    }
    if left_out:
        lines.append(
            f"left out, with {metrics['whole_relative_error']:.3g} of the whole change lost: {len(left_out)} tensors "
            f"outside the Linears: {told(left_out)}"
        )
    return "\n".join(lines)


def told(left_out: Mapping[str, LeftOut], *, shown: int = 5) -> str:
    """The largest by name and relative size."""
    order = sorted(left_out, key=lambda name: -left_out[name].change)
    parts = [f"{name} ({left_out[name]})" for name in order[:shown]]
    return ", ".join(parts) + (f" and {len(order) - shown} more" if len(order) > shown else "")


def record(base_name: str, base: Path, tuned_name: str, tuned: Path, plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "method": RECORD,
        "base": name_of(base, base_name),
        "tuned": {"name": name_of(tuned, tuned_name), "files": digests(tuned)},
        "extraction": plan.record,
        "versions": dict(library_versions()),
    }


def digests(folder: Path) -> dict[str, str]:
    """What it was extracted from, to the byte."""
    found = {}
    for path in sorted({entry.file for entry in stored_tensors(folder).values()}):
        with path.open("rb") as source:
            found[path.name] = f"sha256:{sha256_of_stream(source)}"
    return found


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))
