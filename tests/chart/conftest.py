"""The programs, fetched once, and every situation rendered once. In CI nothing here may be skipped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chart import tools
from tests.chart.rendering import SITUATIONS, template


def _needed(fetch: Callable[[], Path]) -> Path:
    try:
        return fetch()
    except tools.ToolsMissing as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def helm3() -> Path:
    return _needed(lambda: tools.helm(tools.OLDER))


@pytest.fixture(scope="session")
def helm4() -> Path:
    return _needed(lambda: tools.helm(tools.NEWER))


@pytest.fixture(scope="session", params=[tools.OLDER, tools.NEWER], ids=lambda layer: layer.folder)
def helm(request: pytest.FixtureRequest) -> Path:
    """Either of the two."""
    return _needed(lambda: tools.helm(request.param))


@pytest.fixture(scope="session")
def promtool() -> Path:
    return _needed(lambda: tools.prometheus("promtool"))


@pytest.fixture(scope="session")
def prometheus() -> Path:
    return _needed(tools.prometheus)


@pytest.fixture(scope="session")
def texts(helm4: Path) -> dict[str, str]:
    """Situation -> what Helm 4 renders."""
    return {situation: template(helm4, situation=situation) for situation in SITUATIONS}
