{{- define "penstock.name" -}}
{{- $name := printf "%s-%s" .Release.Name .Chart.Name }}
{{- if contains .Chart.Name .Release.Name }}{{ $name = .Release.Name }}{{ end }}
{{- $name | trunc 52 | trimSuffix "-" }}
{{- end }}

{{- define "penstock.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "penstock.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "penstock.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "penstock.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "penstock.name" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- define "penstock.image" -}}
{{- if .Values.image.digest }}{{ printf "%s@%s" .Values.image.repository .Values.image.digest }}{{ else }}{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}{{ end }}
{{- end }}

{{- /* The settings as JSON, from either value. */ -}}
{{- define "penstock.settings" -}}
{{- $settings := .Values.config }}
{{- if .Values.configText }}{{ $settings = fromToml .Values.configText }}{{ end }}
{{- if $settings.Error }}{{ fail (printf "configText is not TOML: %s" $settings.Error) }}{{ end }}
{{- if not $settings.pools }}
{{- fail "config.pools is empty: name at least one pool, such as {name: default, inference_pool: {namespace: models, name: vllm-llama}, picker: {kind: epp, tls: insecure}}, or give a whole file with --set-file configText=penstock.toml" }}
{{- end }}
{{- toJson $settings }}
{{- end }}

{{- define "penstock.listenPort" -}}
{{- $settings := include "penstock.settings" . | fromJson }}
{{- dig "listen" "address" "0.0.0.0:8080" $settings | splitList ":" | last }}
{{- end }}

{{- /* Empty without listen.tls. */ -}}
{{- define "penstock.tlsPort" -}}
{{- $settings := include "penstock.settings" . | fromJson }}
{{- dig "listen" "tls" "address" "" $settings | splitList ":" | last }}
{{- end }}

{{- define "penstock.adminPort" -}}
{{- $settings := include "penstock.settings" . | fromJson }}
{{- $address := dig "admin" "address" "127.0.0.1:9901" $settings }}
{{- if or (hasPrefix "127." $address) (hasPrefix "[::1]" $address) }}
{{- fail (printf "admin.address is %s, which the kubelet's probes cannot reach: set 0.0.0.0:9901 or [::]:9901" $address) }}
{{- end }}
{{- $address | splitList ":" | last }}
{{- end }}

{{- /* toToml writes whole numbers of a values file as floating point, which the settings refuse: JSON's scalars are TOML's. */ -}}
{{- define "penstock.tomlKey" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ toJson . }}{{ end }}
{{- end }}

{{- define "penstock.tomlValue" -}}
{{- if kindIs "map" . -}}
{ {{- range $number, $key := keys . | sortAlpha }}{{ if $number }},{{ end }} {{ include "penstock.tomlKey" $key }} = {{ include "penstock.tomlValue" (get $ $key) }}{{ end }} }
{{- else if kindIs "slice" . -}}
[{{ range $number, $item := . }}{{ if $number }}, {{ end }}{{ include "penstock.tomlValue" $item }}{{ end }}]
{{- else -}}
{{ toJson . }}
{{- end }}
{{- end }}

{{- define "penstock.tomlTable" -}}
{{- range $key := keys . | sortAlpha }}
{{ include "penstock.tomlKey" $key }} = {{ include "penstock.tomlValue" (get $ $key) }}
{{- end }}
{{- end }}

{{- define "penstock.config" -}}
{{- $settings := include "penstock.settings" . | fromJson }}
{{- if .Values.configText }}
{{- .Values.configText }}
{{- else }}
{{- range $key := keys $settings | sortAlpha }}
{{- $value := get $settings $key }}
{{- if kindIs "map" $value }}
[{{ $key }}]
{{- include "penstock.tomlTable" $value }}
{{ else }}
{{- range $value }}
[[{{ $key }}]]
{{- include "penstock.tomlTable" . }}
{{ end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* BPF, NET_ADMIN and PERFMON load the programs, SETUID and SETGID drop root. */ -}}
{{- define "penstock.securityContext" -}}
{{- if .Values.privileged -}}
privileged: true
allowPrivilegeEscalation: true
readOnlyRootFilesystem: true
{{- else -}}
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  add: [BPF, NET_ADMIN, PERFMON, SETUID, SETGID]
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- end }}

{{- /* What path `local` needs of the node, and where streams on path `wire` outlive the agent: outside of /sys, which is read-only. */ -}}
{{- define "penstock.nodeMounts" -}}
- name: cgroup
  mountPath: /sys/fs/cgroup
  readOnly: true
- name: bpffs
  mountPath: /run/penstock/bpf
{{- end }}

{{- define "penstock.nodeVolumes" -}}
- name: cgroup
  hostPath:
    path: /sys/fs/cgroup
    type: Directory
- name: bpffs
  hostPath:
    path: /sys/fs/bpf
    type: Directory
{{- end }}
