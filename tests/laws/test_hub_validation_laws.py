"""Laws of validation: any bytes give a Manifest or Refused, and what we accept the safetensors library accepts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from hub.errors import BadTensors, Refused
from hub.manifest import CONFIG_FILE, WEIGHTS_FILE
from hub.targets import pattern_complaint, pattern_value, targets
from hub.tensors import BYTES_OF, read_header
from hub.validate import validate
from tests.unit.hub.makers import lora_config, raw_safetensors, write_base, write_lora

names = st.sampled_from(["a", "b", "__metadata__", "../x", ""]) | st.text(max_size=4)
naturals = st.integers(-1, 9) | st.sampled_from([2**31, 2**63, 2**64, 1.5, True, None, "1"])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BYTES_OF, "F1", 3]),
        "shape": st.lists(naturals, max_size=3),
        "data_offsets": st.lists(naturals, min_size=1, max_size=3),
    }
)
headers = st.dictionaries(names, entries | st.just({"format": "pt"}) | st.none(), max_size=3)
# Float32 values whose exponent is all ones, or all but one.
near_infinity = st.tuples(st.binary(min_size=2, max_size=2), st.sampled_from([b"\x7f\x7f", b"\x80\xff", b"\x80\x7f"]))
patterns = st.text(alphabet="ab.*+?()[]{}|\\d^$,1:=!<P>", max_size=14)


@st.composite
def tiling_headers(draw: st.DrawFn) -> dict[str, Any]:
    """Headers whose tensors tile the payload, so that many are accepted."""
    begin, header = 0, {}
    for name in draw(st.lists(st.text(min_size=1, max_size=4), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(BYTES_OF)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = begin + BYTES_OF[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    return header


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("good")
    yield write_lora(root / "adapter", write_base(root / "base"))


def accepts(data: bytes) -> bool:
    try:
        read_header(BytesIO(data), len(data))
    except BadTensors as refusal:
        assert str(refusal).isprintable()
        return False
    return True


@settings(deadline=None)
@given(headers | tiling_headers() | st.binary(max_size=40), st.integers(0, 60))
def test_what_we_accept_the_safetensors_library_accepts(header: Any, payload: int) -> None:
    declared = header if isinstance(header, bytes) else {**header}
    if isinstance(declared, dict) and payload % 2:
        ends = [
            entry["data_offsets"][-1] for entry in declared.values() if isinstance(entry, dict) and "shape" in entry
        ]
        payload = max((end for end in ends if type(end) is int and 0 <= end < 1000), default=0)
    data = raw_safetensors(declared, bytes(payload))
    if accepts(data):
        safetensors.deserialize(data)


@settings(deadline=None)
@given(tiling_headers())
def test_a_header_that_tiles_its_payload_is_accepted(header: dict[str, Any]) -> None:
    payload = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    header.pop("__metadata__", None)
    assert accepts(raw_safetensors(header, bytes(payload)))


@settings(deadline=None)
@given(tiling_headers(), st.data())
def test_a_header_whose_tensors_do_not_tile_the_payload_is_refused(header: dict[str, Any], data: st.DataObject) -> None:
    header.pop("__metadata__", None)
    filled = sorted(name for name, entry in header.items() if entry["data_offsets"][0] < entry["data_offsets"][1])
    assume(filled)  # an empty tensor may stand between any two others
    payload = max(entry["data_offsets"][1] for entry in header.values())
    moved = header[data.draw(st.sampled_from(filled))]
    moved["data_offsets"] = [offset + data.draw(st.integers(1, 9)) for offset in moved["data_offsets"]]
    assert not accepts(raw_safetensors(header, bytes(payload)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(min_size=4, max_size=4) | near_infinity.map(b"".join), st.integers(0, 200))
def test_one_value_of_any_bits_is_accepted_exactly_when_it_is_finite(good: Path, bits: bytes, place: int) -> None:
    original = (good / WEIGHTS_FILE).read_bytes()
    end = len(original) - 4 * place
    with TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(good, Path(scratch) / "adapter"))
        (folder / WEIGHTS_FILE).write_bytes(original[: end - 4] + bits + original[end:])
        try:
            validate(folder)
        except Refused as refusal:
            assert "NaN or infinite" in str(refusal)
            assert not np.isfinite(np.frombuffer(bits, "<f4")).all()
        else:
            assert np.isfinite(np.frombuffer(bits, "<f4")).all()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_whatever_the_bytes_the_outcome_is_a_manifest_or_a_refusal(good: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from([CONFIG_FILE, WEIGHTS_FILE]))
    original = (good / file).read_bytes()
    with TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(good, Path(scratch) / "adapter"))
        (folder / file).write_bytes(_mutated(original, data))
        try:
            manifest = validate(folder)
        except Refused as refusal:
            assert refusal.problems
            assert all(str(problem).isprintable() for problem in refusal.problems)
        else:
            values = load_file(folder / WEIGHTS_FILE).values()
            assert all(np.isfinite(value).all() for value in values)
            assert manifest.recomputed_digest() == manifest.digest


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from(sorted(lora_config(Path("base")))),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_whatever_a_field_holds_the_outcome_is_a_manifest_or_a_refusal(good: Path, key: str, value: Any) -> None:
    with TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(good, Path(scratch) / "adapter"))
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**config, key: value}))
        try:
            validate(folder)
        except Refused as refusal:
            assert all(str(problem).isprintable() for problem in refusal.problems)


@settings(deadline=None)
@given(patterns)
def test_a_pattern_that_is_accepted_can_be_used_on_a_long_name(pattern: str) -> None:
    if pattern_complaint(pattern) is None:
        module = "model.layers.1." + "ab" * 20
        targets({"target_modules": pattern}, module)
        pattern_value({pattern: 1}, module, 0)
        targets({"target_modules": ["x"], "layers_to_transform": [1], "layers_pattern": pattern}, module)


def _mutated(original: bytes, data: st.DataObject) -> bytes:
    """The same bytes with one stretch replaced, dropped or doubled."""
    begin = data.draw(st.integers(0, len(original)) | st.integers(0, min(200, len(original))))
    end = begin + data.draw(st.integers(0, 12))
    middle = data.draw(st.binary(max_size=12) | st.just(original[begin:end] * 2))
    return original[:begin] + middle + original[end:]
