#!/usr/bin/env bash
# Run the service in front of vLLM, from the folder of the service: front.sh MODEL URL [URL ...]
set -euo pipefail
model=${1:?usage: front.sh MODEL URL [URL ...]}
shift
(($#)) || set -- http://127.0.0.1:8001/v1

urls=$(printf '"%s",' "$@")
export MODEL__ENGINE=remote MODEL__NAME="$model" REMOTE__BASE_URLS="[${urls%,}]"
export REMOTE__API_KEY="${UPSTREAM_KEY:?the key between the service and vLLM}"
exec "${PYTHON:-.venv/bin/python}" -m app serve
