"""Where in a sequence each adapter of its mixture works: at every token, at the ends of the prompt, from a mark on.

Most adapters work everywhere. An activated LoRA leaves everything before its invocation to the base; LoReFT edits the
first and last tokens of the prompt alone. A sequence's course is cut into phases, and in each one the same terms work.
Two sequences may share a KV block exactly when its tokens, all before them, and the phases of both are the same.

Positions count virtual tokens, which come first; `ranges` counts the tokens of the prompt.
Source: Greenewald et al. 2025 (arXiv:2504.12397); Wu et al. 2024 (arXiv:2404.03592).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

Range = tuple[int, int | None]  # tokens from .. to (excluded); None: to the end, generated ones too


@dataclass(frozen=True, slots=True)
class Everywhere:
    def ranges(self, prompt: Sequence[int]) -> tuple[Range, ...]:
        return ((0, None),)


@dataclass(frozen=True, slots=True)
class PromptEnds:
    """The first and the last tokens of the prompt, each at most half of it, and none that is generated.

    Source: pyreft 0.1.0, dataset.py get_intervention_locations.
    """

    first: int
    last: int

    def ranges(self, prompt: Sequence[int]) -> tuple[Range, ...]:
        half = len(prompt) // 2
        start, stop = min(self.first, half), len(prompt) - min(self.last, half)
        return tuple(found for found in ((0, start), (stop, len(prompt))) if found[0] < found[1])


@dataclass(frozen=True, slots=True)
class FromLast:
    """From the last occurrence of these tokens in the prompt to the end; nowhere without one."""

    tokens: tuple[int, ...]

    def ranges(self, prompt: Sequence[int]) -> tuple[Range, ...]:
        wanted = list(self.tokens)
        for start in range(len(prompt) - len(wanted), -1, -1):
            if list(prompt[start : start + len(wanted)]) == wanted:
                return ((start, None),)
        return ()


Reach = Everywhere | PromptEnds | FromLast
EVERYWHERE = Everywhere()


def nowhere(reach: Reach) -> str:
    """Why an adapter of this reach works at no token of a prompt, for messages."""
    if isinstance(reach, PromptEnds):
        return "works at the ends of the prompt, each at most half of it, and a prompt of one token has none"
    return "works from its invocation tokens on, and the prompt does not hold them"


@dataclass(frozen=True, slots=True)
class Phase:
    """From position `start` on, the mixture's terms of these indices work; `salt` names them to the prefix cache."""

    start: int
    terms: tuple[int, ...] = ()
    salt: str = ""


Course = tuple[Phase, ...]
BARE: Course = (Phase(0),)


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of a mixture as the course sees it.

    `label` holds what its deltas depend on, digest and weight; empty where it changes no token's computation.
    """

    label: str
    reach: Reach = EVERYWHERE


def course(terms: Sequence[Term], prompt: Sequence[int], *, virtual: int = 0, virtual_label: str = "") -> Course:
    """The phases of a sequence: `virtual` positions made by what `virtual_label` names, then its tokens.

    Law: neither the order of the terms nor how they are written changes the salts; what works where does.
    """
    reached = [term.reach.ranges(prompt) for term in terms]
    edges = sorted({0, *(edge for ranges in reached for found in ranges for edge in found if edge is not None)})
    phases = [Phase(0, (), virtual_label)] if virtual else []
    for edge in edges:
        at_work = tuple(index for index, ranges in enumerate(reached) if _within(edge, ranges))
        phase = Phase(virtual + edge, at_work, _salt([terms[index].label for index in at_work]))
        if not phases or phases[-1].terms != at_work or phases[-1].start < virtual:
            phases.append(phase)
    return tuple(phases)


def pieces(phases: Course, start: int, stop: int) -> list[tuple[int, tuple[int, ...]]]:
    """Positions start..stop-1 cut where the phases change: (count, indices of the terms at work)."""
    cuts = [phase.start for phase in phases[1:]] + [stop]
    found = []
    for phase, end in zip(phases, cuts, strict=True):
        count = min(end, stop) - max(phase.start, start)
        if count > 0:
            found.append((count, phase.terms))
    return found


def marks(phases: Course, start: int, stop: int) -> list[tuple[int, str]]:
    """Where in positions start..stop-1 the salt changes, counted from `start`; the bare base has no mark."""
    before = ""
    found = []
    for phase in phases:
        if phase.salt != before and start <= phase.start < stop:
            found.append((phase.start - start, phase.salt))
        before = phase.salt
    return found


def _within(token: int, ranges: Sequence[Range]) -> bool:
    return any(first <= token and (last is None or token < last) for first, last in ranges)


def _salt(labels: Sequence[str]) -> str:
    written = "+".join(sorted(filter(None, labels)))
    return hashlib.sha256(written.encode()).hexdigest() if written else ""
