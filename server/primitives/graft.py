"""A graft: one adapter as primitives, whatever kind of file it came from, and the rule for which may be mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from server.errors import MixtureRefused
from server.policy.reach import EVERYWHERE, Reach
from server.primitives.prefix import Prefix
from server.primitives.route import Router
from server.primitives.site import SiteValue


@dataclass(frozen=True, eq=False)
class Graft:
    """An adapter on the device. `sites` is keyed by the Linear's name in the base; `reach` says at which tokens.

    `soft_prompt_VE` are the embeddings that `prefix` was made of, needed again when another prefix stands before it.
    `beside` are parts of the same adapter that reach other tokens, each with a `part`; a mixture has them as terms.
    """

    digest: str
    label: str  # NAME@N, for messages
    sites: Mapping[str, SiteValue] = field(default_factory=dict)
    prefix: Prefix | None = None
    soft_prompt_VE: Tensor | None = None
    reach: Reach = EVERYWHERE
    part: str = ""
    beside: tuple[Graft, ...] = ()
    router: Router | None = None  # it routes among experts, and does nothing itself
    experts: tuple[str, ...] = ()  # of a router: the digests of the adapters that its rows score

    @property
    def key(self) -> str:
        """What no other graft has: several parts of one adapter have the same digest."""
        return self.digest + self.part

    @cached_property
    def bytes(self) -> int:
        """Memory that it really takes, by its actual ranks and dtype."""
        others = sum(part.bytes for part in (self.prefix, self.router, *self.beside) if part is not None)
        soft = self.soft_prompt_VE.nbytes if self.soft_prompt_VE is not None else 0
        return sum(value.bytes for value in self.sites.values()) + others + soft

    @property
    def virtual_tokens(self) -> int:
        return self.prefix.length if self.prefix else 0


def combined(terms: Sequence[tuple[Graft, float]]) -> tuple[tuple[Graft, float], ...]:
    """One term for each part of an adapter: two references to the same bytes are one, with the sum of their weights."""
    weights: dict[str, float] = {}
    grafts: dict[str, Graft] = {}
    for whole, weight in terms:
        for graft in (whole, *whole.beside):
            weights[graft.key] = weights.get(graft.key, 0.0) + weight
            grafts[graft.key] = graft
    return tuple((grafts[key], weight) for key, weight in weights.items())


def prefixed(terms: Sequence[tuple[Graft, float]]) -> list[Graft]:
    """Those of a mixture that put virtual tokens ahead of the sequence, in the order written."""
    return [graft for graft, weight in terms if graft.prefix is not None and weight]


def check_mixture(terms: Sequence[tuple[Graft, float]]) -> None:
    """Refuse what cannot be combined exactly. Raises: MixtureRefused."""
    for graft, weight in terms:
        if graft.prefix is not None and weight not in (0, 1):
            raise MixtureRefused(
                f"weight {weight:g} on {graft.label}: a prefix has no exact weighted sum, its weight is 0 or 1"
            )
    _check_sides([(graft, weight) for graft, weight in terms if weight])


def _check_sides(terms: Sequence[tuple[Graft, float]]) -> None:
    """Scales and rotations of one side add; a product of two sums is the sum of the deltas only for one adapter, whole
    and alone."""
    at_input: dict[str, list[tuple[Graft, float]]] = {}
    at_output: dict[str, list[Graft]] = {}
    for graft, weight in terms:
        for name, value in graft.sites.items():
            if value.transforms_input:
                at_input.setdefault(name, []).append((graft, weight))
            if value.transforms_output:
                at_output.setdefault(name, []).append(graft)
    for name in at_input.keys() & at_output.keys():
        for one, weight in at_input[name]:
            for other in at_output[name]:
                if one is not other or weight != 1:
                    raise MixtureRefused(
                        f"{one.label} transforms the input and {other.label} the output of {name}: "
                        "their exact sum is not one product"
                    )
