"""The grammar of references and mixtures, and nothing else: text in, records out, never a path.

    reference := name [ "@" selector ]
    name      := [ namespace "/" ] slug           slug: [a-z0-9][a-z0-9._-]{0,95}
    selector  := version | alias | digest         version: 1, 2, 3 ...   digest: sha256:<12..64 hex>
    mixture   := term { "+" term }                term: reference [ "*" weight ]

Law: `parse_reference(str(r)) == r` and `parse_mixture(format_mixture(m)) == m`.
A weight has no "+" in its exponent, because "+" parts the terms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from hub.errors import BadReference

SLUG = r"[a-z0-9][a-z0-9._-]{0,95}"
MAX_VERSION = 2**31 - 1
MAX_TEXT = 4096
MAX_TERMS = 64

_NAME = re.compile(rf"(?:{SLUG}/)?{SLUG}")
_SLUG = re.compile(SLUG)
_NUMBER = re.compile(r"[0-9]+")
_VERSION = re.compile(r"[1-9][0-9]*")
_DIGEST = re.compile(r"sha256:[0-9a-f]{12,64}")
_WEIGHT = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?")
_PLAIN = re.compile(r"[A-Za-z0-9_./:@*+-]+")
_SLUG_RULE = 'a-z 0-9 "." "_" "-", starting with a letter or digit, up to 96 long'
_NAME_RULE = f"a name is [namespace/]slug, each of {_SLUG_RULE}"


@dataclass(frozen=True, slots=True)
class Reference:
    """A name and what of it is meant: a version, an alias, a digest, or (None) the default alias."""

    name: str
    selector: str | None = None

    def __str__(self) -> str:
        return self.name if self.selector is None else f"{self.name}@{self.selector}"

    @property
    def version(self) -> int | None:
        """The version number, when the selector is one."""
        return int(self.selector) if self.selector is not None and _VERSION.fullmatch(self.selector) else None

    @property
    def digest(self) -> str | None:
        """The digest or its beginning, when the selector is one."""
        return self.selector if self.selector is not None and _DIGEST.fullmatch(self.selector) else None

    @property
    def alias(self) -> str | None:
        """The alias, when the selector is one."""
        return self.selector if self.version is None and self.digest is None else None


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of a mixture and its weight."""

    reference: Reference
    weight: float = 1.0

    def __str__(self) -> str:
        return str(self.reference) if self.weight == 1.0 else f"{self.reference}*{_format_weight(self.weight)}"


def parse_reference(text: str) -> Reference:
    """Raises: BadReference, with the offending part and the rule that it breaks."""
    _check_length(text)
    name, at, selector = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    _check_selector(selector, text)
    return Reference(name, selector)


def parse_mixture(text: str) -> tuple[Term, ...]:
    """Raises: BadReference. The terms keep their order and may repeat a name."""
    _check_length(text)
    parts = text.split("+")
    if len(parts) > MAX_TERMS:
        raise BadReference(f"a mixture of {len(parts)} terms is above the limit of {MAX_TERMS}")
    return tuple(_parse_term(part) for part in parts)


def format_mixture(terms: Iterable[Term]) -> str:
    """The text that `parse_mixture` reads back to the same terms."""
    return "+".join(str(term) for term in terms)


def check_name(name: str) -> str:
    """Raises: BadReference unless the name fits the grammar; nothing else ever reaches a path or the catalogue."""
    if _NAME.fullmatch(name):
        return name
    shown = printable(name)
    if not name:
        raise BadReference(f"the name is empty: {_NAME_RULE}")
    if ".." in name.split("/") or name.startswith(("/", "~")) or "\\" in name:
        raise BadReference(f"name {shown} looks like a path, and a name never is one: {_NAME_RULE}")
    if _NAME.fullmatch(name.lower()):
        raise BadReference(f"name {shown} has capital letters; did you mean {name.lower()}?")
    raise BadReference(f"name {shown} does not fit: {_NAME_RULE}")


def is_name(text: str) -> bool:
    """Whether a text fits the grammar of names."""
    return _NAME.fullmatch(text) is not None


def check_alias(alias: str) -> str:
    """Raises: BadReference unless the alias is a slug that is no number."""
    if _NUMBER.fullmatch(alias):
        raise BadReference(f"alias {printable(alias)} is a number; numbers are versions, and versions never move")
    if not _SLUG.fullmatch(alias):
        raise BadReference(f"alias {printable(alias)} does not fit: {_SLUG_RULE}")
    return alias


def printable(text: str) -> str:
    """At most 160 characters, quoted unless plain: safe for a terminal, a log line and an error body."""
    shown = text if len(text) <= 160 else text[:157] + "..."
    return shown if _PLAIN.fullmatch(shown) else ascii(shown)


def _check_length(text: str) -> None:
    if len(text) > MAX_TEXT:
        raise BadReference(f"a reference of {len(text)} characters is above the limit of {MAX_TEXT}")


def _check_selector(selector: str, text: str) -> None:
    if _NUMBER.fullmatch(selector):
        if not _VERSION.fullmatch(selector) or len(selector) > 10 or int(selector) > MAX_VERSION:
            raise BadReference(f"version {printable(selector)} is no version: 1, 2, 3 ... up to {MAX_VERSION}")
    elif ":" in selector:
        if not _DIGEST.fullmatch(selector):
            raise BadReference(f"digest {printable(selector)} does not fit: sha256:<12 to 64 of 0-9 a-f>")
    elif not selector:
        raise BadReference(f'{printable(text)} has nothing after "@": a version, an alias or a digest belongs there')
    else:
        check_alias(selector)


def _parse_term(text: str) -> Term:
    if not text:
        raise BadReference('a mixture has an empty term: write name*weight+name*weight, without spaces around "+"')
    reference, star, weight = text.partition("*")
    return Term(parse_reference(reference), _parse_weight(weight, text) if star else 1.0)


def _parse_weight(text: str, term: str) -> float:
    if not _WEIGHT.fullmatch(text) or not math.isfinite(float(text)):
        raise BadReference(f"weight {printable(text)} in {printable(term)} is no finite number such as 0.7, -1 or 2e-3")
    return float(text)


def _format_weight(weight: float) -> str:
    return repr(weight).replace("e+", "e")
