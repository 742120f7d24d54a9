"""Install, test, upgrade, roll back, uninstall: with both Helms, against the API server of this suite."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chart import apiserver, tools
from tests.chart.apiserver import Cluster
from tests.chart.rendering import CHART, NAMESPACE, HelmRefused, run

REGISTRY, SERVER = "r-multigraft-registry", "r-multigraft-server"
Helm = Callable[..., str]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """An empty cluster, which Helm and kubectl of this test talk to."""
    with apiserver.cluster() as (state, url):
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
            "users": [{"name": "u", "user": {}}],
            "current-context": "c",
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME", "HOME"):
            monkeypatch.setenv(name, str(tmp_path / name))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield state


@pytest.fixture
def release(helm: Path, cluster: Cluster) -> Helm:
    """`release("upgrade", "r", ...)`: one Helm command in the namespace of the tests."""

    def command(*words: str | Path) -> str:
        chart = [CHART] if words[0] in ("install", "upgrade") else []
        return run(helm, *words, *chart, "--namespace", NAMESPACE, env=dict(os.environ))

    return command


def test_a_release_lives_from_install_to_uninstall(release: Helm, cluster: Cluster, helm3: Path) -> None:
    notes = release("install", "r", "--wait", "--timeout", "30s")
    installed = cluster.names()
    assert {f"Deployment/{REGISTRY}", f"Deployment/{SERVER}", f"PersistentVolumeClaim/{REGISTRY}"} <= installed
    keys, templates = _keys(cluster), _templates(cluster)
    assert all(len(base64.b64decode(key)) == 40 for key in keys) and len(set(keys)) == 4

    assert release("test", "r", "--timeout", "30s").count("Phase:          Succeeded") == 2
    assert cluster.names() == installed, "the test Pods are gone when they have succeeded"

    release("upgrade", "r", "--set", "server.options.maxRank=32", "--wait", "--timeout", "30s")
    changed = _templates(cluster)
    assert _keys(cluster) == keys, "an upgrade keeps the keys"
    assert changed[REGISTRY] == templates[REGISTRY], "the registry does not restart for the servers' options"
    assert _checksum(changed[SERVER]) != _checksum(templates[SERVER])

    release("rollback", "r", "1", "--wait", "--timeout", "30s")
    assert _templates(cluster) == templates
    assert _keys(cluster) == keys

    release("uninstall", "r", "--wait", "--timeout", "30s")
    assert cluster.names() == {f"PersistentVolumeClaim/{REGISTRY}"}, "every adapter is kept"
    release("install", "r", "--wait", "--timeout", "30s")
    assert cluster.names() == installed
    assert notes.startswith("NAME: r")


def test_the_first_command_of_the_notes_gives_the_key(release: Helm, cluster: Cluster, tmp_path: Path) -> None:
    notes = release("install", "r")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").symlink_to(tools.kubectl())
    [command] = re.findall(r"HUB_TOKEN=\$\((.*)\)$", notes, re.MULTILINE)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command], env={**os.environ, "PATH": path}, capture_output=True, timeout=60, check=True
    )
    secret = cluster.find("Secret", REGISTRY)
    assert secret is not None
    assert done.stdout == base64.b64decode(secret["data"]["admin-key"])


def test_an_install_that_lacks_its_secret_does_not_become_ready(release: Helm, cluster: Cluster) -> None:
    with pytest.raises(HelmRefused):
        release("install", "r", "--set", "server.existingSecret=nobody-made-it", "--wait", "--timeout", "2s")
    registry, server = cluster.find("Deployment", REGISTRY), cluster.find("Deployment", SERVER)
    assert registry is not None and registry["status"]["availableReplicas"] == 1
    assert server is not None and server["status"]["availableReplicas"] == 0


def test_a_test_that_cannot_run_fails(release: Helm, cluster: Cluster) -> None:
    release("install", "r")
    with cluster.changed:
        gone = [key for key in cluster.objects if key[1] == "secrets" and key[3] == REGISTRY]
        del cluster.objects[gone[0]]
    with pytest.raises(HelmRefused):
        release("test", "r", "--timeout", "2s")


def test_a_pod_that_is_not_restricted_is_turned_away(release: Helm, cluster: Cluster) -> None:
    release("install", "r")
    deployment = cluster.find("Deployment", SERVER)
    assert deployment is not None
    deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    place = apiserver.Place("apps/v1", "deployments", NAMESPACE, SERVER, "")
    with pytest.raises(apiserver.Refused, match="restricted"):
        cluster.update(place, deployment)


def test_halves_come_and_go_by_upgrade(release: Helm, cluster: Cluster) -> None:
    release("install", "r", "--set", "server.enabled=false")
    assert cluster.find("Deployment", SERVER) is None
    release("upgrade", "r", "--set", "server.autoscaling.enabled=true,monitoring.serviceMonitor.enabled=true")
    assert {f"HorizontalPodAutoscaler/{SERVER}", f"ServiceMonitor/{SERVER}"} <= cluster.names()
    release("upgrade", "r", "--set", "registry.enabled=false,server.hub.url=http://hub.example.com")
    assert cluster.find("Deployment", REGISTRY) is None
    assert cluster.find("PersistentVolumeClaim", REGISTRY) is not None
    deployment = cluster.find("Deployment", SERVER)
    assert deployment is not None
    env = [item["name"] for item in deployment["spec"]["template"]["spec"]["containers"][0]["env"]]
    assert "HUB_TOKEN" not in env, "the key of one registry is not sent to another"


def test_the_commands_of_the_docs_run(helm4: Path, cluster: Cluster, tmp_path: Path) -> None:
    """In their order, but for the removal, which comes last here."""
    text = (CHART.parents[1] / "docs" / "deploy.md").read_text().replace("\\\n", " ")
    commands = [shlex.split(line) for line in re.findall(r"^helm (.*)$", text, re.MULTILINE)]
    assert {words[0] for words in commands} == {"install", "test", "upgrade", "rollback", "uninstall"}
    (tmp_path / "charts").symlink_to(CHART.parent)
    (tmp_path / "mine.yaml").write_text("server: {replicas: 2}\n")
    for words in sorted(commands, key=lambda words: words[0] == "uninstall"):
        assert words[words.index("-n") + 1] == NAMESPACE
        run(helm4, *words, env=dict(os.environ), cwd=tmp_path)
    assert cluster.names() == {"PersistentVolumeClaim/mg-multigraft-registry"}


def _keys(cluster: Cluster) -> list[str]:
    found = [cluster.find("Secret", name) for name in (REGISTRY, SERVER)]
    return [value for secret in found if secret is not None for _, value in sorted(secret["data"].items())]


def _templates(cluster: Cluster) -> dict[str, Any]:
    found = [cluster.find("Deployment", name) for name in (REGISTRY, SERVER)]
    return {item["metadata"]["name"]: item["spec"]["template"] for item in found if item is not None}


def _checksum(template: Any) -> str:
    return str(template["metadata"]["annotations"]["checksum/config"])
