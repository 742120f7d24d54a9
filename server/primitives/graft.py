"""A graft: one adapter as primitives, whatever kind of file it came from, and the rule for which may be mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from server.errors import MixtureRefused
from server.primitives.prefix import Prefix
from server.primitives.route import Router
from server.primitives.site import SiteValue


@dataclass(frozen=True, eq=False)
class Graft:
    """An adapter on the device. `sites` is keyed by the Linear's name in the base."""

    digest: str
    label: str  # NAME@N, for messages
    sites: Mapping[str, SiteValue] = field(default_factory=dict)
    prefix: Prefix | None = None
    router: Router | None = None  # it routes among experts, and does nothing itself
    experts: tuple[str, ...] = ()  # of a router: the digests of the adapters that its rows score

    @property
    def bytes(self) -> int:
        """Memory that it really takes, by its actual ranks and dtype."""
        others = [part.bytes for part in (self.prefix, self.router) if part is not None]
        return sum(value.bytes for value in self.sites.values()) + sum(others)

    @property
    def virtual_tokens(self) -> int:
        return self.prefix.length if self.prefix else 0


def check_mixture(terms: Sequence[tuple[Graft, float]]) -> None:
    """Refuse what cannot be combined exactly. Raises: MixtureRefused."""
    prefixes = [(graft, weight) for graft, weight in terms if graft.prefix is not None and weight != 0]
    for graft, weight in prefixes:
        if weight != 1:
            raise MixtureRefused(
                f"weight {weight:g} on {graft.label}: a prefix has no exact weighted sum, its weight is 0 or 1"
            )
    if len(prefixes) > 1:
        labels = " and ".join(graft.label for graft, _ in prefixes)
        raise MixtureRefused(f"{labels} both put virtual tokens ahead of the sequence; one such adapter is the limit")
    _check_scales([(graft, weight) for graft, weight in terms if weight])


def _check_scales(terms: Sequence[tuple[Graft, float]]) -> None:
    """Scales of one side add; a product of two sums is the sum of the deltas only for one adapter, whole and alone."""
    scaled_in: dict[str, list[tuple[Graft, float]]] = {}
    scaled_out: dict[str, list[Graft]] = {}
    for graft, weight in terms:
        for name, value in graft.sites.items():
            if value.scale_in is not None:
                scaled_in.setdefault(name, []).append((graft, weight))
            if value.scale_out is not None:
                scaled_out.setdefault(name, []).append(graft)
    for name in scaled_in.keys() & scaled_out.keys():
        for one, weight in scaled_in[name]:
            for other in scaled_out[name]:
                if one is not other or weight != 1:
                    raise MixtureRefused(
                        f"{one.label} scales the input and {other.label} the output of {name}: "
                        "their exact sum is not one product"
                    )
