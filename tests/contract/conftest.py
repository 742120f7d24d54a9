"""Every implementation of the Hub protocol, each on an empty home, and adapters to push into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from hub.client import RemoteHub
from hub.contract import Hub
from hub.registry import LocalHub
from tests.registries import ADMIN_KEY, threaded
from tests.unit.hub.kinds import CASES, write
from tests.unit.hub.makers import write_base, write_ia3, write_lora, write_prompt

Folders = Mapping[str, Path]


@contextmanager
def local(home: Path) -> Iterator[Hub]:
    yield LocalHub(home)


@contextmanager
def remote(home: Path) -> Iterator[Hub]:
    with threaded(LocalHub(home)) as url:
        hub = RemoteHub(url, key=ADMIN_KEY)
        yield hub
        hub.close()


IMPLEMENTATIONS: Mapping[str, Callable[[Path], AbstractContextManager[Hub]]] = {"local": local, "remote": remote}


@pytest.fixture(params=IMPLEMENTATIONS)
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    with IMPLEMENTATIONS[request.param](tmp_path / "home") as implementation:
        yield implementation


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Good adapters of every kind, none of which a test changes."""
    root = tmp_path_factory.mktemp("adapters")
    base = write_base(root / "base")
    made = {f"lora-{seed}": write_lora(root / f"lora-{seed}", base, seed=seed) for seed in range(4)}
    made["ia3"] = write_ia3(root / "ia3", base)
    for kind, peft_type in {"prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING", "p-tuning": "P_TUNING"}.items():
        made[kind] = write_prompt(root / kind, base, kind=peft_type)
    return made | {name: write(root / name, case, base) for name, case in CASES.items()}
