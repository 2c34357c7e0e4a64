{{- /* Names and labels of everything in a release. */ -}}

{{- define "tandem.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 30 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 30 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- /* KubeRay puts labels of its own on its pods, app.kubernetes.io/name among them: what selects is ours alone. */ -}}
{{- define "tandem.selector" -}}
tandem/cluster: {{ include "tandem.fullname" . }}
{{- end }}

{{- define "tandem.labels" -}}
{{ include "tandem.selector" . }}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: tandem
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "tandem.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end }}

{{- /* One RayCluster an image: its prefill and decode pods, and the serve pods that join it, never differ in version. */ -}}
{{- define "tandem.rayCluster" -}}
{{ include "tandem.fullname" . }}-ray-{{ printf "%s %s" (include "tandem.image" .) .Values.ray.version | sha256sum | trunc 8 }}
{{- end }}

{{- /* KubeRay names the head's Service so. */ -}}
{{- define "tandem.rayAddress" -}}
{{ include "tandem.rayCluster" . }}-head-svc.{{ .Release.Namespace }}.svc:{{ int .Values.ray.gcsPort }}
{{- end }}

{{- define "tandem.secrets" -}}
{{ default (printf "%s-secrets" (include "tandem.fullname" .)) .Values.auth.secretsSecret }}
{{- end }}

{{- define "tandem.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "tandem.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end }}

{{- define "tandem.tlsName" -}}
{{ default (printf "%s.%s.svc" (include "tandem.fullname" .) .Release.Namespace) .Values.tls.name }}
{{- end }}

{{- define "tandem.bundledRedis" -}}
{{- if and .Values.redis.enabled .Values.redis.bundled }}true{{ end -}}
{{- end }}
