#!/usr/bin/env bash
# Run one host of a Ray cluster in the foreground; ending it ends Ray on this host.
#   ray-node.sh head            on the first host
#   ray-node.sh HEAD_ADDRESS    on every other one
set -euo pipefail
role=${1:?usage: ray-node.sh head | HEAD_ADDRESS}

# Without it whoever reaches a port of Ray runs programs here: `ray get-auth-token --generate`, the same on all hosts.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
# NCCL and Gloo have to agree on the network card; Ray workers inherit these.
export VLLM_HOST_IP=${VLLM_HOST_IP:?the address of this host on the network of the cluster}
if [ "$role" = head ]; then
    exec ray start --head --block --node-ip-address="$VLLM_HOST_IP" --port=6379 --dashboard-host=127.0.0.1 \
        --disable-usage-stats
fi
exec ray start --block --address="$role:6379" --node-ip-address="$VLLM_HOST_IP" --disable-usage-stats
