"""Headers of safetensors files: what is refused, and that nothing is read beyond the limits."""

from io import BytesIO
from typing import Any

import pytest

from hub.errors import BadTensors
from hub.tensors import read_header
from tests.unit.hub.makers import raw_safetensors, tensor

GOOD = {"a": tensor("F32", [2], 0, 8), "b": tensor("F16", [1, 3], 8, 14), "__metadata__": {"format": "pt"}}


def refusal(data: bytes, **limits: int) -> str:
    with pytest.raises(BadTensors) as caught:
        read_header(BytesIO(data), len(data), **limits)
    return str(caught.value)


def test_a_good_header_gives_the_tensors_in_the_order_of_their_bytes() -> None:
    data = raw_safetensors(GOOD, bytes(14))
    source = BytesIO(data)
    header = read_header(source, len(data))
    assert [(entry.name, entry.dtype, entry.shape, entry.elements) for entry in header.entries] == [
        ("a", "F32", (2,), 2),
        ("b", "F16", (1, 3), 3),
    ]
    assert source.read() == bytes(14)
    assert data.startswith(header.raw)


@pytest.mark.parametrize(
    ("header", "payload", "reason"),
    [
        ({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 12, 20)}, 20, "leaves a gap"),
        ({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, 12, "overlaps"),
        ({"a": tensor("F32", [2], 4, 12)}, 12, "leaves a gap"),
        ({"a": tensor("F32", [2], 0, 8)}, 4, "truncated"),
        ({"a": tensor("F32", [2], 0, 8)}, 9, "no tensor owns"),
        ({"a": tensor("F32", [2], 0, 4)}, 4, "takes 8 bytes"),
        ({"a": tensor("F32", [2**31, 2**31, 2**31], 0, 8)}, 8, "overflows"),
        ({"a": tensor("F32", [-1], 0, 4)}, 4, "whole numbers"),
        ({"a": tensor("Q4", [1], 0, 4)}, 4, "unknown"),
        ({"a": {**tensor("F32", [1], 0, 4), "extra": 1}}, 4, "exactly"),
        ({"a": tensor("F32", [True], 0, 4)}, 4, "whole numbers"),
        ({"a": tensor("F32", [1] * 9, 0, 4)}, 4, "at most 8"),
        ({"a": 5}, 0, "exactly"),
        ({"__metadata__": {"format": 1}}, 0, "texts"),
        (b'{"a": 1, "a": 2}', 0, "stands twice"),
        (b"[]", 0, "does not start"),
        (b" {}", 0, "does not start"),
        (b"{,}", 0, "no usable JSON"),
    ],
)
def test_a_header_that_cannot_be_trusted_is_refused(header: Any, payload: int, reason: str) -> None:
    assert reason in refusal(raw_safetensors(header, bytes(payload)))


def test_a_header_above_the_limit_is_refused_with_both_numbers() -> None:
    assert "declares 2000000 bytes, above the limit of 1000000" in refusal(
        raw_safetensors(b"{", length=2_000_000) + bytes(10), max_header_bytes=1_000_000
    )
    assert "truncated" in refusal(raw_safetensors(b"{}", length=1000))
    assert "above the limit" in refusal(raw_safetensors(b"{}", length=2**63))


def test_every_reason_is_told_at_once() -> None:
    reasons = refusal(raw_safetensors({"a": tensor("Q4", [1], 0, 4), "b": tensor("F32", [2], 0, 4)}, bytes(4)))
    assert "a: dtype" in reasons
    assert "b: shape" in reasons


@pytest.mark.parametrize("size", range(9))
def test_a_file_of_a_few_bytes_is_refused(size: int) -> None:
    refusal(bytes(size))
