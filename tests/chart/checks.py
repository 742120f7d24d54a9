"""What must hold of a rendered chart and no schema says: each check is one function that yields its complaints.

A schema finds unknown fields and wrong types. It does not find a port nobody listens on, a selector that selects
nothing, a Secret that is not there, a drain longer than the grace period, or a Pod that "restricted" refuses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

Object = Mapping[str, Any]
Check = Callable[["Rendered"], Iterator[str]]

LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]*[a-z0-9])?")
QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
SCALE = {"m": Decimal("0.001"), None: Decimal(1), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9)}
SCALE |= {"T": Decimal(10**12), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40)}
ENUMS: Mapping[str, Sequence[str]] = {
    "whenUnsatisfiable": ("DoNotSchedule", "ScheduleAnyway"),
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "protocol": ("TCP", "UDP", "SCTP"),
    "pathType": ("Exact", "Prefix", "ImplementationSpecific"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    "operator": ("In", "NotIn", "Exists", "DoesNotExist", "Equal"),
    "fsGroupChangePolicy": ("OnRootMismatch", "Always"),
    "unhealthyPodEvictionPolicy": ("IfHealthyBudget", "AlwaysAllow"),
}
RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
RESTRICTED_VOLUMES |= {"secret"}


@dataclass(frozen=True)
class Workload:
    """A Pod as it will be: of a Deployment, or of a hook."""

    owner: Object
    metadata: Object
    spec: Object

    @property
    def name(self) -> str:
        return f"{self.owner['kind']}/{self.owner['metadata']['name']}"

    @property
    def labels(self) -> Mapping[str, str]:
        return self.metadata.get("labels") or {}

    @property
    def containers(self) -> Sequence[Object]:
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def ports(self) -> Sequence[Object]:
        return [port for container in self.containers for port in container.get("ports", ())]

    def listens(self, port: int | str) -> bool:
        return any(port in (found.get("name"), found["containerPort"]) for found in self.ports)


@dataclass(frozen=True)
class Rendered:
    """All objects of one rendering. `outside`: (kind, name) of what the cluster is promised to have already."""

    objects: Sequence[Object]
    outside: frozenset[tuple[str, str]] = frozenset()

    def of(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def find(self, kind: str, name: str) -> Object | None:
        return next((item for item in self.of(kind) if item["metadata"]["name"] == name), None)

    @property
    def workloads(self) -> list[Workload]:
        pods = [Workload(pod, pod["metadata"], pod["spec"]) for pod in self.of("Pod")]
        templates = [(item, item["spec"]["template"]) for item in self.of("Deployment")]
        return pods + [Workload(item, template["metadata"], template["spec"]) for item, template in templates]

    def selected(self, selector: Object | None) -> list[Workload]:
        return [workload for workload in self.workloads if matches(selector or {}, workload.labels)]


def matches(selector: Object, labels: Mapping[str, str]) -> bool:
    """A LabelSelector against labels; the empty one matches everything."""
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for term in selector.get("matchExpressions") or ():
        there, values = labels.get(term["key"]), term.get("values", ())
        fits = {
            "In": there in values,
            "NotIn": there not in values,
            "Exists": there is not None,
            "DoesNotExist": there is None,
        }
        if not fits[term["operator"]]:
            return False
    return True


def run(rendered: Rendered) -> dict[str, list[str]]:
    """Check name -> complaints; a check without complaints is left out."""
    found = {name: sorted(set(check(rendered))) for name, check in CHECKS.items()}
    return {name: complaints for name, complaints in found.items() if complaints}


def names(rendered: Rendered) -> Iterator[str]:
    """Names that the API accepts, each object once."""
    for (kind, name), times in Counter((o["kind"], o["metadata"]["name"]) for o in rendered.objects).items():
        pattern, longest = (DNS_LABEL, 63) if kind in ("Service", "Pod") else (DNS_SUBDOMAIN, 253)
        if kind == "Deployment":
            longest = 63 - len("-0123456789-01234")  # its Pods' names carry two suffixes
        if not pattern.fullmatch(name) or len(name) > longest:
            yield f"{kind} {name!r} is no valid name"
        if times > 1:
            yield f"{kind} {name} is there {times} times"
    for workload in rendered.workloads:
        for item in [*workload.containers, *workload.spec.get("volumes", ())]:
            if not DNS_LABEL.fullmatch(item["name"]) or len(item["name"]) > 63:
                yield f"{workload.name}: {item['name']!r} is no valid name"


def labels(rendered: Rendered) -> Iterator[str]:
    """Labels within their alphabet and length; the recommended ones everywhere."""
    for item in rendered.objects:
        found = item["metadata"].get("labels") or {}
        template = item.get("spec", {}).get("template", {}).get("metadata", {}).get("labels") or {}
        for key, value in [*found.items(), *template.items()]:
            if not isinstance(value, str) or not LABEL.fullmatch(value) or len(value) > 63:
                yield f"{item['kind']}: label {key}={value!r}"
            if not LABEL.fullmatch(key.rpartition("/")[2]) or len(key.rpartition("/")[2]) > 63:
                yield f"{item['kind']}: label key {key!r}"
        for key in ("name", "instance", "version", "managed-by"):
            if f"app.kubernetes.io/{key}" not in found:
                yield f"{item['kind']} {item['metadata']['name']} has no label app.kubernetes.io/{key}"


def enums(rendered: Rendered) -> Iterator[str]:
    """Words that stand for a choice are among the choices; the schemas do not know them."""
    for item in rendered.objects:
        for key, value in walk(item.get("spec") or {}):
            if key in ENUMS and isinstance(value, str) and value not in ENUMS[key]:
                yield f"{item['kind']}: {key} {value!r}"
            if key == "topologyKey" and not value:
                yield f"{item['kind']}: topologyKey is empty"
    for item in rendered.of("Deployment"):
        if item["spec"]["strategy"]["type"] not in ("Recreate", "RollingUpdate"):
            yield f"strategy {item['spec']['strategy']['type']!r}"
    for item in rendered.of("Service"):
        if item["spec"]["type"] not in ("ClusterIP", "NodePort", "LoadBalancer"):
            yield f"Service type {item['spec']['type']!r}"
    for item in rendered.of("NetworkPolicy"):
        if not set(item["spec"]["policyTypes"]) <= {"Ingress", "Egress"}:
            yield f"policyTypes {item['spec']['policyTypes']}"
    for item in rendered.of("PersistentVolumeClaim"):
        if not set(item["spec"]["accessModes"]) <= {"ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany"}:
            yield f"accessModes {item['spec']['accessModes']}"


def ports(rendered: Rendered) -> Iterator[str]:
    """Port names as the API wants them; numbers in range and above 1023, since nobody is root; no port twice."""
    for workload in rendered.workloads:
        for port in workload.ports:
            name = port.get("name", "x")
            if not PORT_NAME.fullmatch(name) or len(name) > 15:
                yield f"{workload.name}: port name {name!r}"
            if not 1024 <= port["containerPort"] <= 65535:
                yield f"{workload.name}: port {port['containerPort']}"
        if len({port["containerPort"] for port in workload.ports}) < len(workload.ports):
            yield f"{workload.name}: a port stands there twice"
    for service in rendered.of("Service"):
        for port in service["spec"]["ports"]:
            if not PORT_NAME.fullmatch(port["name"]) or len(port["name"]) > 15 or not 1 <= port["port"] <= 65535:
                yield f"Service {service['metadata']['name']}: port {port['name']!r} {port['port']}"


def target_ports(rendered: Rendered) -> Iterator[str]:
    """Whatever names a port names one that somebody listens on."""
    for service in rendered.of("Service"):
        for workload in rendered.selected({"matchLabels": service["spec"]["selector"]}):
            for port in service["spec"]["ports"]:
                if not workload.listens(port["targetPort"]):
                    yield f"Service {service['metadata']['name']}: {workload.name} has no port {port['targetPort']}"
    for workload in rendered.workloads:
        for container in workload.containers:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                port = container.get(probe, {}).get("httpGet", {}).get("port")
                if port is not None and not workload.listens(port):
                    yield f"{workload.name}: {probe} asks port {port}"
    for ingress in rendered.of("Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                behind = rendered.find("Service", backend["name"]) or {"spec": {"ports": ()}}
                known = [port[key] for port in behind["spec"]["ports"] for key in port]
                if not set(backend["port"].values()) <= set(known):
                    yield f"Ingress {ingress['metadata']['name']}: backend {backend}"
    for monitor in rendered.of("ServiceMonitor"):
        for service in rendered.of("Service"):
            if matches(monitor["spec"]["selector"], service["metadata"]["labels"]):
                known = [port["name"] for port in service["spec"]["ports"]]
                if any(endpoint["port"] not in known for endpoint in monitor["spec"]["endpoints"]):
                    yield f"ServiceMonitor {monitor['metadata']['name']}: no such port"
    for policy in rendered.of("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            for port in rule.get("ports", ()):
                for workload in rendered.selected(policy["spec"]["podSelector"]):
                    if not workload.listens(port["port"]):
                        yield f"NetworkPolicy {policy['metadata']['name']}: {workload.name} has no port {port['port']}"


def selectors(rendered: Rendered) -> Iterator[str]:
    """Whatever selects, selects what it should and nothing else."""
    for item in rendered.of("Deployment"):
        own = item["spec"]["template"]["metadata"]["labels"]
        if not matches(item["spec"]["selector"], own):
            yield f"Deployment {item['metadata']['name']} does not select its own Pods"
        if len(rendered.selected(item["spec"]["selector"])) > 1:
            yield f"Deployment {item['metadata']['name']} selects Pods of others"
        for spread in item["spec"]["template"]["spec"].get("topologySpreadConstraints", ()):
            if not matches(spread["labelSelector"], own):
                yield f"Deployment {item['metadata']['name']} spreads other Pods than its own"
    for service in rendered.of("Service"):
        if len(rendered.selected({"matchLabels": service["spec"]["selector"]})) != 1:
            yield f"Service {service['metadata']['name']} does not select exactly one workload"
    for kind, field in (("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        for item in rendered.of(kind):
            if not rendered.selected(item["spec"][field]):
                yield f"{kind} {item['metadata']['name']} selects nothing"
    for monitor in rendered.of("ServiceMonitor"):
        services = [s for s in rendered.of("Service") if matches(monitor["spec"]["selector"], s["metadata"]["labels"])]
        if len(services) != 1:
            yield f"ServiceMonitor {monitor['metadata']['name']} selects {len(services)} Services"


def autoscaling(rendered: Rendered) -> Iterator[str]:
    """min <= max, a target that is there, that has no count of its own and a request to measure against."""
    for item in rendered.of("HorizontalPodAutoscaler"):
        spec = item["spec"]
        if not 1 <= spec["minReplicas"] <= spec["maxReplicas"]:
            yield f"minReplicas {spec['minReplicas']}, maxReplicas {spec['maxReplicas']}"
        target = rendered.find(spec["scaleTargetRef"]["kind"], spec["scaleTargetRef"]["name"])
        if target is None:
            yield f"scales {spec['scaleTargetRef']['name']}, which is not there"
        elif "replicas" in target["spec"]:
            yield f"{target['metadata']['name']} has replicas of its own: every upgrade would undo the scaling"
        if not spec["metrics"]:
            yield "no metric"


def disruption(rendered: Rendered) -> Iterator[str]:
    """A budget that lets a node be drained: at least one Pod may go, however many there are."""
    for item in rendered.of("PodDisruptionBudget"):
        spec = item["spec"]
        if ("maxUnavailable" in spec) == ("minAvailable" in spec):
            yield "one of maxUnavailable and minAvailable is needed"
        if str(spec.get("maxUnavailable", 1)) in ("0", "0%"):
            yield "maxUnavailable 0 blocks every drain"
        for workload in rendered.selected(spec["selector"]):
            replicas = workload.owner["spec"].get("replicas", 1)
            least = spec.get("minAvailable", 0)
            if least == "100%" or (isinstance(least, int) and least >= replicas):
                yield f"minAvailable {least} of {replicas} blocks every drain"


def volumes(rendered: Rendered) -> Iterator[str]:
    """Every mount has its volume, every volume is mounted, no path twice; claims exist."""
    for workload in rendered.workloads:
        there = [volume["name"] for volume in workload.spec.get("volumes", ())]
        mounts = [mount for container in workload.containers for mount in container.get("volumeMounts", ())]
        for name in {mount["name"] for mount in mounts} ^ set(there):
            yield f"{workload.name}: volume {name} is not there, or not mounted"
        for container in workload.containers:
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
            if len(set(paths)) < len(paths):
                yield f"{workload.name}: a path is mounted twice"
        for volume in workload.spec.get("volumes", ()):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and not _exists(rendered, "PersistentVolumeClaim", claim):
                yield f"{workload.name}: claim {claim} is not there"


def references(rendered: Rendered) -> Iterator[str]:
    """Every Secret, ConfigMap and key that a Pod or an Ingress names exists, is promised, or is optional."""
    for workload in rendered.workloads:
        for container in workload.containers:
            wanted = [(env.get("valueFrom") or {}) for env in container.get("env", ())]
            for source in [*wanted, *container.get("envFrom", ())]:
                for field, kind in REFERENCES.items():
                    ref = source.get(field)
                    if ref and not ref.get("optional") and not _exists(rendered, kind, ref["name"], ref.get("key")):
                        yield f"{workload.name}: {kind} {ref['name']} has no {ref.get('key', 'entry in this chart')}"
        for secret in workload.spec.get("imagePullSecrets", ()):
            if not _exists(rendered, "Secret", secret["name"]):
                yield f"{workload.name}: Secret {secret['name']} is not there"
        account = workload.spec.get("serviceAccountName", "default")
        if account != "default" and not _exists(rendered, "ServiceAccount", account):
            yield f"{workload.name}: ServiceAccount {account} is not there"
    for ingress in rendered.of("Ingress"):
        for tls in ingress["spec"].get("tls", ()):
            if not _exists(rendered, "Secret", tls["secretName"]):
                yield f"Ingress: Secret {tls['secretName']} is not there"


REFERENCES = {"secretKeyRef": "Secret", "secretRef": "Secret", "configMapKeyRef": "ConfigMap"}
REFERENCES |= {"configMapRef": "ConfigMap"}


def restricted(rendered: Rendered) -> Iterator[str]:
    """Pod Security "restricted", and a read-only root besides; for hooks and tests too."""
    for workload in rendered.workloads:
        pod = workload.spec.get("securityContext") or {}
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if workload.spec.get(field):
                yield f"{workload.name}: {field}"
        for volume in workload.spec.get("volumes", ()):
            if not set(volume) - {"name"} <= RESTRICTED_VOLUMES:
                yield f"{workload.name}: volume {sorted(set(volume) - {'name'})}"
        for container in workload.containers:
            own = container.get("securityContext") or {}
            where = f"{workload.name}, container {container['name']}"
            if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
                yield f"{where}: runAsNonRoot"
            if own.get("runAsUser", pod.get("runAsUser")) == 0:
                yield f"{where}: runAsUser 0"
            profile = (own.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type")
            if profile not in ("RuntimeDefault", "Localhost"):
                yield f"{where}: seccompProfile {profile}"
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{where}: allowPrivilegeEscalation"
            capabilities = own.get("capabilities") or {}
            if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
                yield f"{where}: capabilities {capabilities}"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{where}: readOnlyRootFilesystem"
            if any("hostPort" in port for port in container.get("ports", ())):
                yield f"{where}: hostPort"


def tokens(rendered: Rendered) -> Iterator[str]:
    """No Pod has the cluster's token, nor the addresses of Services in its environment."""
    for workload in rendered.workloads:
        for field in ("automountServiceAccountToken", "enableServiceLinks"):
            if workload.spec.get(field) is not False:
                yield f"{workload.name}: {field} is not false"
    for account in rendered.of("ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {account['metadata']['name']}: automountServiceAccountToken is not false"


def images(rendered: Rendered) -> Iterator[str]:
    """A digest, or a tag that is not `latest`."""
    for workload in rendered.workloads:
        for container in workload.containers:
            image = container["image"]
            tag = image.rpartition("/")[2].partition(":")[2]
            if "@sha256:" not in image and tag in ("", "latest"):
                yield f"{workload.name}: image {image}"


def resources(rendered: Rendered) -> Iterator[str]:
    """CPU and memory requested, memory limited, no request above its limit, whole GPUs."""
    for workload in rendered.workloads:
        for container in workload.containers:
            where, found = f"{workload.name}, container {container['name']}", container.get("resources") or {}
            requests, limits = found.get("requests") or {}, found.get("limits") or {}
            for value in [*requests.values(), *limits.values()]:
                if quantity(value) is None:
                    yield f"{where}: {value!r} is no quantity"
            for name in {"cpu", "memory"} - set(requests):
                yield f"{where}: no request for {name}"
            if "memory" not in limits:
                yield f"{where}: no limit for memory"
            for name in set(requests) & set(limits):
                if (quantity(requests[name]) or 0) > (quantity(limits[name]) or 0):
                    yield f"{where}: {name} request {requests[name]} is above the limit {limits[name]}"
            for name, value in limits.items():
                if "/" in name and int(value) != quantity(value):
                    yield f"{where}: {name} {value}"


def drain(rendered: Rendered) -> Iterator[str]:
    """preStop and the drain together end before the grace period does."""
    for workload in rendered.workloads:
        for container in workload.containers if workload.owner["kind"] == "Deployment" else ():
            stop = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ("", "0"))
            timeout = [
                float(value)
                for name, value in _environment(rendered, container).items()
                if name.endswith("_DRAIN_TIMEOUT")
            ]
            grace = workload.spec.get("terminationGracePeriodSeconds", 30)
            if not timeout or float(stop[1]) + max(timeout, default=0) >= grace:
                yield f"{workload.name}: preStop {stop[1]} s and drain {timeout} s do not fit into {grace} s"


