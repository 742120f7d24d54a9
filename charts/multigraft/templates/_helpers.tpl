{{- define "multigraft.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* At most 40 characters, so that every name made of it stays below 63. */}}
{{- define "multigraft.fullname" -}}
{{- $name := include "multigraft.name" . }}
{{- $full := contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name) }}
{{- .Values.fullnameOverride | default $full | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "multigraft.selectorLabels" -}}
app.kubernetes.io/name: {{ include "multigraft.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "multigraft.labels" -}}
{{ include "multigraft.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* (list root image default-tag) -> where the image is */}}
{{- define "multigraft.image" -}}
{{- $root := index . 0 }}{{ $image := index . 1 }}{{ $tag := index . 2 }}
{{- with $root.Values.imageRegistry }}{{ trimSuffix "/" . }}/{{ end }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default $tag }}{{ end }}
{{- end }}

{{- define "multigraft.registryImage" -}}
{{ include "multigraft.image" (list . .Values.registry.image .Chart.AppVersion) }}
{{- end }}

{{- define "multigraft.serverImage" -}}
{{- $variant := gt (int .Values.server.gpu.count) 0 | ternary "cuda" "cpu" }}
{{- include "multigraft.image" (list . .Values.server.image (printf "%s-%s" .Chart.AppVersion $variant)) }}
{{- end }}

{{/* What every Pod of the chart has in common: no token of the cluster's, no Service's address in its environment
     (MULTIGRAFT_REGISTRY_PORT would be read as an option), and the rules of Pod Security "restricted". */}}
{{- define "multigraft.pod" -}}
serviceAccountName: {{ include "multigraft.fullname" . }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "multigraft.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* (list prefix options) -> {maxRank: 64} as PREFIX_MAX_RANK: "64"; a list is joined by spaces. */}}
{{- define "multigraft.options" -}}
{{- $prefix := index . 0 }}
{{- range $name, $value := index . 1 }}
{{- if kindIs "slice" $value }}{{ $value = join " " $value }}{{ end }}
{{- if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ $value = int64 $value }}{{ end }}
{{ $prefix }}_{{ $name | snakecase | upper }}: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{/* (list root secret key...) -> the data of a generated Secret: what is in the cluster stays, what is missing is drawn. */}}
{{- define "multigraft.keys" -}}
{{- $root := index . 0 }}{{ $name := index . 1 }}
{{- $there := (lookup "v1" "Secret" $root.Release.Namespace $name).data | default dict }}
{{- range $key := slice . 2 }}
{{ $key }}: {{ index $there $key | default (randAlphaNum 40 | b64enc) }}
{{- end }}
{{- end }}

{{- define "multigraft.registrySecret" -}}
{{ .Values.registry.existingSecret | default (printf "%s-registry" (include "multigraft.fullname" .)) }}
{{- end }}

{{- define "multigraft.serverSecret" -}}
{{ .Values.server.existingSecret | default (printf "%s-server" (include "multigraft.fullname" .)) }}
{{- end }}

{{- define "multigraft.registryUrl" -}}
http://{{ include "multigraft.fullname" . }}-registry:{{ .Values.registry.service.port }}
{{- end }}

{{/* true where `helm test` can push an adapter and be answered by it, since the server loads what it pushed. */}}
{{- define "multigraft.testsThroughAdapter" -}}
{{- with .Values.server }}
{{- if and $.Values.registry.enabled (not .hub.url) (eq .options.base "seedling") (not .options.allow) }}true{{ end }}
{{- end }}
{{- end }}

{{/* What values.schema.json cannot say. */}}
{{- define "multigraft.validate" -}}
{{- with .Values.server }}
{{- if not (or .enabled $.Values.registry.enabled) }}
{{- fail "registry.enabled and server.enabled are both false: nothing would be installed" }}
{{- end }}
{{- if and .enabled (not $.Values.registry.enabled) (not .hub.url) }}
{{- fail "registry.enabled is false: server.hub.url must name a registry" }}
{{- end }}
{{- with .autoscaling }}{{ if and .enabled (gt (int .minReplicas) (int .maxReplicas)) }}
{{- fail (printf "server.autoscaling.minReplicas %v is above maxReplicas %v" .minReplicas .maxReplicas) }}
{{- end }}
{{- if and .enabled (not .cpuPercent) (not .podMetric) }}
{{- fail "server.autoscaling needs cpuPercent or podMetric" }}
{{- end }}{{ end }}
{{- if not (or .rollout.maxSurge .rollout.maxUnavailable) }}
{{- fail "server.rollout.maxSurge and maxUnavailable are both 0: no upgrade could proceed" }}
{{- end }}
{{- if and .bases.enabled (not .bases.existingClaim) (eq .bases.accessMode "ReadWriteOnce") }}
{{- if or .autoscaling.enabled (gt (int .replicas) 1) .rollout.maxSurge }}
{{- fail "server.bases.accessMode ReadWriteOnce allows one server: replicas 1, rollout.maxSurge 0, no autoscaling" }}
{{- end }}
{{- end }}
{{- if and .options.graphs (not .gpu.count) }}
{{- fail "server.options.graphs needs a GPU: server.gpu.count is 0" }}
{{- end }}
{{- end }}
{{- end }}
