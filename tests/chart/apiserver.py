"""A small Kubernetes API server for Helm: what it discovers, writes, patches, watches and waits for, and no more.

Every object that is written is held against Kubernetes' own strict schemas, and every Pod, of a hook or of a
Deployment, against Pod Security "restricted". There is no kubelet: a Pod succeeds, and a Deployment becomes available,
if all that its spec names is there (Secrets with their keys, ConfigMaps, claims, the ServiceAccount); else it stays
pending. Server-side apply knows one manager; lists are replaced whole. Reads are not authorised.
"""

from __future__ import annotations

import base64
import copy
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.chart import checks, protobuf, schemas
from tests.chart.strategic import merge, strategic_merge

Json = dict[str, Any]
WATCH_S = 60.0
KINDS: Mapping[str, tuple[str, ...]] = {
    "v1": ("Secret", "ConfigMap", "Service", "ServiceAccount", "PersistentVolumeClaim", "Pod", "Namespace", "Event"),
    "apps/v1": ("Deployment", "ReplicaSet"),
    "networking.k8s.io/v1": ("Ingress", "NetworkPolicy"),
    "policy/v1": ("PodDisruptionBudget",),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "monitoring.coreos.com/v1": ("ServiceMonitor", "PrometheusRule"),
}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


def plural(kind: str) -> str:
    name = kind.lower()
    return f"{name[:-1]}ies" if name.endswith("y") else f"{name}es" if name.endswith("s") else f"{name}s"


RESOURCES = {(api, plural(kind)): kind for api, kinds in KINDS.items() for kind in kinds}


