"""`helm template` as a function, and what the eight values files promise that the cluster has."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.chart.checks import Rendered

CHART = Path(__file__).parents[2] / "charts" / "multigraft"
VALUES = Path(__file__).parent / "values"
SITUATIONS = sorted(path.stem for path in VALUES.glob("*.yaml"))
NAMESPACE = "team"
HELM_TIMEOUT_S = 60

OUTSIDE: Mapping[str, Sequence[str]] = {
    "trial": ("Secret/registry-keys", "Secret/server-keys"),
    "production": (
        *("Secret/registry-keys", "Secret/server-keys", "Secret/pull"),
        *("Secret/hub-tls", "Secret/llm-tls"),
    ),
    "gpu": ("Secret/registry-keys", "Secret/server-keys", "Secret/hugging-face"),
    "autoscaled": ("Secret/registry-keys", "Secret/server-keys"),
    "registry-only": ("Secret/hub-keys", "PersistentVolumeClaim/hub-data"),
    "servers-only": ("Secret/server-keys", "Secret/hub-token"),
    "airgapped": ("Secret/registry-keys", "Secret/server-keys", "Secret/mirror", "PersistentVolumeClaim/bases"),
    "lab": ("Secret/mg-keys",),
}


class HelmRefused(Exception):
    """Helm ended with an error; the message is what it said."""


def run(helm: Path, *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """One Helm command; its stdout. Raises: HelmRefused."""
    done = subprocess.run(
        [helm, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=HELM_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise HelmRefused(done.stderr + done.stdout)
    return done.stdout


def template(helm: Path, *arguments: str | Path, chart: Path = CHART, situation: str = "") -> str:
    """The rendered text. Raises: HelmRefused."""
    values: list[str | Path] = ["-f", VALUES / f"{situation}.yaml"] if situation else []
    return run(helm, "template", "r", chart, "--namespace", NAMESPACE, *values, *arguments)


def objects(text: str) -> list[dict[str, Any]]:
    return [item for item in yaml.load_all(text, yaml.CSafeLoader) if item]


def rendered(text: str, situation: str = "") -> Rendered:
    promised = OUTSIDE.get(situation, ())
    return Rendered(
        objects(text), frozenset((kind, name) for kind, _, name in (item.partition("/") for item in promised))
    )
