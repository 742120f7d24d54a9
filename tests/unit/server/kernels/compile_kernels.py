"""Compiles every GPU kernel down to machine code, for which no GPU is needed: prints a line for each.

Run by `test_kernels_compile` in a process of its own, since Triton's interpreter, once chosen, stays.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from server.kernels.gpu import lowrank

OPERANDS = {"bf16": tl.bfloat16, "fp32": tl.float32}
TARGETS = (("bf16", 80), ("bf16", 90), ("fp32", 90))  # A100, H100
LOWRANK = {"ROWS": 16, "TILE": 16, "BLOCK": 128, "PARTS": 4}
KERNELS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (lowrank._shrink, LOWRANK),
    (lowrank._expand, {**LOWRANK, "MULTIPLE": 16}),
)
TYPES = {
    **dict.fromkeys(("tokens_ptr", "groups_ptr", "units_ptr", "ranks_ptr", "columns_ptr"), "*i32"),
    **dict.fromkeys(("a_ptr", "b_ptr", "bias_ptr", "scale_ptr"), "*i64"),
    **dict.fromkeys(("gates_ptr", "middle_ptr"), "*fp32"),
}


def kind(name: str, element: str) -> str:
    """The type of an argument; tensors that are not named have the network's dtype."""
    return TYPES.get(name) or (f"*{element}" if name.endswith("_ptr") else "i32")


def main() -> None:
    for kernel, constants in KERNELS:
        for element, architecture in TARGETS:
            fixed = {**constants, "OPERAND": OPERANDS[element]}
            signature = {name: "constexpr" if name in fixed else kind(name, element) for name in kernel.arg_names}
            places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
            made = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", architecture, 32))
            cores = "tensor cores" if "mma" in made.asm["ptx"] else "no tensor cores"
            print(kernel.__name__, element, f"sm_{architecture}", len(made.asm["cubin"]), cores)  # noqa: T201


if __name__ == "__main__":
    main()
