"""What one value in an adapter's config may be: a check takes the value and gives its complaint, or None.

Every complaint holds the value and what is allowed. Nothing here knows which key a value belongs to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from hub.ref import printable
from hub.targets import MAX_REPEATS_OF_MANY, pattern_complaint

Check = Callable[[Any], str | None]

MAX_PATTERNS = 1024
MAX_NAMES = 4096
MAX_TOKENS = 1024

INITIALISATIONS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
_TRANSFORMERS = re.compile(r"transformers\.models\.\w+\.modeling_\w+:\w+(?:ForCausalLM|LMHeadModel)", re.ASCII)
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "kasa")


def anything(value: Any) -> str | None:
    return None


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else f"must be true or false, not {shown(value)}"


def number(value: Any) -> str | None:
    if type(value) in (int, float) and math.isfinite(value):
        return None
    return f"must be a finite number, not {shown(value)}"


def positive(value: Any) -> str | None:
    return None if type(value) is int and value > 0 else f"must be a whole number above 0, not {shown(value)}"


def whole(value: Any) -> str | None:
    return None if type(value) is int and value >= 0 else f"must be a whole number, not {shown(value)}"


def seed(value: Any) -> str | None:
    """What torch takes as the seed of a generator."""
    if type(value) is int and -(2**63) <= value < 2**64:
        return None
    return f"must be a whole number of 64 bits, not {shown(value)}"


def optional_positive(value: Any) -> str | None:
    return None if value is None else positive(value)


def optional_whole(value: Any) -> str | None:
    return None if value is None else whole(value)


def optional_text(value: Any) -> str | None:
    return None if value is None or isinstance(value, str) else f"must be a text or null, not {shown(value)}"


def optional_token_ids(value: Any) -> str | None:
    if value is None or value == []:
        return None
    if isinstance(value, list) and len(value) <= MAX_TOKENS and all(type(item) is int and item >= 0 for item in value):
        return None
    return f"must be a list of at most {MAX_TOKENS} token ids or null, not {shown(value)}"


def one_of(*allowed: Any) -> Check:
    def check(value: Any) -> str | None:
        if any(value == item and type(value) is type(item) for item in allowed):
            return None
        return f"{shown(value)} is not served; served are {', '.join(shown(item) for item in allowed)}"

    return check


def neutral(*defaults: Any, why: str) -> Check:
    def check(value: Any) -> str | None:
        if any(value == item and type(value) is type(item) for item in defaults):
            return None
        return f"{shown(value)} is not served ({why}); only {shown(defaults[0])} is"

    return check


def module_names(value: Any) -> str | None:
    """A list of module names, or one regular expression."""
    if isinstance(value, str):
        return pattern_complaint(value)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
        return f'must be a list of module names, a regular expression or "all-linear", not {shown(value)}'
    return f"{len(value)} names are above the limit of {MAX_NAMES}" if len(value) > MAX_NAMES else None


def optional_module_names(value: Any) -> str | None:
    return None if value is None or value == [] else module_names(value)


def saved_names(value: Any) -> str | None:
    """Modules that are saved whole: a list, for PEFT reads a text letter by letter."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        return f"must be a list of module names or null, not {shown(value)}"
    return f"{len(value)} names are above the limit of {MAX_NAMES}" if len(value) > MAX_NAMES else None


def token_rows(value: Any) -> str | None:
    """Tokens whose rows are replaced: a list, or a list for each of several modules by name."""
    listed = list(value.values()) if isinstance(value, dict) else [value]
    if value is None or (len(listed) <= 2 and all(_is_tokens(item) for item in listed)):
        return None
    return f"must be a list of token ids, or one for the embedding and one for the head, not {shown(value)}"


def token_list(value: Any) -> str | None:
    return None if _is_tokens(value) else f"must be a list of token ids, not {shown(value)}"


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value)


def feedforward_names(value: Any) -> str | None:
    """As `module_names`, but no module at all is allowed too."""
    return None if value == [] else module_names(value)


def auto_mapping(value: Any) -> str | None:
    """PEFT writes it when a config names no task. Others import what it names, so only transformers may stand there."""
    if value is None:
        return None
    named = value if isinstance(value, dict) else {}
    library, model = str(named.get("parent_library")), str(named.get("base_model_class"))
    if set(named) == {"parent_library", "base_model_class"} and _TRANSFORMERS.fullmatch(f"{library}:{model}"):
        return None
    return f"names Python code to import, {shown(value)}; only a causal LM of transformers may stand there, or null"


def layers(value: Any) -> str | None:
    items = value if isinstance(value, list) else [value]
    if value is None or all(type(item) is int and item >= 0 for item in items):
        return None
    return f"must be a layer number, a list of them or null, not {shown(value)}"


def layer_patterns(value: Any) -> str | None:
    items = value if isinstance(value, list) else [] if value is None else [value]
    if len(items) > MAX_PATTERNS or not all(isinstance(item, str) for item in items):
        return f"must be a text, a list of at most {MAX_PATTERNS} texts or null, not {shown(value)}"
    return next(filter(None, (pattern_complaint(item, max_repeats=MAX_REPEATS_OF_MANY) for item in items)), None)


def patterns_of(check: Check) -> Check:
    """An object of regular expressions over module names, each with a value."""

    def check_all(value: Any) -> str | None:
        if value is None:
            return None
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            return f"must be an object of at most {MAX_PATTERNS} patterns, not {shown(value)}"
        for pattern, item in value.items():
            reason = pattern_complaint(pattern, max_repeats=MAX_REPEATS_OF_MANY)
            if reason is not None:
                return reason
            reason = check(item)
            if reason is not None:
                return f"{printable(pattern)} {reason}"
        return None

    return check_all


def initialisation(value: Any) -> str | None:
    """Initialisations that leave the base alone pass; those that rewrite it would corrupt its other adapters."""
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in INITIALISATIONS):
        return None
    if isinstance(value, str) and value.lower().startswith(REWRITES_BASE):
        return (
            f"{printable(value)} rewrites the base's weights at load; convert the adapter to a plain delta: save the "
            "untrained adapter first, then save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    return f"{shown(value)} is not served; served are true, false, {', '.join(sorted(INITIALISATIONS))}"


def shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return printable(value if isinstance(value, str) else str(value))
