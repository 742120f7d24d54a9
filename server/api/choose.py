"""Which adapters a request asks for, from any of the fields that clients use for it. Pure; the references themselves
are understood by the adapter store.

A `model` is first compared whole with the names that are served, then the base's id is taken off as a prefix, then it
is read as a mixture. It is never split blindly: a name may hold the characters that the grammar uses.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from server.api.requests import GenerationBody, MergedAdapters
from server.errors import InvalidValue, MixtureRefused, UnsupportedParameter

Terms = tuple[tuple[str, float], ...]  # (reference, weight); none: the bare base

ROUTED = "auto"
_WEIGHT = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:e-?[0-9]+)?")  # no plus sign: it parts the terms


def choose(body: GenerationBody, *, base_names: Collection[str], whole_names: Collection[str] = ()) -> Terms:
    """`whole_names`: strings that are served as they are, though the grammar could read them otherwise.

    Raises: InvalidValue, also when two fields contradict each other; UnsupportedParameter, MixtureRefused.
    """
    chosen: dict[str, Terms] = {}
    model = None if routes_itself(body, base_names=base_names, whole_names=whole_names) else body.model
    for field, text in (("model", model), ("lora_path", body.lora_path), ("adapter_id", body.adapter_id)):
        if text:
            if field != "model":
                refuse_path(text, param=field)
            chosen[field] = read_terms(text, base_names=base_names, whole_names=whole_names, param=field)
    if body.adapters:
        chosen["adapters"] = tuple((item.ref, item.weight) for item in body.adapters)
    if body.merged_adapters is not None:
        chosen["merged_adapters"] = _merged(body.merged_adapters)
    if body.lora:
        chosen["lora"] = tuple((item.id, item.scale) for item in body.lora)
    return _agreed(chosen)


def routes_itself(body: GenerationBody, *, base_names: Collection[str], whole_names: Collection[str] = ()) -> bool:
    """Whether the model is `auto`, and no adapter and no base is called so here."""
    return body.model == ROUTED and ROUTED not in base_names and ROUTED not in whole_names


def read_terms(
    text: str, *, base_names: Collection[str], whole_names: Collection[str] = (), param: str = "model"
) -> Terms:
    """Raises: InvalidValue."""
    if text in base_names:
        return ()
    if text in whole_names:
        return ((text, 1.0),)
    if text == ROUTED:
        raise InvalidValue(f"{param} {ROUTED!r}: only the field model asks for routing so", param=param)
    for base in sorted(base_names, key=len, reverse=True):
        if text.startswith(base + ":"):
            text = text[len(base) + 1 :]
            break
    return tuple(_term(part, text, param) for part in text.split("+"))


def refuse_path(text: str, *, param: str) -> None:
    """Adapters come from the hub by reference; a path of the server's disk is never one.

    Raises: InvalidValue.
    """
    if text.startswith(("/", ".", "~")) or "\\" in text or ".." in text.split("/") or "://" in text:
        raise InvalidValue(
            f"{param} must be a reference of the hub like name@prod, not a path or an address", param=param
        )


def _term(part: str, text: str, param: str) -> tuple[str, float]:
    reference, star, weight = part.partition("*")
    if not reference or (star and not _WEIGHT.fullmatch(weight)):
        raise InvalidValue(
            f"{param} {text[:200]!r} is no reference and no mixture like a@prod*0.7+b*0.3 (at {part[:80]!r})",
            param=param,
        )
    return reference, float(weight) if star else 1.0


def _merged(merged: MergedAdapters) -> Terms:
    if merged.merge_strategy not in (None, "linear", "cat"):
        raise UnsupportedParameter(
            f"merge_strategy {merged.merge_strategy[:80]!r} is not supported, only 'linear': the sum of the deltas",
            param="merged_adapters.merge_strategy",
        )
    if len(merged.ids) != len(merged.weights):
        raise MixtureRefused(
            f"merged_adapters has {len(merged.ids)} ids and {len(merged.weights)} weights", param="merged_adapters"
        )
    return tuple(zip(merged.ids, merged.weights, strict=True))


def _agreed(chosen: dict[str, Terms]) -> Terms:
    """The one choice that is made. A model that is the base leaves it to the other fields."""
    made = {field: terms for field, terms in chosen.items() if terms or field != "model"}
    if not made:
        return ()
    (first, terms), *others = made.items()
    for field, other in others:
        if other != terms:
            raise InvalidValue(f"{first!r} and {field!r} choose different adapters: send one of them", param=field)
    return terms
