"""Faults put in on purpose: each must make a law and an oracle fail. Minutes long, so it is no part of the tests.

    python -m tests.mutants [NAME ...]

Every fault is one replacement in a copy of the project, in which the law's and the oracle's tests are then run. It is
caught when both fail, survives when either passes. Prints the rows of the table in docs/correctness.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
COPIED: Final = ("hub", "server", "trainer", "clients", "tests", "benchmarks", "pyproject.toml")
PASSED, FAILED = 0, 1  # what pytest exits with; anything else shows nothing of the fault
LIMIT_S: Final = 900

PRIMITIVE_LAWS: Final = ("tests/laws/test_primitive_laws.py",)
ROUTE_LAWS: Final = ("tests/laws/test_route_laws.py",)
KINDS: Final = ("tests/oracle/test_kinds_against_peft.py", "-k", "every_kind and llama")


@dataclass(frozen=True)
class Mutant:
    """`before` stands once in `file`. `law` and `oracle` are what pytest is given."""

    name: str
    fault: str
    file: str
    before: str
    after: str
    law: Sequence[str] = PRIMITIVE_LAWS
    oracle: Sequence[str] = KINDS


MUTANTS: Final = (
    Mutant(
        "lowrank", "a hundredth of every delta is lost", "server/primitives/lowrank.py",
        "torch.addmm(y_TO, middle_TP, operand.B_PO)", "torch.addmm(y_TO, middle_TP, operand.B_PO, alpha=0.99)",
    ),
    Mutant(
        "lowrank at an embedding", "the ids are read backwards", "server/primitives/lowrank.py",
        "operand.A_IP.index_select(0, ids_T)", "operand.A_IP.index_select(0, ids_T.flip(0))",
    ),
    Mutant("scale", "its sign", "server/primitives/scale.py", "x_TF * (1 + gates", "x_TF * (1 - gates"),
    Mutant(
        "rotate", "blocks are not transposed", "server/primitives/rotate.py",
        "value.excess_BSS.transpose(1, 2) for _, value", "value.excess_BSS for _, value",
    ),
    Mutant(
        "rotate's stride", "features are put back in another order", "server/primitives/rotate.py",
        "x_TBS.reshape(tokens, blocks // stride, stride, size).transpose(2, 3)",
        "x_TBS.reshape(tokens, blocks // stride, size, stride)",
    ),
    Mutant(
        "delta, dense", "its sign", "server/primitives/delta.py", "return x_nI @ D_OI.t()", "return -x_nI @ D_OI.t()",
    ),
    Mutant(
        "delta, sparse", "its sign", "server/primitives/delta.py",
        "(D_OI @ x_nI.to(D_OI.dtype).t()).t()", "-(D_OI @ x_nI.to(D_OI.dtype).t()).t()",
    ),
    Mutant(
        "delta at an embedding", "rows that it has not are the nearest", "server/primitives/delta.py",
        ".masked_fill(strange_n[:, None], 0)", "",
    ),
    Mutant("gain", "it reads the norm's output", "server/primitives/gain.py", "y, axis=axis) * n", "y, axis=axis) * y"),
    Mutant(
        "bias", "half of it", "server/primitives/bias.py",
        "operand.columns_N), operand.bias_NO)", "operand.columns_N), operand.bias_NO, alpha=0.5)",
    ),
    Mutant(
        "edit", "its constant is lost", "server/primitives/edit.py",
        "torch.addmm(group.d_P, inputs_TH", "torch.addmm(0 * group.d_P, inputs_TH",
        law=("tests/laws/test_edit_laws.py",),
    ),
    Mutant(
        "experts", "every pair gets the first expert's delta", "server/primitives/experts.py",
        "operand.of(expert)))", "operand.of(0)))",
        oracle=("tests/oracle/test_kinds_against_peft.py", "-k", "every_kind and mixtral"),
    ),
    Mutant(
        "prefix", "keys and values of several are swapped", "server/primitives/prefix.py",
        "joined[: len(self.keys)], joined[len(self.keys) :]", "joined[len(self.keys) :], joined[: len(self.keys)]",
        law=("tests/laws/test_prefix_laws.py",),
        oracle=("tests/oracle/test_virtual_tokens_and_reach.py", "-k", "llama"),
    ),
    Mutant(
        "route by arrow", "directions have a sign", "server/primitives/route.py",
        "(x_RI @ operand.prototypes_IE).abs()", "(x_RI @ operand.prototypes_IE)",
        law=ROUTE_LAWS, oracle=("tests/oracle/test_arrow.py", "-k", "llama"),
    ),
    Mutant(
        "route by gate", "the prompt is not read", "server/primitives/route.py",
        " + routed.told_LRC[layer]", "",
        law=ROUTE_LAWS, oracle=("tests/oracle/test_gate.py", "-k", "llama"),
    ),
    Mutant(
        "gates", "all weights are one", "server/primitives/gates.py",
        "table[row, column] += weight", "table[row, column] += 1",
        oracle=("tests/oracle/test_fusion.py", "-k", "llama"),
    ),
    Mutant(
        "gates of the head", "those of the first tokens", "server/primitives/gates.py",
        "self.gates_TK.index_select(0, rows_R)", "self.gates_TK[: len(rows_R)]",
    ),
    Mutant(
        "reach of a prompt's ends", "more than half of it", "server/policy/reach.py",
        "half = len(prompt) // 2", "half = len(prompt)",
        law=("tests/laws/test_reach_laws.py",),
    ),
    Mutant(
        "reach from a mark", "the first mark counts", "server/policy/reach.py",
        "range(len(prompt) - len(wanted), -1, -1)", "range(len(prompt) - len(wanted) + 1)",
        law=("tests/laws/test_reach_laws.py",),
    ),
)  # fmt: skip


def mutated(mutant: Mutant, source: str) -> str:
    assert source.count(mutant.before) == 1, (
        f"{mutant.name}: {mutant.before!r} stands {source.count(mutant.before)} times"
    )
    return source.replace(mutant.before, mutant.after)


def exit_code(tree: Path, tests: Sequence[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, timeout=LIMIT_S, check=False)
    return done.returncode


def verdict(code: int) -> str:
    return {PASSED: "SURVIVED", FAILED: "caught"}.get(code, f"broken: pytest exits with {code}")


def run(mutant: Mutant, tree: Path) -> bool:
    """Whether both caught it; prints its row."""
    path = tree / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(mutated(mutant, source), encoding="utf-8")
    try:
        found = [verdict(exit_code(tree, tests)) for tests in (mutant.law, mutant.oracle)]
    finally:
        path.write_text(source, encoding="utf-8")
    cells = [f"{word} by `{tests[0]}`" for word, tests in zip(found, (mutant.law, mutant.oracle), strict=True)]
    print(f"| {mutant.name} | {mutant.fault} | {' | '.join(cells)} |", flush=True)  # noqa: T201
    return found == ["caught", "caught"]


def main() -> int:
    wanted = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name in sys.argv[1:]]
    with tempfile.TemporaryDirectory(prefix="multigraft-mutants-") as room:
        tree = Path(room)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        whole = {tuple(tests) for mutant in wanted for tests in (mutant.law, mutant.oracle)}
        for tests in sorted(whole):
            assert exit_code(tree, tests) == PASSED, f"{' '.join(tests)} fails without any fault"
        caught = [run(mutant, tree) for mutant in wanted]
    return 0 if all(caught) else 1


if __name__ == "__main__":
    sys.exit(main())
