#!/usr/bin/env bash
# Start vLLM on this host's loopback address: one-host.sh MODEL [GPUS] [more options of vllm serve]
set -euo pipefail
model=${1:?usage: one-host.sh MODEL [GPUS] [options]}
gpus=${2:-1}
shift $(($# < 2 ? $# : 2))

: "${UPSTREAM_KEY:?the key between the service and vLLM}"
# The environment keeps the key out of the list of processes.
export VLLM_API_KEY=$UPSTREAM_KEY
# Long system prompts and conversations are computed once; usage in chunks is what the service counts by.
exec vllm serve "$model" --host 127.0.0.1 --port "${PORT:-8001}" --tensor-parallel-size "$gpus" \
    --enable-prompt-tokens-details "$@"
