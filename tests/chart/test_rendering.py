"""Every situation, on both Helms, against three versions of Kubernetes and our own checks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.chart import checks, schemas
from tests.chart.faults import FAULTS, Fault
from tests.chart.rendering import CHART, OUTSIDE, SITUATIONS, VALUES, objects, rendered, run, template

OLDEST, MIDDLE, NEWEST = "1.28", "1.32", "1.37"
KEYS = re.compile(r"^  (admin-key|read-key|api-key): (\S+)$", re.MULTILINE)


def test_there_are_eight_situations() -> None:
    assert len(SITUATIONS) == 8
    assert set(OUTSIDE) == set(SITUATIONS)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_both_helms_render_the_same_bytes(situation: str, helm3: Path, texts: dict[str, str]) -> None:
    assert template(helm3, situation=situation) == texts[situation]


def test_without_values_both_render_the_same_but_for_the_keys_drawn(helm3: Path, helm4: Path) -> None:
    older, newer = template(helm3), template(helm4)
    assert KEYS.sub("", older) == KEYS.sub("", newer)
    drawn = [match[1] for text in (older, newer) for match in KEYS.findall(text)]
    assert len(drawn) == len(set(drawn)) == 8


def test_lint_has_nothing_to_say(helm: Path) -> None:
    for situation in SITUATIONS:
        assert "0 chart(s) failed" in run(helm, "lint", "--strict", CHART, "-f", VALUES / f"{situation}.yaml")
    assert "0 chart(s) failed" in run(helm, "lint", "--strict", CHART)


@pytest.mark.parametrize("version", [OLDEST, MIDDLE, NEWEST])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_kubernetes_knows_every_field(situation: str, version: str, texts: dict[str, str]) -> None:
    assert [found for item in objects(texts[situation]) for found in schemas.complaints(item, version)] == []


@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_check_passes(situation: str, texts: dict[str, str]) -> None:
    assert checks.run(rendered(texts[situation], situation)) == {}


def test_every_check_passes_without_values(helm4: Path) -> None:
    assert checks.run(rendered(template(helm4))) == {}


def test_the_newest_schemas_are_the_newest_there_are() -> None:
    from kubernetes_validate import latest_version

    assert latest_version().startswith(f"{NEWEST}.")


def test_an_unknown_field_is_found() -> None:
    item = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "dta": {}}
    assert list(schemas.complaints(item, OLDEST))


def test_a_field_of_later_versions_is_found() -> None:
    container = {"name": "x", "image": "x:1", "lifecycle": {"preStop": {"sleep": {"seconds": 5}}}}
    item = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
    assert list(schemas.complaints(item, OLDEST))
    assert not list(schemas.complaints(item, NEWEST))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_seeded_fault_is_caught_by_its_check_alone(fault: Fault, helm4: Path, tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    file = chart / fault.file
    text = file.read_text()
    assert fault.old in text, "the fault no longer fits the chart"
    file.write_text(text.replace(fault.old, fault.new))
    faulty = rendered(template(helm4, chart=chart, situation=fault.situation), fault.situation)
    found = checks.run(faulty)
    assert list(found) == [fault.caught_by], found
    for item in faulty.objects:
        assert not list(schemas.complaints(item, NEWEST)), "a schema finds this fault: no check is needed for it"


def test_fifteen_faults_and_a_fault_for_every_check() -> None:
    assert len(FAULTS) >= 15
    assert {fault.caught_by for fault in FAULTS} == set(checks.CHECKS)