class Refused(Exception):
    """An answer that is an error: an HTTP status, Kubernetes' word for it, and what was wrong."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Place:
    """What a URL names: a collection, an object, or a part of one."""

    api: str
    resource: str
    namespace: str
    name: str
    part: str

    @property
    def kind(self) -> str:
        return RESOURCES[self.api, self.resource]


class Cluster:
    """The objects, and everything that has happened to them."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.objects: dict[tuple[str, str, str, str], Json] = {}
        self.changed = threading.Condition(threading.RLock())
        self.events: list[tuple[str, Json]] = []
        self._applied: dict[tuple[str, str, str, str], Json] = {}

    def find(self, kind: str, name: str, namespace: str = "team") -> Json | None:
        with self.changed:
            for (api, resource, space, found), item in self.objects.items():
                if RESOURCES[api, resource] == kind and (space, found) == (namespace, name):
                    return copy.deepcopy(item)
        return None

    def names(self) -> set[str]:
        """Kind/name of all that is there, but for Helm's own Secrets and what a controller made."""
        with self.changed:
            found = [(RESOURCES[key[0], key[1]], key[3]) for key in self.objects]
        return {f"{k}/{n}" for k, n in found if not n.startswith("sh.helm.release.") and k != "ReplicaSet"}

    def get(self, place: Place) -> Json:
        key = (place.api, place.resource, place.namespace, place.name)
        if key not in self.objects:
            raise Refused(404, "NotFound", f'{place.resource} "{place.name}" not found')
        return self.objects[key]

    def create(self, place: Place, item: Json) -> Json:
        with self.changed:
            key = (place.api, place.resource, place.namespace, item["metadata"]["name"])
            if key in self.objects:
                raise Refused(409, "AlreadyExists", f'{place.resource} "{key[3]}" already exists')
            self._applied[key] = copy.deepcopy(item)
            return self._write(key, place.kind, item, None)

    def patch(self, place: Place, body: bytes, how: str) -> Json:
        with self.changed:
            key = (place.api, place.resource, place.namespace, place.name)
            old = self.objects.get(key)
            if how == "application/apply-patch+yaml":
                wanted = yaml.load(body, yaml.CSafeLoader)
                new = _without(copy.deepcopy(old or {}), self._applied.get(key, {}), wanted)
                self._applied[key] = copy.deepcopy(wanted)
                return self._write(key, place.kind, merge(new, wanted), old)
            if old is None:
                raise Refused(404, "NotFound", f'{place.resource} "{place.name}" not found')
            change = json.loads(body)
            patched = strategic_merge if how == "application/strategic-merge-patch+json" else merge
            return self._write(key, place.kind, patched(copy.deepcopy(old), change), old)

    def update(self, place: Place, item: Json) -> Json:
        with self.changed:
            key = (place.api, place.resource, place.namespace, place.name)
            return self._write(key, place.kind, item, self.get(place))

    def delete(self, place: Place) -> Json:
        with self.changed:
            item = self.get(place)
            del self.objects[place.api, place.resource, place.namespace, place.name]
            self._tell("DELETED", item)
            return item

    def listed(self, place: Place, wanted: Callable[[Json], bool]) -> list[Json]:
        with self.changed:
            found = [item for key, item in self.objects.items() if key[:2] == (place.api, place.resource)]
        return [i for i in found if i["metadata"].get("namespace", "") in (place.namespace, "") and wanted(i)]

    def news(self, at: int) -> list[tuple[str, Json]]:
        """What happened after event number `at`, as soon as there is something; nothing after a long while."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.events) > at, timeout=WATCH_S)
            return self.events[at:]

    def _write(self, key: tuple[str, str, str, str], kind: str, item: Json, old: Json | None) -> Json:
        item = {"apiVersion": key[0], "kind": kind, **item}
        metadata = item["metadata"]
        metadata |= {"name": key[3], "namespace": key[2], "uid": f"uid-{kind}-{key[3]}"}
        metadata.pop("managedFields", None)
        self._admit(item, old)
        before = (old or {}).get("metadata", {})
        changed = old is None or old.get("spec") != item.get("spec")
        metadata["generation"] = before.get("generation", 0) + (1 if changed else 0)
        metadata["creationTimestamp"] = before.get("creationTimestamp", "2026-01-01T00:00:00Z")
        self.objects[key] = item
        self._tell("ADDED" if old is None else "MODIFIED", item)
        if old is None or changed:
            self._reconcile(key, item)
        return item

    def _tell(self, event: str, item: Json) -> None:
        item["metadata"]["resourceVersion"] = str(len(self.events) + 1)
        self.events.append((event, copy.deepcopy(item)))
        self.changed.notify_all()

    def _admit(self, item: Json, old: Json | None) -> None:
        """What the real one refuses: unknown fields, a Pod that is not restricted, a change of what cannot change."""
        shown = {k: v for k, v in item.items() if k != "status"}
        if item["apiVersion"] == "monitoring.coreos.com/v1":
            kept = {key: item["metadata"][key] for key in ("name", "labels")}
            shown = {**shown, "metadata": kept}
        for complaint in schemas.complaints(shown, self.version):
            raise Refused(422, "Invalid", complaint)
        kind = item["kind"]
        if old is not None:
            if kind == "Deployment" and old["spec"]["selector"] != item["spec"]["selector"]:
                raise Refused(422, "Invalid", "spec.selector: field is immutable")
            if kind == "PersistentVolumeClaim" and _fixed(old) != _fixed(item):
                raise Refused(422, "Invalid", "spec is immutable after creation except resources.requests")
            if kind == "Pod" and old["spec"] != item["spec"]:
                raise Refused(422, "Invalid", "spec: pod updates may not change fields")
        if kind in ("Pod", "Deployment"):
            for complaint in checks.restricted(checks.Rendered([item])):
                raise Refused(403, "Forbidden", f'violates PodSecurity "restricted:latest": {complaint}')

    def _reconcile(self, key: tuple[str, str, str, str], item: Json) -> None:
        """Controllers and kubelet in one: what becomes of an object right after it was written."""
        kind, generation = item["kind"], item["metadata"]["generation"]
        if kind == "Pod":
            runs = self._would_run(item["spec"])
            item["status"] = {"phase": "Succeeded" if runs else "Pending", "conditions": []}
        elif kind == "PersistentVolumeClaim":
            item["status"] = {"phase": "Bound"}
        elif kind == "Service":
            item["spec"].setdefault("clusterIP", "10.0.0.1")
            item["status"] = {"loadBalancer": {"ingress": [{"ip": "10.0.0.2"}]}}
        elif kind == "PodDisruptionBudget":
            item["status"] = {"observedGeneration": generation, "currentHealthy": 1, "desiredHealthy": 0}
            item["status"] |= {"disruptionsAllowed": 1, "expectedPods": 1}
        elif kind == "Deployment":
            self._roll_out(key, item)
        else:
            return
        self._tell("MODIFIED", item)

    def _roll_out(self, key: tuple[str, str, str, str], item: Json) -> None:
        count = item["spec"].get("replicas", 1)
        ready = count if self._would_run(item["spec"]["template"]["spec"]) else 0
        item["status"] = {"observedGeneration": item["metadata"]["generation"], "replicas": count}
        item["status"] |= {"updatedReplicas": count, "readyReplicas": ready, "availableReplicas": ready}
        done = [
            {"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable"},
            {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"},
        ]
        item["status"]["conditions"] = done if ready == count else []
        owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": key[3], "uid": item["metadata"]["uid"]}
        labels = item["spec"]["template"]["metadata"]["labels"]
        name = f"{key[3]}-{item['metadata']['generation']}"
        self.objects[("apps/v1", "replicasets", key[2], name)] = {
            "apiVersion": "apps/v1",
            "kind": "ReplicaSet",
            "metadata": {
                "name": name,
                "namespace": key[2],
                "labels": {**labels, "pod-template-hash": name},
                "ownerReferences": [{**owner, "controller": True}],
                "creationTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {"replicas": count, "selector": item["spec"]["selector"], "template": item["spec"]["template"]},
            "status": {"replicas": count, "readyReplicas": ready, "availableReplicas": ready},
        }

    def _would_run(self, spec: Json) -> bool:
        there = checks.Rendered(list(self.objects.values()))
        pod = {"kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        own = checks.Rendered([pod, *(item for item in there.objects if item["kind"] not in ("Pod", "Deployment"))])
        own = checks.Rendered([item for item in own.objects if item["kind"] not in ("Ingress", "ReplicaSet")])
        return not list(checks.references(own)) and not list(checks.volumes(own))


def _fixed(claim: Json) -> Json:
    return {key: value for key, value in claim["spec"].items() if key not in ("resources", "volumeName")}


def _without(live: Json, applied: Json, wanted: Json) -> Json:
    """`live` less what was applied before and is applied no more."""
    for key, value in applied.items():
        if key not in wanted:
            live.pop(key, None)
        elif isinstance(value, dict) and isinstance(wanted[key], dict) and isinstance(live.get(key), dict):
            _without(live[key], value, wanted[key])
    return live


def _selects(query: Mapping[str, list[str]]) -> Callable[[Json], bool]:
    """labelSelector (=, ==, !=, in, notin, key) and fieldSelector on metadata.name."""
    terms = re.split(r",(?![^(]*\))", query.get("labelSelector", [""])[0])
    name = re.fullmatch(r"metadata\.name=(.*)", query.get("fieldSelector", [""])[0])

    def fits(term: str, labels: Mapping[str, str]) -> bool:
        if among := re.fullmatch(r"\s*(\S+) (in|notin) \(([^)]*)\)", term):
            return (labels.get(among[1]) in re.split(r",\s*", among[3])) == (among[2] == "in")
        if equal := re.fullmatch(r"([^=!]+)(==|=|!=)(.*)", term):
            return (labels.get(equal[1]) == equal[3]) == (equal[2] != "!=")
        return not term or term in labels

    def wanted(item: Json) -> bool:
        labels = item["metadata"].get("labels") or {}
        return all(fits(term, labels) for term in terms) and (not name or item["metadata"]["name"] == name[1])

    return wanted


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together, else every answer waits for an acknowledgement
    disable_nagle_algorithm = True
    cluster: Cluster

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            found = _discovery(url.path, self.cluster.version)
            if found is None:
                self._on_objects(_place(url.path), parse_qs(url.query), body)
            else:
                self._send(200, found)
        except Refused as error:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": str(error)}
            self._send(error.status, status | {"reason": error.reason, "code": error.status})

    def _on_objects(self, place: Place, query: Mapping[str, list[str]], body: bytes) -> None:
        cluster, how = self.cluster, self.headers.get("Content-Type", "")
        dry = "dryRun" in query
        if dry:  # on a copy of everything
            cluster = copy.copy(cluster)
            cluster.objects, cluster.events = copy.deepcopy(cluster.objects), list(cluster.events)
            cluster._applied = dict(cluster._applied)
        if self.command == "GET" and query.get("watch"):
            self._watch(place, query)
        elif self.command == "GET" and place.part == "log":
            self._send(200, "what the container said\n")
        elif self.command == "GET" and place.name:
            self._send(200, cluster.get(place))
        elif self.command == "GET":
            items = cluster.listed(place, _selects(query))
            version = {"resourceVersion": str(len(cluster.events))}
            self._send(200, {"kind": f"{place.kind}List", "apiVersion": place.api, "metadata": version, "items": items})
        elif self.command == "POST":
            self._send(201, cluster.create(place, _decoded(body, how)))
        elif self.command == "PUT":
            self._send(200, cluster.update(place, _decoded(body, how)))
        elif self.command == "PATCH":
            self._send(200, cluster.patch(place, body, how))
        else:
            self._send(200, cluster.delete(place))

    def _watch(self, place: Place, query: Mapping[str, list[str]]) -> None:
        """Events from the version named; with sendInitialEvents all that there is first, then a bookmark."""
        cluster, wanted = self.cluster, _selects(query)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        with cluster.changed:
            at = len(cluster.events)
            started = [("ADDED", copy.deepcopy(item)) for item in cluster.listed(place, wanted)]
        if "sendInitialEvents" in query:
            end = {"resourceVersion": str(at), "annotations": {"k8s.io/initial-events-end": "true"}}
            mark = {"kind": place.kind, "apiVersion": place.api, "metadata": end}
            for event in [*started, ("BOOKMARK", mark)]:
                self._chunk(*event)
        elif query.get("resourceVersion", ["0"])[0] not in ("", "0"):
            at = int(query["resourceVersion"][0])
        else:
            for event in started:
                self._chunk(*event)
        while news := cluster.news(at):
            at += len(news)
            for kind, item in news:
                same = (item["apiVersion"], item["kind"]) == (place.api, place.kind)
                if same and item["metadata"].get("namespace", "") in (place.namespace, "") and wanted(item):
                    self._chunk(kind, item)

    def _chunk(self, kind: str, item: Json) -> None:
        line = json.dumps({"type": kind, "object": item}).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()

    def _send(self, status: int, body: Json | str) -> None:
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A watcher that has left is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _decoded(body: bytes, how: str) -> Json:
    if body.startswith(protobuf.MAGIC):
        return protobuf.secret(body)
    found: Json = yaml.load(body, yaml.CSafeLoader) if "yaml" in how else json.loads(body)
    for key, text in found.pop("stringData", {}).items():
        found.setdefault("data", {})[key] = base64.b64encode(text.encode()).decode()
    return found


def _place(path: str) -> Place:
    found = re.fullmatch(
        r"/(?:api|apis/([^/]+))/(v[^/]+)(?:/namespaces/([^/]+))?/([a-z]+)(?:/([^/]+))?(?:/([a-z]+))?", path
    )
    if not found:
        raise Refused(404, "NotFound", f"no such path: {path}")
    api = f"{found[1]}/{found[2]}" if found[1] else found[2]
    if (api, found[4]) not in RESOURCES:
        raise Refused(404, "NotFound", f"no such resource: {path}")
    return Place(api, found[4], found[3] or "", found[5] or "", found[6] or "")


def _discovery(path: str, version: str) -> Json | None:
    """Everything that is not about objects."""
    if path == "/version":
        major, minor = version.split(".")
        return {"major": major, "minor": minor, "gitVersion": f"v{version}.0"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [api.split("/") for api in KINDS if "/" in api]
        versions = [{"groupVersion": f"{group}/{name}", "version": name} for group, name in groups]
        listed = [
            {"name": group, "versions": [found], "preferredVersion": found}
            for (group, _), found in zip(groups, versions, strict=True)
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
    if path == "/openapi/v3":
        return {"paths": {_root(api): {"serverRelativeURL": f"/openapi/v3/{_root(api)}"} for api in KINDS}}
    for api, kinds in KINDS.items():
        if path == f"/{_root(api)}":
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api, "resources": _resources(kinds)}
        if path == f"/openapi/v3/{_root(api)}":
            return {"openapi": "3.0.0", "info": {"title": "x", "version": "1"}, "paths": dict(_paths(api, kinds))}
    return None


def _root(api: str) -> str:
    return f"apis/{api}" if "/" in api else f"api/{api}"


def _resources(kinds: tuple[str, ...]) -> list[Json]:
    return [
        {
            "name": plural(kind),
            "singularName": kind.lower(),
            "namespaced": kind != "Namespace",
            "kind": kind,
            "verbs": VERBS,
        }
        for kind in kinds
    ]


def _paths(api: str, kinds: tuple[str, ...]) -> Iterator[tuple[str, Json]]:
    """As much OpenAPI as a client needs to know that fieldValidation and dryRun are understood."""
    group, _, version = api.rpartition("/")
    for kind in kinds:
        operation = {
            "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
            "parameters": [{"name": name, "in": "query"} for name in ("fieldValidation", "dryRun", "fieldManager")],
            "responses": {},
        }
        yield f"/{_root(api)}/namespaces/{{namespace}}/{plural(kind)}/{{name}}", {"patch": operation}


@contextmanager
def cluster(version: str = "1.32") -> Iterator[tuple[Cluster, str]]:
    """A running server; gives its state and its address."""
    state = Cluster(version)
    handler = type("Handler", (_Handler,), {"cluster": state})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
