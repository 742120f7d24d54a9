"""JSON as a hub reads and writes it: what two readers could understand differently is refused.

Law: `parse(canonical(x)) == x`, and equal values have equal canonical bytes.
Refused when reading: a key twice in one object, numbers that are not finite, text that is not Unicode, nesting beyond
a limit, which overflows other readers sooner than ours.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64


class BadJson(ValueError):
    """The text is no JSON that every reader understands alike; the message says where."""


def parse(data: bytes) -> Any:
    """Raises: BadJson."""
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
        if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
            raise BadJson(f"nested too deeply: more than {MAX_DEPTH} levels")
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeDecodeError as error:
        raise BadJson(f"byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadJson(f"line {error.lineno} column {error.colno}: {error.msg}") from error
    except UnicodeEncodeError as error:
        raise BadJson("an escape is half of a surrogate pair") from error
    except RecursionError as error:
        raise BadJson(f"nested too deeply: more than {MAX_DEPTH} levels") from error
    except BadJson:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise BadJson("a number has too many digits") from error


def canonical(value: Any) -> bytes:
    """Sorted keys, no spaces, ASCII: one text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def readable(value: Any) -> bytes:
    """As canonical, but with lines: what PEFT itself writes."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False).encode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadJson(f"the key {twice[:120]!a} stands twice in one object")
    return found


def _is_deep(value: Any) -> bool:
    """Whether anything stands below the limit of levels; level by level, so that nothing here overflows either."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inside = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [child for children in inside for child in children]
    return any(isinstance(one, dict | list) for one in level)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadJson(f"the number {text[:40]} is not finite")
    return value


def _constant(text: str) -> Any:
    raise BadJson(f"{text} is no JSON number")
