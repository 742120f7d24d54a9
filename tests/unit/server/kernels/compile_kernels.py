"""Compiles every GPU kernel down to machine code, for which no GPU is needed: prints a line for each.

Run by `test_kernels_compile` in a process of its own, since Triton's interpreter, once chosen, stays.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.kernels.gpu import attention, lowrank

ATTENTION = {"ROWS": 16, "WIDE": 128, "SEGMENT": 512}
LOWRANK = {"ROWS": 16, "TILE": 16, "BLOCK": 128, "PARTS": 4}
PRODUCTS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (lowrank._shrink, LOWRANK),
    (lowrank._expand, {**LOWRANK, "MULTIPLE": 16}),
    (attention._attend, {**ATTENTION, "BLOCK": 64}),
)
# For an H100 with everything, for an A100 without what a layer may lack.
BUILDS: tuple[tuple[Any, str, int, dict[str, Any]], ...] = (
    *((kernel, "bf16", 90, {**fixed, "OPERAND": tl.bfloat16}) for kernel, fixed in PRODUCTS),
    *((kernel, "fp32", 80, {**fixed, "OPERAND": tl.float32}) for kernel, fixed in PRODUCTS[:2]),
    (attention._attend, "fp16", 80, {**ATTENTION, "BLOCK": 64, "OPERAND": tl.float16, "softcap": None}),
    (attention._combine, "bf16", 90, ATTENTION),
    (attention._combine, "fp16", 80, {**ATTENTION, "sinks_ptr": None}),
)
TYPES = {
    **dict.fromkeys(("tokens_ptr", "groups_ptr", "units_ptr", "ranks_ptr", "columns_ptr"), "*i32"),
    **dict.fromkeys(("a_ptr", "b_ptr", "bias_ptr", "excess_ptr"), "*i64"),
    **dict.fromkeys(("gates_ptr", "scalings_ptr", "middle_ptr", "sums_ptr", "scores_ptr"), "*fp32"),
    **dict.fromkeys(("blocks_ptr", "lengths_ptr"), "*i64"),
    **dict.fromkeys(("scale", "softcap"), "fp32"),
}


def kind(name: str, element: str) -> str:
    """The type of an argument; tensors that are not named have the network's dtype."""
    return TYPES.get(name) or (f"*{element}" if name.endswith("_ptr") else "i32")


def main() -> None:
    for kernel, element, architecture, fixed in BUILDS:
        signature = {name: "constexpr" if name in fixed else kind(name, element) for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
        made = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", architecture, 32))
        cores = "tensor cores" if "mma" in made.asm["ptx"] else "none"
        print(kernel.__name__, element, len(made.asm["cubin"]), cores)  # noqa: T201


if __name__ == "__main__":
    main()
