"""Just enough of Kubernetes' protobuf to read the Secrets in which Helm keeps its releases.

Source: k8s.io/apimachinery runtime/generated.proto (Unknown), meta/v1 (ObjectMeta), k8s.io/api core/v1 (Secret).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\x00"


def secret(body: bytes) -> dict[str, Any]:
    """An envelope with a v1 Secret in it, as its JSON would be."""
    envelope = dict(_fields(body.removeprefix(MAGIC)))
    kind = dict(_fields(envelope[1]))
    assert (kind[1], kind[2]) == (b"v1", b"Secret"), kind
    found: dict[str, Any] = {"metadata": {}, "data": {}}
    for number, value in _fields(envelope[2]):
        if number == 1:
            found["metadata"] = _metadata(value)
        elif number == 2:
            entry = dict(_fields(value))
            found["data"][entry[1].decode()] = base64.b64encode(entry.get(2, b"")).decode()
        elif number == 3:
            found["type"] = value.decode()
    return found


def _metadata(body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, value in _fields(body):
        if number == 1:
            found["name"] = value.decode()
        elif number == 11:
            entry = dict(_fields(value))
            found.setdefault("labels", {})[entry[1].decode()] = entry.get(2, b"").decode()
        elif number == 12:
            entry = dict(_fields(value))
            found.setdefault("annotations", {})[entry[1].decode()] = entry.get(2, b"").decode()
    return found


def _fields(body: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each length-delimited field; numbers are read past."""
    at = 0
    while at < len(body):
        tag, at = _varint(body, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, at = _varint(body, at)
        elif wire == 2:
            length, at = _varint(body, at)
            yield number, body[at : at + length]
            at += length
        else:
            raise ValueError(f"wire type {wire} is not read here")


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
