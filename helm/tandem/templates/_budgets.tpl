{{- /* How long pods may take to end: what they are told to take, and then what is needed to stop in order. */ -}}

{{- /* Routers and workers stop within stop_timeout_s each, Ray within 10 s, what is left is killed within 7 s. */ -}}
{{- define "tandem.stopSeconds" -}}
{{ add (mul 2 (int .Values.serve.stopSeconds)) 17 }}
{{- end }}

{{- /* preStop: settle, then drain; then the stop, and 15 s to spare, some of it for Ray's node beside it. */ -}}
{{- define "tandem.serveGraceSeconds" -}}
{{ add (int .Values.serve.settleSeconds) (int .Values.serve.drainSeconds) (include "tandem.stopSeconds" . | int) 15 }}
{{- end }}

{{- /* preStop: 10 s to tell Ray and to find the routers, then the drain; then Ray's own end. */ -}}
{{- define "tandem.rayGraceSeconds" -}}
{{ add 10 (int .Values.serve.drainSeconds) 30 }}
{{- end }}