def probes(rendered: Rendered) -> Iterator[str]:
    """Alive is one question and ready another: a server that drains is not ready, and must not be killed for it."""
    for item in rendered.of("Deployment"):
        for container in item["spec"]["template"]["spec"]["containers"]:
            paths = {p: container.get(p, {}).get("httpGet", {}).get("path") for p in PROBE_PATHS}
            if paths != PROBE_PATHS:
                yield f"{item['metadata']['name']}: {paths}"


PROBE_PATHS = {"startupProbe": "/health", "readinessProbe": "/ready", "livenessProbe": "/health"}


def rollout(rendered: Rendered) -> Iterator[str]:
    """A change of configuration restarts the Pods, and the restart can proceed on the volumes that there are."""
    for item in rendered.of("Deployment"):
        name, template, strategy = item["metadata"]["name"], item["spec"]["template"], item["spec"]["strategy"]
        configured = any("configMapRef" in s for c in template["spec"]["containers"] for s in c.get("envFrom", ()))
        if configured and "checksum/config" not in (template["metadata"].get("annotations") or {}):
            yield f"{name}: no checksum/config"
        rolling = strategy.get("rollingUpdate") or {}
        if strategy["type"] == "RollingUpdate" and all(str(v) in ("0", "0%") for v in rolling.values()):
            yield f"{name}: neither maxSurge nor maxUnavailable"
        for volume in template["spec"].get("volumes", ()):
            claim = rendered.find("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName", ""))
            if claim and claim["spec"]["accessModes"] == ["ReadWriteOnce"]:
                alone = item["spec"].get("replicas") == 1
                if not alone or (strategy["type"] != "Recreate" and rolling.get("maxSurge") != 0):
                    yield f"{name}: two Pods would want the claim {claim['metadata']['name']}, which is ReadWriteOnce"


