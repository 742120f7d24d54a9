"""What the kernels' products are made of, for each dtype of the network."""

from __future__ import annotations

import torch
import triton.language as tl
from triton import knobs


def operand_of(dtype: torch.dtype) -> tl.dtype:
    """The interpreter multiplies the bits of bfloat16 as if they were integers, and is given wider numbers.

    The products are the same: both sum in fp32.
    """
    if dtype == torch.bfloat16:
        return tl.float32 if knobs.runtime.interpret else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32
