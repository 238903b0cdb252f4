{{/* The operator's environment as YAML; finetune_operator/config.py reads it. */}}
{{- define "finetune.operatorEnvironment" -}}
{{- $files := "/etc/finetune-operator" -}}
{{- $tls := ne .Values.statusEndpoint.tls.mode "Disabled" -}}
FINETUNE_LEADER_ELECTION: {{ .Values.operator.leaderElection | toString | quote }}
FINETUNE_LEASE_SECONDS: {{ .Values.operator.lease.seconds | quote }}
FINETUNE_LEASE_RENEW_SECONDS: {{ .Values.operator.lease.renewSeconds | quote }}
FINETUNE_LEASE_RETRY_SECONDS: {{ .Values.operator.lease.retrySeconds | quote }}
FINETUNE_LOG_FORMAT: {{ .Values.operator.logFormat | quote }}
FINETUNE_PROGRESS_SECONDS: {{ .Values.operator.progressSeconds | quote }}
FINETUNE_DRAIN_SECONDS: {{ .Values.operator.drainSeconds | quote }}
FINETUNE_SUBMISSION_MODE: {{ .Values.trainer.submissionMode | quote }}
FINETUNE_TRAINER_IMAGE: {{ default (printf "finetune-trainer:%s" .Chart.AppVersion) .Values.trainer.image | quote }}
FINETUNE_TERMINATION_GRACE_SECONDS: {{ .Values.trainer.terminationGracePeriodSeconds | quote }}
FINETUNE_STATUS_PORT: {{ .Values.statusEndpoint.port | quote }}
FINETUNE_STATUS_URL: {{ printf "%s://%s:%d" (ternary "https" "http" $tls) (include "finetune.statusHost" .) (int .Values.statusEndpoint.port) | quote }}
FINETUNE_METRICS_PORT: {{ .Values.metrics.port | quote }}
FINETUNE_ACCELERATOR_LABEL: {{ .Values.trainer.acceleratorLabel | quote }}
{{- if .Values.prices.gpuHour }}
FINETUNE_PRICES_FILE: {{ $files }}/settings/prices.yaml
{{- end }}
{{- with .Values.engine.endpoints }}
FINETUNE_ENGINE_ENDPOINTS: {{ join "," . | quote }}
{{- end }}
{{- with .Values.trainer.outputUri }}
FINETUNE_OUTPUT_URI: {{ . | quote }}
{{- end }}
{{- with .Values.watchNamespaces }}
FINETUNE_NAMESPACES: {{ join "," . | quote }}
{{- end }}
{{- if $tls }}
FINETUNE_TLS_CERT_FILE: {{ $files }}/tls/tls.crt
FINETUNE_TLS_KEY_FILE: {{ $files }}/tls/tls.key
FINETUNE_TLS_CA_FILE: {{ $files }}/tls/ca.crt
{{- end }}
{{- if .Values.router.enabled }}
FINETUNE_ROUTER_ADMIN_URLS: http://{{ include "finetune.router" . }}-admin.{{ .Release.Namespace }}.svc:8081
FINETUNE_ROUTER_TOKEN_FILE: {{ $files }}/router/token
{{- end }}
{{- with .Values.engine.url }}
FINETUNE_ENGINE_URL: {{ . | quote }}
{{- end }}
{{- with .Values.engine.agentUrl }}
FINETUNE_AGENT_URL: {{ . | quote }}
{{- end }}
{{- if .Values.engine.agentTokenSecret }}
FINETUNE_AGENT_TOKEN_FILE: {{ $files }}/agent/token
{{- end }}
{{- if .Values.alerts.existingSecret }}
FINETUNE_ALERT_PROVIDERS_FILE: {{ $files }}/alerts/providers.json
{{- end }}
{{- if .Values.trainer.podDefaults }}
FINETUNE_POD_DEFAULTS_FILE: {{ $files }}/settings/pod-defaults.json
{{- end }}
{{- end -}}

{{/* Environment of the router, as a map of YAML. */}}
{{- define "finetune.routerEnvironment" -}}
{{- $files := "/etc/finetune-router" -}}
FINETUNE_ROUTER_HOST: "0.0.0.0"
FINETUNE_ROUTER_PORT: "8080"
FINETUNE_ROUTER_ADMIN_HOST: "0.0.0.0"
FINETUNE_ROUTER_ADMIN_PORT: "8081"
FINETUNE_ROUTER_WORKERS: {{ .Values.router.workers | quote }}
FINETUNE_ROUTER_STATE_DIR: /var/lib/finetune-router
FINETUNE_ROUTER_ROUTES_FILE: {{ $files }}/routes/routes.json
FINETUNE_ROUTER_ADMIN_TOKEN_FILE: {{ $files }}/secrets/admin-token
FINETUNE_ROUTER_SIGNING_KEY_FILE: {{ $files }}/secrets/signing-key
FINETUNE_ROUTER_DRAIN_DELAY: "5"
FINETUNE_ROUTER_GRACE: {{ .Values.router.graceSeconds | quote }}
{{- if .Values.router.apiKeysSecret }}
FINETUNE_ROUTER_API_KEYS_FILE: {{ $files }}/clients/keys
{{- end }}
{{- if .Values.router.upstreamKeySecret }}
FINETUNE_ROUTER_UPSTREAM_API_KEY_FILE: {{ $files }}/upstream/key
{{- end }}
{{- end -}}