def network(rendered: Rendered) -> Iterator[str]:
    """Default deny for every Pod; the way from servers to the registry, and from the tests to both, is open."""
    policies = rendered.of("NetworkPolicy")
    if not policies:
        return
    for workload in rendered.workloads:
        mine = [policy["spec"] for policy in policies if matches(policy["spec"]["podSelector"], workload.labels)]
        denied = [set(spec["policyTypes"]) for spec in mine if not spec.get("ingress") and not spec.get("egress")]
        if {"Ingress", "Egress"} not in denied:
            yield f"{workload.name}: no default deny"
        for spec in mine:
            for rule in [*(spec.get("ingress") or ()), *(spec.get("egress") or ())]:
                if not rule.get("ports"):
                    yield f"{workload.name}: a rule without ports opens all of them"
    for source in rendered.workloads:
        for service, port in _asked(rendered, source):
            for target in rendered.selected({"matchLabels": service["spec"]["selector"]}):
                if not _allowed(policies, source, target, port):
                    yield f"{source.name} asks {target.name} on port {port}, and the policies do not let it"


def hooks(rendered: Rendered) -> Iterator[str]:
    """Test Pods run once, end by themselves, and make room for the next run."""
    for pod in rendered.of("Pod"):
        annotations = pod["metadata"].get("annotations") or {}
        if annotations.get("helm.sh/hook") != "test":
            yield f"Pod {pod['metadata']['name']} is no test hook: an upgrade could not change it"
        if "before-hook-creation" not in annotations.get("helm.sh/hook-delete-policy", ""):
            yield f"Pod {pod['metadata']['name']} would be in the way of the next test"
        if pod["spec"].get("restartPolicy") != "Never" or not pod["spec"].get("activeDeadlineSeconds"):
            yield f"Pod {pod['metadata']['name']} might never end"


