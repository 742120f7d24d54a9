"""One base and one good adapter on it for every test here; each test may break its own copy."""

from pathlib import Path

import pytest

from tests.unit.hub.makers import write_base, write_lora


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_lora(tmp_path / "adapter", base)
