"""The functions of native.c, for tensors on a CPU.

The library is built when the package is installed, where a C compiler is at hand; without it `LIBRARY` is None, and
those who call here take their plain torch operations instead.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch  # before the library is loaded, which shares its OpenMP threads
from torch import Tensor

from server.kernels import pages

log = logging.getLogger(__name__)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = frozenset({torch.float32, torch.bfloat16})  # of what goes through the network
LANES = 16
TILE, DEEP = 16, 64  # rows of a matrix unit's tile, and bytes of each
MEMBERS = 8  # Linears that read the same input, at most
EXPONENTS = 16  # of a weight in codes
HEAD_NORM = np.dtype([("weight", "u8"), ("offset", "f4"), ("eps", "f4")])  # as head_norm_t in native.c
MOST_ODD = 1 / 64  # of a weight's numbers may have others: each takes eight bytes, and is put in its place one by one

_INTEGER, _POINTER, _FLOAT, _TYPE = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "mg_lowrank": (
        *(_POINTER, _INTEGER, _INTEGER, _INTEGER, _TYPE),  # x
        *(_POINTER, _POINTER, _INTEGER),  # y
        *(_POINTER, _INTEGER, _POINTER, _POINTER, _TYPE),  # runs, pairs, held, threads
    ),
    "mg_norm": (
        *(_POINTER, _INTEGER, _INTEGER, _INTEGER),  # x
        *(_POINTER, _FLOAT, _FLOAT, _POINTER, _TYPE, _TYPE),
    ),
    "mg_add_and_norm": (
        *(_POINTER, _POINTER, _INTEGER, _INTEGER),  # x, y
        *(_POINTER, _FLOAT, _FLOAT, _POINTER, _TYPE, _TYPE),
    ),
    "mg_swiglu": (
        *(_POINTER, _INTEGER, _POINTER, _INTEGER),  # a, b
        *(_INTEGER, _INTEGER, _POINTER, _TYPE, _TYPE),
    ),
    "mg_round": (
        *(_POINTER, _INTEGER, _INTEGER, _INTEGER),  # x
        *(_POINTER, _POINTER, _FLOAT, _TYPE, _TYPE),  # codes, scales
    ),
    "mg_scale": (_POINTER, _POINTER, _INTEGER, _INTEGER, _POINTER, _TYPE, _TYPE),
    "mg_change": (
        *(_POINTER, _INTEGER, _INTEGER, _TYPE),  # x, features
        *(_POINTER, _INTEGER, _POINTER),  # runs, pairs
        *(_POINTER, _INTEGER, _TYPE, _TYPE),  # held, number, behind
    ),
    "mg_gain": (
        *(_POINTER, _INTEGER, _POINTER, _FLOAT, _FLOAT, _POINTER, _TYPE),  # x, weight, out
        *(_POINTER, _INTEGER, _POINTER),  # runs, pairs
        *(_POINTER, _INTEGER, _TYPE),  # held, number
    ),
    "mg_rotate_and_store": (
        *(_POINTER, _INTEGER, _POINTER, _INTEGER, _POINTER, _INTEGER),  # query, key, value
        *(_INTEGER, _INTEGER, _INTEGER, _INTEGER),  # tokens, heads, kv_heads, dim
        *(_POINTER, _POINTER, _INTEGER, _POINTER),  # cos, sin, rotated, places
        *(_POINTER, _POINTER, _INTEGER, _TYPE, _TYPE),  # keys, values, rows
    ),
    "mg_attend": (
        *(_POINTER, _INTEGER, _INTEGER, _POINTER),  # query, out
        *(_POINTER, _POINTER, _INTEGER, _TYPE),  # keys, values
        *(_INTEGER, _INTEGER, _INTEGER, _INTEGER),  # sequences, heads, kv_heads, dim
        *(_POINTER, _INTEGER, _POINTER, _INTEGER, _INTEGER),  # blocks, lengths, block size, window
        *(_FLOAT, _FLOAT, _POINTER, _TYPE),
    ),
    "mg_begin_attention": (
        *(_POINTER, _POINTER, _POINTER),  # made, bias, norms
        *(_INTEGER, _INTEGER, _INTEGER, _INTEGER),  # tokens, heads, kv_heads, dim
        *(_POINTER, _POINTER, _INTEGER, _POINTER),  # cos, sin, rotated, places
        *(_POINTER, _POINTER, _INTEGER, _TYPE),  # keys, values, rows
        *(_INTEGER, _POINTER, _INTEGER, _POINTER, _INTEGER, _INTEGER),  # sequences, blocks, lengths, block size, window
        *(_FLOAT, _POINTER, _TYPE),  # scale, out
    ),
    "mg_has_panels": (),
    "mg_panels_size": (_INTEGER, _INTEGER),
    "mg_panel": (_POINTER, _INTEGER, _INTEGER, _POINTER, _TYPE, _TYPE),
    "mg_unpanel": (_POINTER, _INTEGER, _INTEGER, _POINTER, _TYPE, _TYPE),
    "mg_multiply_panels": (
        *(_POINTER, _INTEGER, _INTEGER),  # x
        *(_POINTER, _TYPE, _POINTER),  # panels, bytes of a number, scales
        *(_INTEGER, _INTEGER, _POINTER, _TYPE),  # inputs, outputs, y
    ),
    "mg_has_tiles": (),
    "mg_tiled_size": (_INTEGER, _INTEGER),
    "mg_tile": (_POINTER, _INTEGER, _INTEGER, _INTEGER, _POINTER, _TYPE),
    "mg_untile": (_POINTER, _INTEGER, _INTEGER, _INTEGER, _POINTER, _TYPE),
    "mg_count_exponents": (_POINTER, _INTEGER, _POINTER, _TYPE),
    "mg_coded_size": (_INTEGER, _INTEGER, _INTEGER),
    "mg_code": (_POINTER, _INTEGER, _INTEGER, _POINTER, _POINTER, _TYPE),
    "mg_uncode": (_POINTER, _INTEGER, _INTEGER, _POINTER, _TYPE),
    "mg_multiply_bytes": (
        *(_POINTER, _POINTER, _INTEGER),  # codes, their scales
        *(_POINTER, _POINTER, _POINTER, _INTEGER, _INTEGER),  # weight, scales, sums, inputs, outputs
        *(_POINTER, _TYPE, _TYPE),  # y
    ),
    "mg_multiply": (
        *(_POINTER, _INTEGER, _INTEGER),  # x
        *(_POINTER, _TYPE, _INTEGER, _INTEGER, _POINTER, _TYPE),  # weight, coded, inputs, outputs, y
    ),
    "mg_multiply_with_adapters": (
        *(_POINTER, _POINTER, _INTEGER),  # adapters, x, inputs
        *(_POINTER, _INTEGER, _POINTER, _FLOAT),  # firsts, members, weight, least
        *(_POINTER, _POINTER, _POINTER, _TYPE),  # y, changed, spare
    ),
    "mg_decode": (_POINTER, _POINTER, _INTEGER, _POINTER, _POINTER, _POINTER, _INTEGER, _TYPE),
    "mg_few_bits": (
        *(_POINTER, _INTEGER, _INTEGER, _POINTER, _TYPE),  # x, y
        *(_POINTER, _POINTER, _POINTER, _POINTER),  # codes, levels, scales, offsets
        *(_INTEGER, _INTEGER, _INTEGER, _TYPE),  # inputs, outputs, group, threads
    ),
}

_RESULTS = {
    **dict.fromkeys(("mg_lowrank", "mg_change", "mg_gain", "mg_attend", "mg_begin_attention"), _TYPE),
    **dict.fromkeys(("mg_multiply", "mg_multiply_with_adapters", "mg_decode", "mg_few_bits"), _TYPE),
    **dict.fromkeys(("mg_uncode", "mg_has_tiles", "mg_has_panels", "mg_multiply_panels"), _TYPE),
    **dict.fromkeys(("mg_tiled_size", "mg_coded_size", "mg_panels_size"), _INTEGER),
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
                function.argtypes = arguments
                function.restype = _RESULTS.get(name)
            return library
    return None


LIBRARY = _load()


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether activations of that dtype can go through these functions here."""
    return LIBRARY is not None and device.type == "cpu" and dtype in ACTIVATIONS


