"""The values: what the schema and the chart refuse, and that file, schema, comments and program agree."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tests.chart.rendering import CHART, HelmRefused, rendered, template

SCHEMA: Mapping[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALUES = (CHART / "values.yaml").read_text()

REFUSED = (
    ("a name nobody knows", ["server.replica=2"], "replica"),
    ("a name nobody knows, deep", ["server.options.maxRnk=64"], "maxRnk"),
    ("a name nobody knows, in a list", ["server.tolerations[0].kye=gpu"], "kye"),
    ("a word for a number", ["server.replicas=two"], "replicas"),
    ("a number as a text", ["server.options.kvBytes=1Gi"], "kvBytes"),
    ("a share without a weight", ["server.options.share[0]=team/*"], "share"),
    ("a word that is no choice", ["registry.image.pullPolicy=Sometimes"], "pullPolicy"),
    ("a truth value as a word", ["networkPolicy.enabled=yes please"], "enabled"),
    ("the latest image", ["server.image.tag=latest"], "tag"),
    ("half a digest", ["server.image.digest=sha256:abc"], "digest"),
    ("a URL with a password", ["server.hub.url=https://me:secret@hub"], "url"),
    ("no URL", ["server.hub.url=hub.example.com"], "url"),
    ("a path that climbs out of the name", ["registry.existingSecret=../other"], "existingSecret"),
    ("two GPUs", ["server.gpu.count=2"], "count"),
    ("a size without a number", ["registry.persistence.size=large"], "size"),
    ("no memory limit", ["server.resources.limits.memory=null"], "limits"),
    ("a key for a variable with a dash", ["server.env.NO-GO=1"], "NO-GO"),
    ("a budget of nothing", ["server.maxUnavailable=0"], "maxUnavailable"),
    ("nothing at all", ["server.enabled=false", "registry.enabled=false"], "nothing would be installed"),
    ("servers without a registry", ["registry.enabled=false"], "server.hub.url must name a registry"),
    (
        "more at least than at most",
        ["server.autoscaling.enabled=true", "server.autoscaling.minReplicas=9"],
        "above maxReplicas 8",
    ),
    (
        "an autoscaler that looks at nothing",
        ["server.autoscaling.enabled=true", "server.autoscaling.cpuPercent=0"],
        "cpuPercent or podMetric",
    ),
    ("an upgrade that cannot proceed", ["server.rollout.maxSurge=0"], "no upgrade could proceed"),
    (
        "two servers on a volume for one",
        ["server.bases.enabled=true", "server.bases.accessMode=ReadWriteOnce"],
        "ReadWriteOnce allows one server",
    ),
    ("graphs without a GPU", ["server.options.graphs=true"], "server.options.graphs needs a GPU"),
    ("an Ingress without a host", ["server.ingress.enabled=true"], "server.ingress.host is needed"),
)


@pytest.mark.parametrize(("values", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_mistake_is_refused_by_its_name(values: list[str], said: str, helm: Path) -> None:
    with pytest.raises(HelmRefused, match=re.escape(said)):
        template(helm, *(word for value in values for word in ("--set", value)))


def test_every_object_of_the_schema_is_closed() -> None:
    assert [path for path, node in _nodes(SCHEMA) if "properties" in node or node.get("type") == "object"]
    for path, node in _nodes(SCHEMA):
        if "properties" in node or node.get("type") == "object":
            assert node.get("additionalProperties") is False, path


def test_every_value_has_a_comment() -> None:
    lines = VALUES.splitlines()
    assert len(lines) < 300
    for number, line in enumerate(lines):
        value = re.match(r" *[A-Za-z]+: *\S|^ *[A-Za-z]+:$", line)
        if value and line.split("#")[0].strip() and not _opens_a_group(lines, number):
            assert lines[number - 1].lstrip().startswith("#"), line


def test_schema_and_values_name_the_same_things() -> None:
    """But for the options, of which the values name the few that most people set."""
    assert set(_leaves(yaml.safe_load(VALUES))) == {
        path for path in _properties(SCHEMA) if ".options." not in path and path != "global"
    } | {path for path in _leaves(yaml.safe_load(VALUES)) if ".options." in path}


@pytest.mark.parametrize("half", ["registry", "server"])
def test_the_chart_takes_every_option_of_the_program(half: str) -> None:
    from hub.cli import registry
    from server.cli import serve

    app = typer.Typer(add_completion=False)
    if half == "registry":
        app.command()(registry)
    else:
        app.command()(serve)
    flags = {parameter.name for parameter in typer.main.get_command(app).params}
    ours = SCHEMA["properties"][half]["properties"]["options"]["properties"]
    assert {_snake(name) for name in ours} == flags - {"help", "host", "port", "disk_bytes"}


def test_options_become_environment_variables(helm4: Path) -> None:
    given = {
        "maxModelLen": 4096,
        "prefixCache": False,
        "maxWeight": 1.5,
        "kvBytes": 1 << 32,
        "allow": ["team/*", "tone"],
    }
    text = template(helm4, "--set-json", f"server.options={json.dumps(given)}")
    config = rendered(text).find("ConfigMap", "r-multigraft-server")
    assert config is not None
    assert {name: value for name, value in config["data"].items() if name.startswith("MULTIGRAFT_SERVE_")} == {
        "MULTIGRAFT_SERVE_ADAPTER_BYTES": "536870912",
        "MULTIGRAFT_SERVE_ALLOW": "team/* tone",
        "MULTIGRAFT_SERVE_BASE": "seedling",
        "MULTIGRAFT_SERVE_DEFAULT_ALIAS": "latest",
        "MULTIGRAFT_SERVE_DEVICE": "cpu",
        "MULTIGRAFT_SERVE_DISK_BYTES": "9663676410",
        "MULTIGRAFT_SERVE_DRAIN_TIMEOUT": "60",
        "MULTIGRAFT_SERVE_KV_BYTES": "4294967296",
        "MULTIGRAFT_SERVE_MAX_MODEL_LEN": "4096",
        "MULTIGRAFT_SERVE_MAX_RANK": "64",
        "MULTIGRAFT_SERVE_MAX_WEIGHT": "1.5",
        "MULTIGRAFT_SERVE_PREFIX_CACHE": "false",
    }


def test_the_chart_has_the_version_of_the_program() -> None:
    from importlib.metadata import version

    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == version("multigraft")


def test_a_kubernetes_that_is_too_old_is_refused(helm: Path) -> None:
    assert template(helm, "--kube-version", "1.28.0-gke.100")
    with pytest.raises(HelmRefused, match="kubeVersion"):
        template(helm, "--kube-version", "1.27.9")


def test_it_can_be_a_part_of_another_chart(helm: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "charts").mkdir(parents=True)
    (parent / "Chart.yaml").write_text("apiVersion: v2\nname: parent\nversion: 1.0.0\n")
    (parent / "values.yaml").write_text("global: {zone: a}\nmultigraft:\n  server: {replicas: 2}\n")
    (parent / "charts" / "multigraft").symlink_to(CHART)
    found = rendered(template(helm, chart=parent))
    server = found.find("Deployment", "r-multigraft-server")
    assert server is not None and server["spec"]["replicas"] == 2


def _nodes(schema: Any, path: str = "$") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(schema, dict):
        if path.endswith(("properties", "patternProperties", "definitions")):
            pass  # its keys are names, not keywords
        else:
            yield path, schema
        for key, value in schema.items():
            yield from _nodes(value, f"{path}.{key}")
    elif isinstance(schema, list):
        for number, value in enumerate(schema):
            yield from _nodes(value, f"{path}[{number}]")


def _properties(schema: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The leaves that the schema knows; a map of free keys and a list are leaves."""
    node = _resolved(schema)
    if path.endswith("resources") or "properties" not in node:
        yield path
        return
    for name, inner in node["properties"].items():
        yield from _properties(inner, f"{path}.{name}".lstrip("."))


def _leaves(values: Any, path: str = "") -> Iterator[str]:
    free = path and "properties" not in _resolved(_at(path))
    if path.endswith("resources") or free or not isinstance(values, dict):
        yield path
        return
    for name, inner in values.items():
        yield from _leaves(inner, f"{path}.{name}".lstrip("."))


def _at(path: str) -> Mapping[str, Any]:
    node: Mapping[str, Any] = SCHEMA
    for name in path.split("."):
        node = _resolved(node)["properties"][name]
    return node


def _resolved(node: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = node.get("$ref")
    return SCHEMA["definitions"][reference.rpartition("/")[2]] if reference else node


def _opens_a_group(lines: list[str], number: int) -> bool:
    """`image:` with its values below, each of which has its own comment; or the inside of `resources`."""
    line = lines[number]
    deeper = number + 1 < len(lines) and lines[number + 1].startswith(" " * (len(line) - len(line.lstrip()) + 1))
    inside = re.match(r" *(requests|limits): \{", line) is not None
    return inside or (line.endswith(":") and deeper)


def _snake(name: str) -> str:
    return re.sub(r"([A-Z])", r"_\1", name).lower()
