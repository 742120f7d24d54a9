"""Golden rows: a version takes traffic only when it answers as it did when it was made.

The trainer stores a few prompts with the logits that must follow, computed in fp32 on the base as it was trained over:
whole, or in few bits, which golden.json then tells. The distance is the root mean square of the difference over the
standard deviation of what is expected: a wrong scaling, a swapped tensor or another base moves it to the order of one,
rounding stays far below the limits here.
"""

from __future__ import annotations

import torch
from torch import Tensor

# fp32 differs between machines in the last bits only; half precision by what its mantissa rounds; a quantized base by
# its own error (NF4: 9 % of the weights, int8: 1 %), on one side or on both.
LIMITS = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.15}
QUANTIZED_LIMIT = 0.6


def distance(expected_V: Tensor, got_V: Tensor) -> float:
    """0 for equal logits; not a number when anything is not finite."""
    if expected_V.shape != got_V.shape:
        return float("inf")
    expected_V, got_V = expected_V.double(), got_V.double()
    return float(((expected_V - got_V).square().mean().sqrt() / expected_V.std()).item())


def limit(dtype: torch.dtype, *, quantized: bool) -> float:
    return QUANTIZED_LIMIT if quantized else LIMITS[dtype]
