"""Experts: the grafts that a routed request chooses among token by token, and which grafts can be one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace

from torch import Tensor

from server.primitives.graft import Graft
from server.primitives.route import prototype
from server.primitives.site import SiteValue

# Of a graft, what any expert has; and of a Site, what is routed. Everything else must be as if it were not there.
_OF_ANY = ("digest", "label", "sites")
_ROUTED = "lowrank"


@dataclass(frozen=True, eq=False)
class Expert:
    """`prototypes` are by Linear; only arrow needs them."""

    graft: Graft
    prototypes: Mapping[str, Tensor] | None = None

    @property
    def digest(self) -> str:
        return self.graft.digest


@dataclass(frozen=True, eq=False)
class Route:
    """What one request's tokens are routed by: arrow, or a trained router, of whose experts it may take some.

    `told_LE` is what the prompt adds to the router's scores, in the order of its rows.
    """

    experts: tuple[Expert, ...]
    top_k: int
    temperature: float
    router: Graft | None = None
    told_LE: Tensor | None = None

    @property
    def mode(self) -> str:
        return "arrow" if self.router is None else "gate"

    def heard(self, reading_H: Tensor) -> Route:
        """The same for one prompt, by its `reading`; arrow reads tokens alone."""
        if self.router is None:
            return self
        assert self.router.router is not None
        return replace(self, told_LE=self.router.router.told(reading_H))

    def label(self, prompt: Sequence[int]) -> str:
        """Everything that a token's weights depend on, for the prefix cache; the order of the experts does not."""
        experts = ",".join(sorted(expert.digest for expert in self.experts))
        by = "" if self.router is None else f"{self.router.digest};{_digest(prompt)}"
        return f"{self.mode}({by};{experts};{self.top_k};{self.temperature!r})"


def why_no_expert(graft: Graft, layers: Sequence[str]) -> str | None:
    """Why a graft cannot be weighted token by token, or None: its sum must be low-rank terms and nothing else.

    `layers` are the names of the decoder layers, if they could be told: what stands outside sees other tokens.
    """
    for field in fields(Graft):
        if field.name not in _OF_ANY and getattr(graft, field.name) != _absent(field):
            return f"{graft.label} has a {field.name}; experts are low-rank terms alone"
    for name, value in graft.sites.items():
        other = [part.name for part in fields(SiteValue) if part.name != _ROUTED and getattr(value, part.name)]
        if other or value.lowrank is None:
            return f"{graft.label} has {' and '.join(other) or 'nothing'} at {name}; experts are low-rank terms alone"
        if layers and not any(name.startswith(f"{layer}.") for layer in layers):
            return f"{graft.label} changes {name}, which is in no decoder layer; experts work in those alone"
    return None if graft.sites else f"{graft.label} changes no Linear"


def make_prototypes(graft: Graft) -> Mapping[str, Tensor]:
    """By Linear; of a graft that can be an expert."""
    return {name: prototype(value.lowrank) for name, value in graft.sites.items() if value.lowrank is not None}


def _digest(prompt: Sequence[int]) -> str:
    return hashlib.sha256(b"".join(id_.to_bytes(4, "little") for id_ in prompt)).hexdigest()


def _absent(field: object) -> object:
    default, factory = getattr(field, "default", MISSING), getattr(field, "default_factory", MISSING)
    return factory() if factory is not MISSING else default