def environment(rendered: Rendered) -> Iterator[str]:
    """Names once a container, texts as values, and a threads count that is not the node's."""
    for workload in rendered.workloads:
        for container in workload.containers:
            env = [item["name"] for item in container.get("env", ())]
            if len(set(env)) < len(env):
                yield f"{workload.name}: {sorted(name for name, n in Counter(env).items() if n > 1)} twice"
    for config in rendered.of("ConfigMap"):
        for key, value in (config.get("data") or {}).items():
            if not isinstance(value, str) or re.fullmatch(r"[0-9.]+e[+-]?[0-9]+", value) or value in ("<nil>", "[]"):
                yield f"ConfigMap {config['metadata']['name']}: {key} {value!r}"


CHECKS: Mapping[str, Check] = {
    check.__name__: check
    for check in (
        names,
        labels,
        enums,
        ports,
        target_ports,
        selectors,
        autoscaling,
        disruption,
        volumes,
        references,
        restricted,
        tokens,
        images,
        resources,
        drain,
        probes,
        rollout,
        network,
        hooks,
        environment,
    )
}


def walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield key, value
            yield from walk(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from walk(value)


def quantity(text: object) -> Decimal | None:
    """`250m` or `4Gi` as a number; None for what is no quantity."""
    found = QUANTITY.fullmatch(str(text))
    return Decimal(found[1]) * SCALE[found[2]] if found else None


def _exists(rendered: Rendered, kind: str, name: str, key: str | None = None) -> bool:
    if (kind, name) in rendered.outside:
        return True
    found = rendered.find(kind, name)
    return found is not None and (key is None or key in (found.get("data") or {}))


def _environment(rendered: Rendered, container: Object) -> dict[str, str]:
    """The plain values that a container sees."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        config = rendered.find("ConfigMap", source.get("configMapRef", {}).get("name", ""))
        found |= (config or {}).get("data") or {}
    return found | {env["name"]: env["value"] for env in container.get("env", ()) if "value" in env}


def _asked(rendered: Rendered, source: Workload) -> Iterable[tuple[Object, int]]:
    """The Services of this chart that a Pod's environment names by URL, and the container port behind."""
    for container in source.containers:
        for value in _environment(rendered, container).values():
            if found := re.fullmatch(r"http://([a-z0-9-]+):(\d+)", value):
                service = rendered.find("Service", found[1])
                if service is None:
                    continue
                for port in service["spec"]["ports"]:
                    if port["port"] == int(found[2]):
                        yield service, _number(rendered, service, port["targetPort"])


def _number(rendered: Rendered, service: Object, port: int | str) -> int:
    for workload in rendered.selected({"matchLabels": service["spec"]["selector"]}):
        for found in workload.ports:
            if port in (found.get("name"), found["containerPort"]):
                return int(found["containerPort"])
    return -1


def _allowed(policies: Sequence[Object], source: Workload, target: Workload, port: int) -> bool:
    return _lets(policies, source, target, port, target, way="egress") and _lets(
        policies, target, source, port, target, way="ingress"
    )


def _lets(
    policies: Sequence[Object], subject: Workload, peer: Workload, port: int, listener: Workload, *, way: str
) -> bool:
    """NetworkPolicy within one namespace: a Pod that no policy selects is open, else one rule must fit."""
    mine = [policy["spec"] for policy in policies if matches(policy["spec"]["podSelector"], subject.labels)]
    mine = [spec for spec in mine if way.capitalize() in spec["policyTypes"]]
    peers = "to" if way == "egress" else "from"
    for spec in mine:
        for rule in spec.get(way) or ():
            named = {p["name"]: p["containerPort"] for p in listener.ports}
            fits = any(named.get(item["port"], item["port"]) == port for item in rule.get("ports", ()))
            if fits and (peers not in rule or any(_is_peer(item, peer) for item in rule[peers])):
                return True
    return not mine


def _is_peer(item: Object, pod: Workload) -> bool:
    return "podSelector" in item and "namespaceSelector" not in item and matches(item["podSelector"], pod.labels)
