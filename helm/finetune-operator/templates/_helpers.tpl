{{- define "finetune.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* finetune-operator -> finetune-router */}}
{{- define "finetune.router" -}}
{{- printf "%s-router" (include "finetune.fullname" . | trimSuffix "-operator") -}}
{{- end -}}

{{- define "finetune.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "finetune.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name: name the ServiceAccount to use, because serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "finetune.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* (dict "root" $ "component" "operator") */}}
{{- define "finetune.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* managed-by is Helm here: objects of the operator's own carry managed-by=finetune-operator. */}}
{{- define "finetune.labels" -}}
{{ include "finetune.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: finetune-operator
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Rules of files/operator-rules.yaml with one of these scopes: (dict "root" $ "scopes" (list "Watched")) */}}
{{- define "finetune.rules" -}}
{{- $scopes := .scopes -}}
{{- range .root.Files.Get "files/operator-rules.yaml" | fromYamlArray }}
{{- if has .scope $scopes }}
- apiGroups: {{ toJson .apiGroups }}
  resources: {{ toJson .resources }}
  verbs: {{ toJson .verbs }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "finetune.tlsSecret" -}}
{{- if eq .Values.statusEndpoint.tls.mode "ExistingSecret" -}}
{{- required "statusEndpoint.tls.existingSecret: name a Secret with tls.crt, tls.key and ca.crt, because statusEndpoint.tls.mode is ExistingSecret" .Values.statusEndpoint.tls.existingSecret -}}
{{- else -}}
{{- printf "%s-tls" (include "finetune.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "finetune.routerSecret" -}}
{{- default (printf "%s-secrets" (include "finetune.router" .)) .Values.router.existingSecret -}}
{{- end -}}

{{- define "finetune.statusHost" -}}
{{- printf "%s.%s.svc" (include "finetune.fullname" .) .Release.Namespace -}}
{{- end -}}

{{/* What the schema cannot say: values that contradict one another. */}}
{{- define "finetune.validate" -}}
{{- $name := include "finetune.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "fullnameOverride: %s, which the objects would be called, is no name for a Service: set one that begins with a letter and has only lower-case letters, digits and '-'" $name) -}}
{{- end -}}
{{- if and (gt (int .Values.operator.replicas) 1) (not .Values.operator.leaderElection) -}}
{{- fail (printf "operator.replicas: %d replicas without operator.leaderElection would both act; set operator.leaderElection=true or operator.replicas=1" (int .Values.operator.replicas)) -}}
{{- end -}}
{{- $lease := .Values.operator.lease -}}
{{- if not (and (gt (float64 $lease.seconds) (float64 $lease.renewSeconds)) (gt (float64 $lease.renewSeconds) (float64 $lease.retrySeconds))) -}}
{{- fail (printf "operator.lease: seconds %v, renewSeconds %v, retrySeconds %v: each must be less than the one before" $lease.seconds $lease.renewSeconds $lease.retrySeconds) -}}
{{- end -}}
{{- if eq (int .Values.statusEndpoint.port) (int .Values.metrics.port) -}}
{{- fail (printf "metrics.port: %d is statusEndpoint.port as well; choose another one" (int .Values.metrics.port)) -}}
{{- end -}}
{{- if and .Values.engine.agentUrl (not .Values.engine.url) -}}
{{- fail "engine.agentUrl: is the agent of engine.url, which is empty; set engine.url" -}}
{{- end -}}
{{- if and .Values.router.enabled (eq (include "finetune.serviceAccount" .) (include "finetune.router" .)) -}}
{{- fail (printf "serviceAccount.name: %s is the router's account, which has no rights; choose another one" .Values.serviceAccount.name) -}}
{{- end -}}
{{- $tls := .Values.statusEndpoint.tls -}}
{{- if and $tls.existingSecret (ne $tls.mode "ExistingSecret") -}}
{{- fail (printf "statusEndpoint.tls.existingSecret: %s is not used with statusEndpoint.tls.mode %s; set the mode to ExistingSecret or remove it" $tls.existingSecret $tls.mode) -}}
{{- end -}}
{{- $pod := dict "FINETUNE_POD_IP" "" "FINETUNE_NAMESPACE" "" -}}
{{- $operator := include "finetune.operatorEnvironment" . | fromYaml | merge $pod -}}
{{- $router := include "finetune.routerEnvironment" . | fromYaml -}}
{{- range $part, $environment := dict "operator" $operator "router" $router -}}
{{- range (get $.Values $part).extraEnv -}}
{{- if hasKey $environment .name -}}
{{- fail (printf "%s.extraEnv: %s is set by the chart from another value; set that one" $part .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $component := dict "root" . "component" "operator" -}}
{{- $own := dict "operator.podLabels" .Values.operator.podLabels "router.podLabels" .Values.router.podLabels -}}
{{- range $part := list "serviceMonitor" "prometheusRule" "dashboard" -}}
{{- $_ := set $own (printf "metrics.%s.labels" $part) (get $.Values.metrics $part).labels -}}
{{- end -}}
{{- range $path, $labels := $own -}}
{{- range $label, $_ := include "finetune.labels" $component | fromYaml -}}
{{- if hasKey (default dict $labels) $label -}}
{{- fail (printf "%s: %s is set by the chart; remove it" $path $label) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- /* As finetune_operator/manifests/pods.py refuses them: the operator would not start. */ -}}
{{- range (default dict .Values.trainer.podDefaults).env -}}
{{- if regexMatch "^(FINETUNE|KUBEFLOW_TRAINER)_" .name -}}
{{- fail (printf "trainer.podDefaults.env: %s is set by the operator; remove it" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Scheduling of a component: (dict "root" $ "component" "router" "values" .Values.router) */}}
{{- define "finetune.scheduling" -}}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
topologySpreadConstraints:
{{- if .values.topologySpreadConstraints }}
{{- toYaml .values.topologySpreadConstraints | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "finetune.selector" . | nindent 8 }}
{{- end }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- end -}}
