"""The functions of native.c, for tensors on a CPU.

The library is built when the package is installed, where a C compiler is at hand; without it `LIBRARY` is None, and
those who call here take their plain torch operations instead.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import logging
from pathlib import Path

import torch  # before the library is loaded, which shares its OpenMP threads
from torch import Tensor

log = logging.getLogger(__name__)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = frozenset({torch.float32, torch.bfloat16})  # of what goes through the network
LANES = 16
MEMBERS = 8  # Linears that read the same input, at most

_INTEGER, _POINTER, _FLOAT, _TYPE = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "mg_lowrank": (
        *(_POINTER, _INTEGER, _INTEGER, _INTEGER, _TYPE),  # x
        *(_POINTER, _POINTER, _INTEGER),  # y
        *(_POINTER, _INTEGER, _POINTER, _POINTER, _TYPE),  # runs, pairs, held, threads
    ),
    "mg_attend": (
        *(_POINTER, _INTEGER, _INTEGER, _POINTER),  # query, out
        *(_POINTER, _POINTER, _INTEGER, _TYPE),  # keys, values
        *(_INTEGER, _INTEGER, _INTEGER, _INTEGER),  # sequences, heads, kv_heads, dim
        *(_POINTER, _INTEGER, _POINTER, _INTEGER, _INTEGER),  # blocks, lengths, block size, window
        *(_FLOAT, _FLOAT, _POINTER, _TYPE),
    ),
    "mg_few_bits": (
        *(_POINTER, _INTEGER, _INTEGER, _POINTER, _TYPE),  # x, y
        *(_POINTER, _POINTER, _POINTER, _POINTER),  # codes, levels, scales, offsets
        *(_INTEGER, _INTEGER, _INTEGER, _TYPE),  # inputs, outputs, group, threads
    ),
}


def _load() -> ctypes.CDLL | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_native{suffix}"
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:
                log.warning("the native kernels cannot be loaded, torch's operations are used: %s", error)
                return None
            for name, arguments in _SIGNATURES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, _TYPE
            return library
    return None


LIBRARY = _load()


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether activations of that dtype can go through these functions here."""
    return LIBRARY is not None and device.type == "cpu" and dtype in ACTIVATIONS


def attend(
    query_HBD: Tensor,
    keys_KLD: Tensor,
    values_KLD: Tensor,
    blocks_BN: Tensor,
    lengths_B: Tensor,
    *,
    block_size: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Each sequence's newest token over its cached positions: (B, H, D).

    `keys_KLD` is the whole cache of a layer; the blocks of a sequence are the rows of `blocks_BN` that `lengths_B`
    reaches. H query heads, D a multiple of 16, all of one dtype. Raises: MemoryError.
    """
    assert LIBRARY is not None
    heads, sequences, dim = query_HBD.shape
    assert query_HBD.stride(2) == 1 and keys_KLD.is_contiguous() and values_KLD.is_contiguous()
    out_BHD = torch.empty(sequences, heads, dim, dtype=query_HBD.dtype)
    sinks = None if sinks_H is None else sinks_H.float().contiguous()
    failed = LIBRARY.mg_attend(
        query_HBD.data_ptr(),
        query_HBD.stride(0),
        query_HBD.stride(1),
        out_BHD.data_ptr(),
        keys_KLD.data_ptr(),
        values_KLD.data_ptr(),
        keys_KLD.shape[1],
        TYPES[keys_KLD.dtype],
        sequences,
        heads,
        keys_KLD.shape[0],
        dim,
        blocks_BN.data_ptr(),
        blocks_BN.shape[1],
        lengths_B.data_ptr(),
        block_size,
        window or 0,
        scale,
        softcap or 0.0,
        None if sinks is None else sinks.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the scores of an attention")
    return out_BHD


def few_bits(
    x_TI: Tensor, codes: Tensor, levels: Tensor | None, scales_OG: Tensor, offsets_OG: Tensor | None, *, group: int
) -> Tensor:
    """(T, O): the product with a weight in few bits, of server/kernels/quantized.py. Raises: MemoryError."""
    assert LIBRARY is not None
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    y_TO = torch.empty(x_TI.shape[0], scales_OG.shape[0], dtype=x_TI.dtype)
    failed = LIBRARY.mg_few_bits(
        x_TI.data_ptr(),
        x_TI.stride(0),
        x_TI.shape[0],
        y_TO.data_ptr(),
        TYPES[x_TI.dtype],
        codes.data_ptr(),
        None if levels is None else levels.data_ptr(),
        scales_OG.data_ptr(),
        None if offsets_OG is None else offsets_OG.data_ptr(),
        x_TI.shape[1],
        scales_OG.shape[0],
        group,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory to widen a weight in few bits")
    return y_TO
