{{- /* What all pods of the release share: who they run as, what they may write, what they are told. */ -}}

{{- define "tandem.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int .Values.securityContext.runAsUser }}
runAsGroup: {{ int .Values.securityContext.runAsGroup }}
fsGroup: {{ int .Values.securityContext.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "tandem.containerSecurity" -}}
runAsNonRoot: true
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* A Service named tandem would give every pod of its namespace TANDEM_PORT=tcp://..., which is a setting. */ -}}
{{- define "tandem.podBasics" -}}
enableServiceLinks: false
securityContext:
  {{- include "tandem.podSecurity" . | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "tandem.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}

{{- define "tandem.env" -}}
- name: HOME
  value: /tmp
- name: XDG_CACHE_HOME
  value: /var/cache/tandem
- name: HF_HOME
  value: /var/cache/tandem/huggingface
- name: OMP_WAIT_POLICY
  value: passive
{{- end }}

{{- /* Of every process of Ray; docs/ray.md says why. */ -}}
{{- define "tandem.rayEnv" -}}
- name: RAY_gcs_rpc_server_reconnect_timeout_s
  value: {{ int .Values.ray.reconnectSeconds | quote }}
- name: RAY_worker_niceness
  value: "0"
- name: RAY_memory_monitor_refresh_ms
  value: "0"
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- if .Values.ray.auth }}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ include "tandem.secrets" . }}, key: ray-token}
{{- end }}
{{- end }}

{{- define "tandem.podIp" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}

{{- /* Of a container that runs Ray or a part of Tandem: what it may write, and what it reads. */ -}}
{{- define "tandem.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: run, mountPath: /run/tandem}
- {name: cache, mountPath: /var/cache/tandem}
- {name: shm, mountPath: /dev/shm}
{{- if .Values.tls.enabled }}
- {name: tls, mountPath: /etc/tandem-tls, readOnly: true}
{{- end }}
{{- if .Values.tls.clientSecret }}
- {name: tls-client, mountPath: /etc/tandem-client, readOnly: true}
{{- end }}
{{- if .Values.model.existingClaim }}
- {name: models, mountPath: {{ .Values.model.mountPath }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "tandem.volumes" -}}
- name: tmp
  emptyDir: {}
- name: run
  emptyDir: {}
- name: cache
  emptyDir: {}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ div (int .Values.ray.objectStoreBytes) 1048576 | add 48 }}Mi}
{{- if .Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ required "tls.secret: a Secret with tls.crt, tls.key and ca.crt is needed where tls.enabled" .Values.tls.secret }}, defaultMode: 0440}
{{- end }}
{{- if .Values.tls.clientSecret }}
- name: tls-client
  secret: {secretName: {{ .Values.tls.clientSecret }}, defaultMode: 0440}
{{- end }}
{{- if .Values.model.existingClaim }}
- name: models
  persistentVolumeClaim: {claimName: {{ .Values.model.existingClaim }}, readOnly: true}
{{- end }}
{{- end }}

{{- /* Flags by which a command of a pod gets in at the routers' public doors. */ -}}
{{- define "tandem.clientFlags" -}}
{{- if .Values.tls.enabled }} --tls-ca /etc/tandem-tls/ca.crt --tls-name {{ include "tandem.tlsName" . }}{{ end }}
{{- if .Values.tls.clientSecret }} --tls-cert /etc/tandem-client/tls.crt --tls-key /etc/tandem-client/tls.key{{ end }}
{{- end }}

{{- define "tandem.operatorKey" -}}
{{- if .Values.auth.operatorKeySecret }}
- name: TANDEM_API_KEY
  valueFrom:
    secretKeyRef: {name: {{ .Values.auth.operatorKeySecret }}, key: {{ .Values.auth.operatorKeyKey }}}
{{- end }}
{{- end }}

{{- /* A page of the routers as a probe. The kubelet shows no certificate: where clients need one, curl asks instead. */ -}}
{{- define "tandem.pageProbe" -}}
{{- $ := index . 0 }}{{ $path := index . 1 -}}
{{- if $.Values.tls.clientCaSecret -}}
exec:
  command:
    - /bin/sh
    - -c
    - >-
      exec curl --fail --silent --show-error --output /dev/null --max-time 4
      --cacert /etc/tandem-tls/ca.crt --cert /etc/tandem-client/tls.crt --key /etc/tandem-client/tls.key
      --resolve "{{ include "tandem.tlsName" $ }}:{{ int $.Values.serve.httpPort }}:$TANDEM_HOST"
      https://{{ include "tandem.tlsName" $ }}:{{ int $.Values.serve.httpPort }}{{ $path }}
{{- else -}}
httpGet: {path: {{ $path }}, port: http, scheme: {{ ternary "HTTPS" "HTTP" $.Values.tls.enabled }}}
{{- end -}}
{{- end }}

{{- /* The raylet answers at its port with gRPC's own health service; it says more than an open port. */ -}}
{{- define "tandem.rayletProbe" -}}
grpc: {port: {{ int .Values.ray.nodeManagerPort }}}
{{- end }}

{{- define "tandem.redisEnv" -}}
{{- if .Values.redis.enabled }}
{{- if .Values.redis.bundled }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ include "tandem.secrets" . }}, key: redis-password}
- name: TANDEM_REDIS
  value: redis://:$(REDIS_PASSWORD)@{{ include "tandem.fullname" . }}-redis.{{ .Release.Namespace }}.svc:6379/0
{{- else }}
- name: TANDEM_REDIS
  valueFrom:
    secretKeyRef:
      name: {{ required "redis.urlSecret: a Secret with the URL of your Redis is needed where redis.bundled is false" .Values.redis.urlSecret }}
      key: {{ .Values.redis.urlKey }}
{{- end }}
{{- end }}
{{- end }}
