"""Which modules of a base an adapter's config means, by exactly the rules by which PEFT injects.

A list names modules by their end, a text is a regular expression over the whole name, "all-linear" is every Linear
but the head; exclude_modules, layers_to_transform and layers_pattern narrow that. rank_pattern and alpha_pattern are
regular expressions over the end of a name.
A pattern comes from a stranger's file: one whose matching could take more than polynomial time is refused unread, and
so is one that could take too long on the modules of this base, which a stranger may have described, too.
Source: peft 0.21.2, tuners/tuners_utils.py `check_target_module_exists`, utils/other.py `get_pattern_key`.
"""

from __future__ import annotations

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, TypeVar

from hub.base import Modules
from hub.errors import SHOWN_PROBLEMS
from hub.ref import printable

ALL_LINEAR = "all-linear"
MAX_PATTERN_CHARACTERS = 2000
MAX_REPEATS = 5
MAX_REPEATS_OF_MANY = 2
# A step of a match takes some 40 ns, and a match holds up every other thread of the process.
MAX_STEPS_A_NAME = 10_000_000
MAX_STEPS = 10_000_000_000
_STEPS_OF_A_COMPARISON = 40
_MANY_LEAVES = 2000

_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT, getattr(ops, "POSSESSIVE_REPEAT", None))
_REFUSED_OPS = (ops.GROUPREF, ops.GROUPREF_EXISTS, ops.ASSERT, ops.ASSERT_NOT)
_ONE_CHARACTER = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN)
_NAMED = ("target_modules", "exclude_modules", "feedforward_modules", "target_parameters")
_NUMBERED = re.compile(r".*?\.[^.]*\.(?P<idx>[0-9]+)\.")
# Where PEFT puts a pattern: at the end of a name, and before the number of a layer.
_AT_THE_END = r"(.*\.)?({})$"
_BEFORE_A_NUMBER = r"(?:^|.*?\.){}\.(?P<idx>[0-9]+)\."
_AFTER_A_DOT = r".*\.{}$"  # where PEFT's older kinds put one: without the brackets, so that a|b means something else
_CONTEXTS = (_AT_THE_END, _BEFORE_A_NUMBER, _AFTER_A_DOT)
_END_PATTERNS = ("rank_pattern", "n_frequency_pattern", "block_size_pattern")

Value = TypeVar("Value")


def target_modules(config: Mapping[str, Any], modules: Modules) -> tuple[str, ...]:
    """The Linear layers that the config adapts, in the order of the base."""
    return tuple(name for name in modules.linears if targets(config, name))


def targets(config: Mapping[str, Any], module: str) -> bool:
    """Whether the config means this module."""
    if _excluded(config.get("exclude_modules"), module):
        return False
    wanted = config["target_modules"]
    if isinstance(wanted, str):
        if wanted.lower() == ALL_LINEAR:
            return module != "lm_head"
        return re.fullmatch(wanted, module) is not None
    return _ends_with_one_of(module, wanted) and _layer_is_meant(config, module)


def feedforward(config: Mapping[str, Any], module: str) -> bool:
    """Whether IA3 scales this module's input. PEFT compares ends here without a dot between, and so do we."""
    wanted = config["feedforward_modules"]
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module.endswith(name) for name in wanted)


def matching_complaint(config: Mapping[str, Any], modules: Modules) -> str | None:
    """Why finding the targets could take too long, or None. For a config without other complaints.

    A match of k repeats on a name of n characters takes at most as many steps as there are ways to part n into k + 1.
    """
    names = [*modules.linears, *modules.others]
    longest = max(map(len, names), default=0)
    total = 0
    for pattern, around in _patterns(config):
        repeats = _repeats(parser.parse(pattern)) + around
        steps = math.comb(longest + repeats, repeats)
        if steps > MAX_STEPS_A_NAME:
            return (
                f"the pattern {printable(pattern)} could take {steps} steps on a module's name of {longest} characters,"
                f" above the limit of {MAX_STEPS_A_NAME}; name the modules in a list"
            )
        total += len(names) * steps
    listed = sum(len(config[key]) for key in _NAMED if isinstance(config.get(key), list))
    total += len(names) * listed * _STEPS_OF_A_COMPARISON
    if total > MAX_STEPS:
        return (
            f"finding {listed} names and the patterns among {len(names)} modules could take {total} steps, above the "
            f"limit of {MAX_STEPS}"
        )
    return None


