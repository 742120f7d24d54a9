"""What the kinds that adapt Linear layers have in common: targets, ranks by pattern, and the base's own biases.

A kind says what it saves at one Linear and what that changes; here it becomes a row of the table, and the layout on a
whole base.
A config with `bias` other than none has trained the base's own biases, and PEFT saves each whole: as
`<module>.base_layer.bias` where the module is adapted, as `<module>.bias` where it is not.
Source: peft 0.21.2, tuners/tuners_utils.py `_get_learnable_bias_state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from math import isqrt

from hub import fields
from hub.base import Base, Modules, conv1d_layers
from hub.families.method import (
    COMMON,
    TENSOR_PREFIX,
    AtLinear,
    ChangeOf,
    Complaint,
    Config,
    Field,
    Layout,
    Method,
    PartOf,
    Shapes,
    no_contradictions,
    no_ranks,
)
from hub.ref import printable
from hub.targets import pattern_value, target_complaints, target_modules

TARGETS: Mapping[str, Field] = {
    **COMMON,
    "target_modules": Field(fields.module_names, shapes_tensors=True),
    "exclude_modules": Field(fields.optional_module_names, shapes_tensors=True),
    "layers_to_transform": Field(fields.layers, shapes_tensors=True),
    "layers_pattern": Field(fields.layer_patterns, shapes_tensors=True),
}


def bias_field(own: str) -> Field:
    """The key `bias`: `own` is what this kind calls the biases of the adapted modules alone."""
    return Field(fields.one_of("none", "all", own), shapes_tensors=True)


def linear_method(
    kind: str,
    peft_type: str,
    keys: Mapping[str, Field],
    *,
    required: tuple[str, ...],
    part: PartOf,
    change: ChangeOf,
    conv1d: bool = False,
    full_rank: bool = False,
    ranks: Callable[[Config], Iterable[tuple[str, int]]] = no_ranks,
    contradictions: Callable[[Config], Iterable[Complaint]] = no_contradictions,
) -> Method:
    """A kind that is wholly what it does at each Linear; with `conv1d`, on Conv1D layers too."""

    def layout(config: Config, base: Base, modules: Modules) -> Layout:
        return linear_layout(config, base, modules, part=part, conv1d=conv1d)

    return Method(kind, peft_type, keys, required, layout, AtLinear(part, change), full_rank, ranks, contradictions)


def linear_layout(
    config: Config,
    base: Base,
    modules: Modules,
    *,
    part: PartOf,
    conv1d: bool = True,
    what: str = "Linear layer",
) -> Layout:
    """The layout of a kind that saves `part` at every Linear; without `conv1d` it has no meaning on Conv1D layers.

    A kind of other modules gives these as the Linear layers of `modules`, and says `what` they are.
    """
    complaints = [("target_modules", reason) for reason in target_complaints(config, modules, what=what)]
    shapes: dict[str, tuple[int, ...]] = {}
    ranks = []
    integers: set[str] = set()
    misfits: dict[str, Complaint] = {}  # the first of each key: there may be as many as modules
    adapted = target_modules(config, modules)
    for module in adapted:
        found = part(config, module, modules.linears[module])
        shapes |= {f"{TENSOR_PREFIX}{module}.{name}": shape for name, shape in found.shapes.items()}
        integers |= {f"{TENSOR_PREFIX}{module}.{name}" for name in found.integers}
        if found.rank is not None:
            ranks.append(found.rank)
        if found.complaint is not None:
            misfits.setdefault(found.complaint[0], found.complaint)
    complaints += [*misfits.values(), *_unfit(adapted, base, conv1d=conv1d)]
    biases = _biases(config, frozenset(adapted), modules)
    known = modules.biased is not None
    return Layout(
        {**shapes, **biases} if known else shapes,
        (*complaints, *_strange_biases(config, modules)),
        max(ranks, default=None),
        leaves(adapted),
        {} if known else biases,
        frozenset(integers),
    )


def pattern_rank(config: Config, module: str) -> int:
    """The rank of a module by `r` and `rank_pattern`."""
    rank: int = pattern_value(config.get("rank_pattern") or {}, module, config["r"])
    return rank


def pattern_ranks(config: Config) -> Iterable[tuple[str, int]]:
    """Every rank that `r` and `rank_pattern` ask for."""
    patterns = config.get("rank_pattern")
    ranks = [("r", config.get("r"))]
    ranks += [("rank_pattern", rank) for rank in patterns.values()] if isinstance(patterns, dict) else []
    return [(key, rank) for key, rank in ranks if type(rank) is int]


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """All of them, ascending."""
    low = [one for one in range(1, isqrt(number) + 1) if number % one == 0]
    return tuple(sorted({*low, *(number // one for one in low)}))


def leaves(adapted: Iterable[str]) -> tuple[str, ...]:
    """The last parts of the modules' names, each once."""
    return tuple(sorted({module.rpartition(".")[2] for module in adapted}))


def _unfit(adapted: Iterable[str], base: Base, *, conv1d: bool) -> list[Complaint]:
    """Targets that are Linear layers, but not for this kind or this server."""
    complaints = []
    transposed = conv1d_layers(base.model_type)
    strange = next((module for module in adapted if module.rpartition(".")[2] in transposed), None)
    if strange is not None and not conv1d:
        complaints.append(
            ("target_modules", f"{printable(strange)} is a Conv1D layer, on which PEFT has no such adapter")
        )
    return complaints


def _biases(config: Config, adapted: frozenset[str], modules: Modules) -> Shapes:
    """The biases that the config has trained: of what is known to have one, or of all."""
    if config.get("bias", "none") == "none":
        return {}
    own = modules.linears if modules.biased is None else modules.linears.keys() & modules.biased
    meant = [module for module in modules.linears if module in own]
    if config["bias"] != "all":
        meant = [module for module in meant if module in adapted]
    normed = modules.norms if config["bias"] == "all" else {}
    norms = {
        f"{TENSOR_PREFIX}{module}.bias": (size,)
        for module, size in normed.items()
        if modules.biased is None or module in modules.biased
    }
    return norms | {
        f"{TENSOR_PREFIX}{module}.{'base_layer.' if module in adapted else ''}bias": (modules.linears[module].outputs,)
        for module in meant
    }


def _strange_biases(config: Config, modules: Modules) -> list[Complaint]:
    """`all` means every bias of the base, and not all of them belong to a Linear or a norm."""
    if config.get("bias", "none") != "all" or modules.biased is None:
        return []
    strange = sorted(modules.biased - modules.linears.keys() - modules.norms.keys())
    if not strange:
        return []
    first, count = printable(strange[0]), len(strange)
    return [("bias", f"all also trains biases that are not served, of {count} modules, {first} among them")]
