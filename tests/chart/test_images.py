"""The images as far as text can tell: pinned, in stages, nobody is root, and what they copy and install is there.

No container engine runs here; docs/deploy.md says what was done instead.
"""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.chart.rendering import CHART

ROOT = CHART.parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGES = {"hub/Dockerfile": "registry", "server/Dockerfile": "serve", "trainer/Dockerfile": "train"}
PINS = dict(line.split("==") for line in (CHART.parent / "images" / "constraints.txt").read_text().split())


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest) -> str:
    return (ROOT / request.param).read_text()


def test_it_is_built_in_stages_from_a_pinned_python(image: str) -> None:
    assert re.findall(r"^FROM (.*)$", image, re.MULTILINE) == ["python:${PYTHON} AS build", "python:${PYTHON}"]
    [python] = re.findall(r"^ARG PYTHON=(.*)$", image, re.MULTILINE)
    assert re.fullmatch(r"3\.11\.\d+-slim-[a-z]+", python)


def test_nobody_is_root_and_nothing_is_written_to_the_root(image: str) -> None:
    last = image.rpartition("FROM ")[2]
    assert "USER 10001:10001" in last and "--uid 10001" in last
    assert 'ENTRYPOINT ["hub"]' in last and "HOME=/tmp" in last and "PYTHONDONTWRITEBYTECODE=1" in last
    assert last.index("RUN ") < last.index("USER "), "no step after USER needs root"


def test_the_chart_runs_what_the_images_are(texts: dict[str, str]) -> None:
    assert "runAsUser: 10001" in texts["production"]
    assert "MULTIGRAFT_HOME: /var/lib/multigraft" in texts["production"]
    for path in IMAGES:
        assert "MULTIGRAFT_HOME=/var/lib/multigraft" in (ROOT / path).read_text()


@pytest.mark.parametrize(("path", "extra"), IMAGES.items())
def test_every_requirement_is_pinned_within_its_range(path: str, extra: str) -> None:
    assert f"'.[{extra}]'" in (ROOT / path).read_text()
    for wanted in _requirements(extra):
        name = canonicalize_name(wanted.name)
        assert name in PINS, f"{name} is not pinned: python charts/images/pin.py > charts/images/constraints.txt"
        assert wanted.specifier.contains(PINS[name]), f"{name}=={PINS[name]} is not {wanted.specifier}"


def test_the_build_context_has_the_packages_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    let_in = {line[1:] for line in lines if line.startswith("!")}
    packages = {name.rstrip("*") for name in _found_packages()}
    assert let_in == packages | {"pyproject.toml", "README.md", "LICENSE", "charts/images/constraints.txt"}
    assert all((ROOT / name).exists() for name in let_in)
    assert any(fnmatch("x", line) for line in lines), "all else stays out"


def _requirements(extra: str) -> list[Requirement]:
    found = [Requirement(line) for line in PROJECT["dependencies"]]
    for line in PROJECT["optional-dependencies"][extra]:
        wanted = Requirement(line)
        if wanted.name == "multigraft":
            found += [inner for other in wanted.extras for inner in _requirements(other)]
        else:
            found.append(wanted)
    return found


def _found_packages() -> list[str]:
    setuptools = tomllib.loads(Path(ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found: list[str] = setuptools["packages"]["find"]["include"]
    return found
