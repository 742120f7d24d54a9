"""The faults of `tests.mutants` still mean what they say: each has its place in the code, and tests to fail."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_fault_has_its_place_and_its_tests(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    compile(mutated(mutant, source), mutant.file, "exec")
    assert all((ROOT / tests[0]).exists() for tests in (mutant.law, mutant.oracle))


def test_every_primitive_has_a_fault() -> None:
    faulty = {mutant.file for mutant in MUTANTS}
    computing = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "server" / "primitives").glob("*.py")
        if "\ndef apply(" in path.read_text(encoding="utf-8")
    }
    assert computing and computing <= faulty
