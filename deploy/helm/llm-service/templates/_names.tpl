{{- define "llm-service.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "llm-service.selector" -}}
app.kubernetes.io/name: llm-service
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "llm-service.labels" -}}
{{ include "llm-service.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