def whole_tiles(tokens: int) -> int:
    """So many tokens, or a few more: other numbers are slower, and each is compiled when it is first met."""
    return tokens if tokens <= TILE else -(-tokens // TILE) * TILE


def empty_tiles(tokens: int, features: int, dtype: torch.dtype) -> Tensor:
    """(tokens, features), of anything, with room behind it for whole tiles."""
    return torch.empty(whole_tiles(tokens), features, dtype=dtype)[:tokens]


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


def rms_norm(x: Tensor, weight_F: Tensor, *, offset: float, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last axis. One dtype, rounded once."""
    assert LIBRARY is not None
    rows = x if x.is_contiguous() else x.contiguous()
    features = x.shape[-1]
    out = empty_tiles(x.numel() // features, features, x.dtype).view(x.shape)
    LIBRARY.mg_norm(
        rows.data_ptr(),
        features,
        rows.numel() // features,
        features,
        weight_F.data_ptr(),
        offset,
        eps,
        out.data_ptr(),
        TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out


def add_and_norm(x: Tensor, y: Tensor, weight_F: Tensor, *, offset: float, eps: float) -> Tensor:
    """`rms_norm` of y + x, which y becomes. All of one dtype and contiguous."""
    assert LIBRARY is not None and x.is_contiguous() and y.is_contiguous() and x.shape == y.shape
    features = y.shape[-1]
    out = empty_tiles(y.numel() // features, features, y.dtype).view(y.shape)
    LIBRARY.mg_add_and_norm(
        x.data_ptr(),
        y.data_ptr(),
        y.numel() // features,
        features,
        weight_F.data_ptr(),
        offset,
        eps,
        out.data_ptr(),
        TYPES[y.dtype],
        torch.get_num_threads(),
    )
    return out


def swiglu(a_TF: Tensor, b_TF: Tensor | None = None) -> Tensor:
    """silu(a) * b. Rows may lie apart; one dtype, rounded once. Without b, both stand side by side in a: (T, 2 F)."""
    assert LIBRARY is not None
    if b_TF is None:
        tokens, features = a_TF.shape[0], a_TF.shape[1] // 2
        b, b_row, last = a_TF.data_ptr() + features * a_TF.element_size(), a_TF.stride(0), a_TF.stride(1)
    else:
        tokens, features = a_TF.shape
        b, b_row, last = b_TF.data_ptr(), b_TF.stride(0), b_TF.stride(1)
    assert a_TF.stride(1) == last == 1
    out_TF = empty_tiles(tokens, features, a_TF.dtype)
    LIBRARY.mg_swiglu(
        a_TF.data_ptr(),
        a_TF.stride(0),
        b,
        b_row,
        tokens,
        features,
        out_TF.data_ptr(),
        TYPES[a_TF.dtype],
        torch.get_num_threads(),
    )
    return out_TF


def round_rows(x_TI: Tensor, *, least: float, room: int = 0) -> tuple[Tensor, Tensor]:
    """Each row in bytes (T, I), 128 for zero, and its scale (T), fp32: its largest size by 127, or `least`.

    Where there is to be room for more rows than T, those hold anything.
    """
    assert LIBRARY is not None
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    codes_TI = torch.empty(max(room, len(x_TI)), x_TI.shape[1], dtype=torch.uint8)
    scales_T = torch.empty(len(x_TI))
    LIBRARY.mg_round(
        x_TI.data_ptr(),
        x_TI.stride(0),
        *x_TI.shape,
        codes_TI.data_ptr(),
        scales_T.data_ptr(),
        least,
        TYPES[x_TI.dtype],
        torch.get_num_threads(),
    )
    return codes_TI, scales_T


def scale_rows(y_TO: Tensor, scales_T: Tensor, dtype: torch.dtype) -> Tensor:
    """y, in fp32, times each row's scale, rounded once."""
    assert LIBRARY is not None and y_TO.is_contiguous()
    out_TO = y_TO if dtype == torch.float32 else torch.empty(y_TO.shape, dtype=dtype)
    LIBRARY.mg_scale(
        y_TO.data_ptr(), scales_T.data_ptr(), *y_TO.shape, out_TO.data_ptr(), TYPES[dtype], torch.get_num_threads()
    )
    return out_TO


def rotate_and_store(
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    places_T: Tensor,
    keys_KLD: Tensor,
    values_KLD: Tensor,
) -> None:
    """Rotate the queries in place, and the keys on their way to the rows `places_T` of the cache, where values go, too.

    H query heads, K KV heads, R <= D rotated features in halves, L rows of the cache. One dtype.
    """
    assert LIBRARY is not None
    assert keys_KLD.is_contiguous() and values_KLD.is_contiguous() and cos_TR.is_contiguous() and sin_TR.is_contiguous()
    tokens, heads, dim = query_THD.shape
    for part in (query_THD, key_TKD, value_TKD):
        assert part.stride(2) == 1 and part.stride(1) == dim
    LIBRARY.mg_rotate_and_store(
        query_THD.data_ptr(),
        query_THD.stride(0),
        key_TKD.data_ptr(),
        key_TKD.stride(0),
        value_TKD.data_ptr(),
        value_TKD.stride(0),
        tokens,
        heads,
        key_TKD.shape[1],
        dim,
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        cos_TR.shape[1],
        places_T.data_ptr(),
        keys_KLD.data_ptr(),
        values_KLD.data_ptr(),
        keys_KLD.shape[1],
        TYPES[query_THD.dtype],
        torch.get_num_threads(),
    )


def begin_attention(
    made_TO: Tensor,
    bias_O: Tensor | None,
    cos_TR: Tensor,
    sin_TR: Tensor,
    places_T: Tensor,
    keys_KLD: Tensor,
    values_KLD: Tensor,
    blocks_BN: Tensor | None,
    lengths_B: Tensor | None,
    *,
    norms_2: npt.NDArray[np.void],
    block_size: int,
    window: int | None,
    scale: float,
) -> Tensor:
    """Bias, norms, `rotate_and_store` and, for the first B tokens, `attend`, from one product on: (T, H * D).

    `made_TO` has queries, keys and values side by side, O = (H + 2 K) D, and becomes what is attended with. `norms_2`
    are HEAD_NORM, of each head of the queries and of the keys. Of what is returned the first B rows are written. None
    decodes where `blocks_BN` is None. Raises: MemoryError.
    """
    assert LIBRARY is not None and made_TO.is_contiguous() and keys_KLD.is_contiguous() and values_KLD.is_contiguous()
    assert cos_TR.is_contiguous() and sin_TR.is_contiguous()
    tokens, outputs = made_TO.shape
    kv_heads, rows, dim = keys_KLD.shape
    heads = outputs // dim - 2 * kv_heads
    out_TQ = empty_tiles(tokens, heads * dim, made_TO.dtype)
    failed = LIBRARY.mg_begin_attention(
        made_TO.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        norms_2.ctypes.data,
        tokens,
        heads,
        kv_heads,
        dim,
        cos_TR.data_ptr(),
        sin_TR.data_ptr(),
        cos_TR.shape[1],
        places_T.data_ptr(),
        keys_KLD.data_ptr(),
        values_KLD.data_ptr(),
        rows,
        TYPES[made_TO.dtype],
        0 if blocks_BN is None else len(blocks_BN),
        None if blocks_BN is None else blocks_BN.data_ptr(),
        0 if blocks_BN is None else blocks_BN.shape[1],
        None if lengths_B is None else lengths_B.data_ptr(),
        block_size,
        window or 0,
        scale,
        out_TQ.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the scores of an attention")
    return out_TQ


def has_panels() -> bool:
    """Whether this processor's vectors make the products of `multiply_wide` fast."""
    return LIBRARY is not None and bool(LIBRARY.mg_has_panels())


def panel(weight_OI: Tensor) -> Tensor:
    """A weight in bf16 or int8 in the order in which `multiply_wide` reads it: it follows from the vectors' length."""
    assert LIBRARY is not None and weight_OI.dtype in (torch.bfloat16, torch.int8)
    weight_OI = weight_OI.contiguous()
    panels = pages.take(LIBRARY.mg_panels_size(*weight_OI.shape), weight_OI.dtype)
    size, threads = weight_OI.element_size(), torch.get_num_threads()
    LIBRARY.mg_panel(weight_OI.data_ptr(), *weight_OI.shape, panels.data_ptr(), size, threads)
    return panels


def unpanel(panels: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight (O, I) of `panel` again."""
    assert LIBRARY is not None
    weight_OI = torch.empty(outputs, inputs, dtype=panels.dtype)
    size, threads = panels.element_size(), torch.get_num_threads()
    LIBRARY.mg_unpanel(panels.data_ptr(), outputs, inputs, weight_OI.data_ptr(), size, threads)
    return weight_OI


def multiply_wide(x_TI: Tensor, panels: Tensor, outputs: int, scales_O: Tensor | None = None) -> Tensor:
    """(T, O): the product in fp32 with a weight of `panel`, each output times its scale. Raises: MemoryError."""
    assert LIBRARY is not None and x_TI.dtype == torch.float32
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    tokens, inputs = x_TI.shape
    y_TO = torch.empty(tokens, outputs)
    failed = LIBRARY.mg_multiply_panels(
        x_TI.data_ptr(),
        x_TI.stride(0),
        tokens,
        panels.data_ptr(),
        panels.element_size(),
        None if scales_O is None else scales_O.data_ptr(),
        inputs,
        outputs,
        y_TO.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the panels of a weight")
    return y_TO


def has_tiles() -> bool:
    """Whether this processor has a matrix unit (AMX) that may be used."""
    return LIBRARY is not None and bool(LIBRARY.mg_has_tiles())


def fits_tiles(inputs: int, dtype: torch.dtype) -> bool:
    """Whether a weight of so many inputs, in bf16 or int8, can be held in tiles."""
    return inputs * dtype.itemsize % DEEP == 0


def tile(weight_OI: Tensor) -> Tensor:
    """A weight in bf16 or int8 that `fits_tiles`, in the order in which `multiply` or `multiply_bytes` reads it."""
    assert LIBRARY is not None and fits_tiles(weight_OI.shape[1], weight_OI.dtype)
    weight_OI = weight_OI.contiguous()
    packed = pages.take(LIBRARY.mg_tiled_size(*weight_OI.shape), weight_OI.dtype)
    size = weight_OI.element_size()
    LIBRARY.mg_tile(weight_OI.data_ptr(), *weight_OI.shape, size, packed.data_ptr(), torch.get_num_threads())
    return packed


def code(weight_OI: Tensor) -> Tensor | None:
    """A weight in bf16 in twelve bits a number, in bytes, of which `untile` gives every bit back; `multiply` reads it.

    None where too many of its numbers have an exponent that is not among the weight's 16 most frequent.
    """
    assert LIBRARY is not None and weight_OI.dtype == torch.bfloat16 and fits_tiles(weight_OI.shape[1], torch.bfloat16)
    weight_OI, threads = weight_OI.contiguous(), torch.get_num_threads()
    counts_256 = torch.empty(256, dtype=torch.long)
    LIBRARY.mg_count_exponents(weight_OI.data_ptr(), weight_OI.numel(), counts_256.data_ptr(), threads)
    frequent = counts_256.topk(EXPONENTS)
    odd = weight_OI.numel() - int(frequent.values.sum())
    if odd > MOST_ODD * weight_OI.numel():
        return None
    exponents = frequent.indices.to(torch.uint8)
    coded = pages.take(LIBRARY.mg_coded_size(*weight_OI.shape, odd), torch.uint8)
    LIBRARY.mg_code(weight_OI.data_ptr(), *weight_OI.shape, exponents.data_ptr(), coded.data_ptr(), threads)
    return coded


def is_coded(packed: Tensor) -> bool:
    """Whether it is of `code` rather than of `tile`."""
    return packed.dtype == torch.uint8


def untile(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight (O, I) of `tile` or `code` again. Raises: MemoryError."""
    assert LIBRARY is not None
    if is_coded(packed):
        weight_OI = torch.empty(outputs, inputs, dtype=torch.bfloat16)
        if LIBRARY.mg_uncode(packed.data_ptr(), outputs, inputs, weight_OI.data_ptr(), torch.get_num_threads()):
            raise MemoryError("no memory for the tiles of a weight")
        return weight_OI
    weight_OI = torch.empty(outputs, inputs, dtype=packed.dtype)
    size = packed.element_size()
    LIBRARY.mg_untile(packed.data_ptr(), outputs, inputs, size, weight_OI.data_ptr(), torch.get_num_threads())
    return weight_OI


def multiply(x_TI: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """(T, O): the product with a weight of `tile` or `code`, in bf16, rounded once. Raises: MemoryError."""
    assert LIBRARY is not None and x_TI.dtype == torch.bfloat16
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    tokens, inputs = x_TI.shape
    y_TO = torch.empty(tokens, outputs, dtype=torch.bfloat16)
    failed = LIBRARY.mg_multiply(
        x_TI.data_ptr(),
        x_TI.stride(0),
        tokens,
        packed.data_ptr(),
        is_coded(packed),
        inputs,
        outputs,
        y_TO.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the tiles of a weight")
    return y_TO


def multiply_bytes(
    codes_TI: Tensor, scales_T: Tensor, packed: Tensor, scales_O: Tensor, sums_O: Tensor, dtype: torch.dtype
) -> Tensor:
    """(T, O), in `dtype`, from what `round_rows` gives, and an int8 weight of `tile` with a scale per output.

    `sums_O`, in int32, are 128 times the sums of the outputs' codes: what zero's code adds to each.
    """
    assert LIBRARY is not None and codes_TI.is_contiguous()
    tokens, inputs = codes_TI.shape
    y_TO = torch.empty(tokens, len(scales_O), dtype=dtype)
    LIBRARY.mg_multiply_bytes(
        codes_TI.data_ptr(),
        scales_T.data_ptr(),
        tokens,
        packed.data_ptr(),
        scales_O.data_ptr(),
        sums_O.data_ptr(),
        inputs,
        len(scales_O),
        y_TO.data_ptr(),
        TYPES[dtype],
        torch.get_num_threads(),
    )
    return y_TO


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
