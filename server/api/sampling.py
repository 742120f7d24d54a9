"""The sampling fields of a body as the engine takes them. Pure."""

from __future__ import annotations

import hashlib
import re

from server.api.requests import MAX_STOP_CHARACTERS, MAX_STOPS, GenerationBody
from server.errors import InvalidValue
from server.records import Sampling

# The engine keeps the most likely tokens up to a mass of top_p; OpenAI allows 0, which keeps the first alone.
SMALLEST_TOP_P = 1e-6
_SEEDS = 2**63
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,8}")


def read_sampling(body: GenerationBody, *, seed: int, vocabulary_size: int) -> Sampling:
    """Raises: InvalidValue."""
    return Sampling(
        temperature=_or(body.temperature, 1.0),
        top_p=max(_or(body.top_p, 1.0), SMALLEST_TOP_P),
        top_k=min(max(body.top_k or 0, 0), vocabulary_size),
        min_p=_or(body.min_p, 0.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_biases(body.logit_bias or {}, vocabulary_size),
        seed=seed % _SEEDS,
    )


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index`. The first choice has the request's own, so that n does not change it."""
    if index == 0:
        return seed % _SEEDS
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _SEEDS


def read_stops(stop: object) -> tuple[str, ...]:
    """Raises: InvalidValue."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(item, str) for item in stops):
        raise InvalidValue("stop must be a string or a list of strings", param="stop")
    if len(stops) > MAX_STOPS:
        raise InvalidValue(f"stop has {len(stops)} strings, above the maximum of {MAX_STOPS}", param="stop")
    for item in stops:
        if not 1 <= len(item) <= MAX_STOP_CHARACTERS:
            raise InvalidValue(
                f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(item)}", param="stop"
            )
    return tuple(stops)


def read_token_ids(ids: list[int], *, vocabulary_size: int, param: str) -> tuple[int, ...]:
    """Raises: InvalidValue."""
    for token_id in ids:
        if not 0 <= token_id < vocabulary_size:
            raise InvalidValue(
                f"{param}: token id {str(token_id)[:40]} is outside the vocabulary (0 to {vocabulary_size - 1})",
                param=param,
            )
    return tuple(ids)


def _biases(biases: dict[str, float], vocabulary_size: int) -> tuple[tuple[int, float], ...]:
    read: list[tuple[int, float]] = []
    for key, bias in biases.items():
        if not _DECIMAL.fullmatch(key) or int(key) >= vocabulary_size:
            raise InvalidValue(
                f"logit_bias: {key[:40]!r} is no token id of the vocabulary (0 to {vocabulary_size - 1})",
                param="logit_bias",
            )
        read.append((int(key), float(bias)))
    return tuple(sorted(read))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
