"""Tensors that lie in their file are those that the safetensors library gives."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import Tensor

from hub.errors import BadTensors
from server.adapters.tensor_file import DTYPES, TensorFiles


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 2).view(shape).to(dtype)


MIXED = {
    "a": some(torch.bfloat16, 3, 5),
    "b": some(torch.int32, 2, 3),
    "c": some(torch.float32, 4),
    "d": some(torch.float16, 1, 1, 7),
    "e": some(torch.bool, 3),  # what follows it in a file may stand at an odd place
    "f": torch.empty(0, 4),
    "g": torch.tensor(3.0, dtype=torch.float64),
    "h": some(torch.uint8, 5),
}


@pytest.mark.parametrize("names", ["a", "f", "abc", "hgfedcba", "eh", ""])
def test_every_tensor_is_the_librarys(names: str) -> None:
    content = safetensors.torch.save({name: MIXED[name] for name in names}, metadata={"format": "pt"})
    theirs, files = safetensors.torch.load(content), TensorFiles()
    for _ in range(2):  # its header is new, and then known
        ours = files.read(memoryview(bytearray(content)))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert ours[name].is_contiguous()
            assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize("pad", range(8))
def test_a_header_of_any_length_is_read(pad: int) -> None:
    """The library pads it to eight bytes; other writers need not."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode() + b" " * pad
    content = len(header).to_bytes(8, "little") + header + torch.tensor([1.5, -2.0]).numpy().tobytes()
    assert TensorFiles().read(memoryview(bytearray(content)))["a"].tolist() == [1.5, -2.0]


def test_every_dtype_of_the_format_is_one_of_torchs() -> None:
    for name, dtype in DTYPES.items():
        content = safetensors.torch.save({"a": torch.zeros(2, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)})
        assert f'"{name}"'.encode() in content
        assert TensorFiles().read(memoryview(bytearray(content)))["a"].dtype == dtype


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_a_file_that_is_cut_off_is_refused(cut: int) -> None:
    content = safetensors.torch.save({"a": MIXED["a"]})
    with pytest.raises(BadTensors):
        TensorFiles().read(memoryview(bytearray(content[:cut])))


def test_tensors_of_one_file_share_its_memory() -> None:
    content = memoryview(bytearray(safetensors.torch.save({"a": MIXED["a"], "c": MIXED["c"]})))
    first = TensorFiles().read(content)["a"]
    content[-60:] = bytes(60)
    assert not first.any()