def _patterns(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Every regular expression, and how many repeats PEFT puts around it."""
    whole = [(config[key], 0) for key in _NAMED if isinstance(config.get(key), str)]
    at_the_end = [(pattern, 1) for key in _END_PATTERNS for pattern in config.get(key) or ()]
    layers = config.get("layers_pattern") or []
    return whole + at_the_end + [(pattern, 2) for pattern in ([layers] if isinstance(layers, str) else layers)]


def pattern_value(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """The first pattern that fits the end of the module's name wins."""
    for pattern, value in patterns.items():
        if _at_the_end(pattern).match(module):
            return value
    return default


def dotted_pattern_value(patterns: Mapping[str, Value], module: str, default: Value) -> Value:
    """As `pattern_value`, by the rule of C3A and FourierFT; without a match the module's whole name is looked up."""
    for pattern, value in patterns.items():
        if _after_a_dot(pattern).match(module):
            return value
    return patterns.get(module, default)


def target_complaints(config: Mapping[str, Any], modules: Modules) -> list[str]:
    """What the config targets that this base does not have, or that is no Linear layer."""
    wanted = config["target_modules"]
    known = [*modules.linears, *modules.others]
    if isinstance(wanted, str):
        found = wanted.lower() == ALL_LINEAR or any(re.fullmatch(wanted, name) for name in modules.linears)
        complaints = [] if found else [f"the pattern {printable(wanted)} fits no Linear layer of the base"]
        hit = [name for name in modules.others if wanted.lower() != ALL_LINEAR and re.fullmatch(wanted, name)]
    else:
        missing = [name for name in wanted if not any(_ends_with_one_of(module, [name]) for module in known)]
        leaves = sorted({module.rpartition(".")[2] for module in known}) if missing else []
        complaints = [_missing(name, leaves) for name in missing[:SHOWN_PROBLEMS]]
        if len(missing) > SHOWN_PROBLEMS:
            complaints.append(f"{len(missing) - SHOWN_PROBLEMS} more target modules are not in the base")
        hit = [name for name in modules.others if targets({**config, "layers_to_transform": None}, name)]
    complaints += [f"{name} is no Linear layer; only Linear layers are served" for name in sorted(hit)]
    if not complaints and not target_modules(config, modules):
        complaints.append("no Linear layer of the base is left after exclusions and layers_to_transform")
    return complaints


def pattern_complaint(pattern: str, *, max_repeats: int = MAX_REPEATS) -> str | None:
    """Why a regular expression is not accepted, or None. Where there may be many, pass MAX_REPEATS_OF_MANY."""
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return f"a pattern of {len(pattern)} characters is above the limit of {MAX_PATTERN_CHARACTERS}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # syntax that a later Python will read otherwise
            repeats = _repeats(parser.parse(pattern))
            for context in _CONTEXTS:
                re.compile(context.format(pattern))
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        return f"{printable(pattern)} is no regular expression: {error}"
    except _Backtracks as error:
        return f"the pattern {printable(pattern)} could take for ever: {error}"
    if repeats > max_repeats:
        return f"the pattern {printable(pattern)} repeats {repeats} times, above the limit of {max_repeats}"
    return None


class _Backtracks(ValueError):
    """The pattern has a construct whose matching time is not bounded by a small polynomial."""


def _repeats(tree: Iterable[Any]) -> int:
    """The largest number of repeats that one match can pass through."""
    total = 0
    for op, argument in tree:
        if op in _REFUSED_OPS:
            raise _Backtracks("it looks around or refers back")
        if op in _REPEATS:
            low, high, body = argument
            inner = _repeats(body)
            if high > 1 and (len(body) != 1 or body[0][0] not in _ONE_CHARACTER):
                raise _Backtracks("it repeats more than a single character")
            total += inner + (1 if high > low else 0)
        elif op is ops.BRANCH:
            total += max(_repeats(branch) for branch in argument[1])
        elif op is ops.SUBPATTERN:
            total += _repeats(argument[-1])
        elif op is getattr(ops, "ATOMIC_GROUP", None):
            total += _repeats(argument)
    return total


def _excluded(excluded: Any, module: str) -> bool:
    if not excluded:
        return False
    if isinstance(excluded, str):
        return re.fullmatch(excluded, module) is not None
    return _ends_with_one_of(module, excluded)


def _ends_with_one_of(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer_is_meant(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    if isinstance(patterns, str):
        patterns = [patterns]
    tried = [re.compile(_BEFORE_A_NUMBER.format(pattern)) for pattern in patterns] or [_NUMBERED]
    found = next((match for match in (pattern.match(module) for pattern in tried) if match), None)
    if found is None:
        return False
    return int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)


@lru_cache(maxsize=4096)  # more than one config has: the cache of `re` is smaller
def _at_the_end(pattern: str) -> re.Pattern[str]:
    return re.compile(_AT_THE_END.format(pattern))


@lru_cache(maxsize=4096)
def _after_a_dot(pattern: str) -> re.Pattern[str]:
    return re.compile(_AFTER_A_DOT.format(pattern))


def _missing(name: str, leaves: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.rpartition(".")[2], leaves[:_MANY_LEAVES], n=1)
    hint = f"; did you mean {near[0]}?" if near else f" (it has {', '.join(leaves[:12])})"
    return f"target module {printable(name)} is not in the base{hint}"
