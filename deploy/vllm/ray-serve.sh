#!/usr/bin/env bash
# On the head of a Ray cluster: serve one model on the GPUs of all hosts.
#   ray-serve.sh MODEL GPUS_OF_A_HOST HOSTS [more options of vllm serve]
# Tensor parallelism inside a host, where GPUs talk fast; pipeline parallelism between hosts.
set -euo pipefail
usage="usage: ray-serve.sh MODEL GPUS_OF_A_HOST HOSTS [options]"
model=${1:?$usage} gpus=${2:?$usage} hosts=${3:?$usage}
shift 3

: "${UPSTREAM_KEY:?the key between the service and vLLM}"
export VLLM_API_KEY=$UPSTREAM_KEY RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
exec vllm serve "$model" --host "${HOST:-127.0.0.1}" --port "${PORT:-8001}" --distributed-executor-backend ray \
    --tensor-parallel-size "$gpus" --pipeline-parallel-size "$hosts" --enable-prompt-tokens-details "$@"
