"""Faults as people make them, each an edit of one file of the chart, with the check that must find it.

Helm renders all of them, and Kubernetes' schemas accept what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    new: str
    caught_by: str
    situation: str = "production"


SERVER, REGISTRY = "templates/server/deployment.yaml", "templates/registry/deployment.yaml"
HELPERS = "templates/_helpers.tpl"

FAULTS = (
    Fault("a name that is too long", HELPERS, "trunc 40", 'trunc 400 | replace "r" (repeat 50 "r")', "names"),
    Fault(
        "a label with a blank",
        "templates/services.yaml",
        "app.kubernetes.io/component: {{ $half }}\n  {{- with .service",
        "app.kubernetes.io/component: {{ $half }}\n    tier: front end\n  {{- with .service",
        "labels",
    ),
    Fault(
        "an enum that the schemas do not know",
        SERVER,
        "whenUnsatisfiable: {{ .whenUnsatisfiable }}",
        "whenUnsatisfiable: Whenever",
        "enums",
    ),
    Fault("an empty topology key", SERVER, "topologyKey: {{ .topologyKey }}", 'topologyKey: ""', "enums"),
    Fault("a port name with capitals", "templates/services.yaml", "- name: http", "- name: HTTP_bad", "ports", "trial"),
    Fault("a port below 1024", REGISTRY, "containerPort: 8080", "containerPort: 80", "ports", "lab"),
    Fault(
        "a Service that aims at no port",
        "templates/services.yaml",
        "targetPort: http",
        "targetPort: web",
        "target_ports",
        "lab",
    ),
    Fault(
        "a probe of a port that is not there",
        SERVER,
        "path: /ready, port: http",
        "path: /ready, port: 9000",
        "target_ports",
    ),
    Fault(
        "an Ingress to no Service",
        "templates/ingresses.yaml",
        'name: {{ include "multigraft.fullname" $ }}-{{ $half }}\n                port',
        'name: {{ include "multigraft.fullname" $ }}\n                port',
        "target_ports",
    ),
    Fault(
        "a budget that selects nothing",
        "templates/server/pdb.yaml",
        "      app.kubernetes.io/component: server\n{{- end }}",
        "      app.kubernetes.io/component: servers\n{{- end }}",
        "selectors",
    ),
    Fault(
        "a spread over the Pods of others",
        SERVER,
        "              app.kubernetes.io/component: server\n          matchLabelKeys",
        "              app.kubernetes.io/component: registry\n          matchLabelKeys",
        "selectors",
    ),
    Fault(
        "more at least than at most",
        "templates/server/hpa.yaml",
        "maxReplicas: {{ .maxReplicas }}",
        "maxReplicas: 1",
        "autoscaling",
        "autoscaled",
    ),
    Fault(
        "replicas beside an autoscaler",
        SERVER,
        "  {{- if not .autoscaling.enabled }}\n  replicas: {{ .replicas }}\n  {{- end }}",
        "  replicas: {{ .replicas }}",
        "autoscaling",
        "autoscaled",
    ),
    Fault(
        "a budget that blocks every drain",
        "templates/server/pdb.yaml",
        "maxUnavailable: {{ .Values.server.maxUnavailable }}",
        "minAvailable: {{ .Values.server.replicas }}",
        "disruption",
    ),
    Fault("a mount without a volume", SERVER, "            - name: tmp", "            - name: scratch", "volumes"),
    Fault(
        "a Secret that nobody makes", HELPERS, ".Values.server.existingSecret | default", '"" | default', "references"
    ),
    Fault("a key that the Secret has not", "templates/server/secret.yaml", '"api-key"', '"apikey"', "references", ""),
    Fault(
        "a test Pod that may escalate",
        "templates/tests/registry.yaml",
        '{{- include "multigraft.containerSecurity" . | nindent 6 }}',
        "securityContext: {readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}",
        "restricted",
    ),
    Fault("a Pod that may be root", HELPERS, "  runAsNonRoot: true\n", "", "restricted"),
    Fault("the cluster's token in every Pod", HELPERS, "automountServiceAccountToken: false\n", "", "tokens"),
    Fault("Services in the environment", HELPERS, "enableServiceLinks: false", "enableServiceLinks: true", "tokens"),
    Fault("the image's latest state", HELPERS, ":{{ $image.tag | default $tag }}", ":latest", "images"),
    Fault("nothing requested", REGISTRY, "{{- toYaml .resources |", "{{- toYaml (dict) |", "resources"),
    Fault(
        "a drain longer than the grace period",
        SERVER,
        "{{ add .preStopSeconds .options.drainTimeout 10 }}",
        "{{ .options.drainTimeout }}",
        "drain",
    ),
    Fault(
        "a drain that kills",
        SERVER,
        "livenessProbe:\n            httpGet: {path: /health",
        "livenessProbe:\n            httpGet: {path: /ready",
        "probes",
    ),
    Fault("a configuration that changes nothing", SERVER, "checksum/config", "checksum/settings", "rollout"),
    Fault("two writers for one volume", REGISTRY, "type: Recreate", "type: RollingUpdate", "rollout"),
    Fault(
        "a policy that cuts the servers off",
        "templates/networkpolicies.yaml",
        "{port: 8080, protocol: TCP}",
        "{port: 80, protocol: TCP}",
        "network",
    ),
    Fault(
        "tests that cannot reach what they test",
        "templates/tests/server.yaml",
        "app.kubernetes.io/component: test",
        "app.kubernetes.io/component: tests",
        "network",
    ),
    Fault(
        "a test that stays in the way", "templates/tests/server.yaml", "before-hook-creation", "hook-failed", "hooks"
    ),
    Fault("a number as Helm prints it", HELPERS, "{{ $value = int64 $value }}", "", "environment"),
)
