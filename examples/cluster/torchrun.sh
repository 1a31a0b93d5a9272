#!/bin/bash
# Start one run on several nodes: run this script on every node at about the same time.
#
#   HEAD=node-1 NNODES=2 RUN_ID=my-run examples/cluster/torchrun.sh CONFIG.toml [--key=value ...]
#
# HEAD     host name or address of the first node
# NNODES   number of nodes; it divides tp * pp * cp * dp
# RUN_ID   any text, equal on all nodes and new for every start
# RAY      1 (default): engines on all nodes, in a Ray cluster that this script starts and stops
#          0: engines on the first node only, or a run without engines
# LOGS     shared folder for Ray's logs, default runs/logs/RUN_ID
#
# The ranks are started by torchrun inside `megatron-entropy train --nnodes`, which keeps them alive after a stop signal
# until the step is saved. It goes on where it stopped when the same command is given again, with a new RUN_ID.
set -euo pipefail

: "${HEAD:?the first node}" "${NNODES:?the number of nodes}" "${RUN_ID:?any text, equal on all nodes}"
port=${PORT:-29400}
ray_port=${RAY_PORT:-6379}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

if [ "${RAY:-1}" = 1 ]; then
    logs=${LOGS:-runs/logs/$RUN_ID}
    mkdir -p "$logs"
    export RAY_ADDRESS=$HEAD:$ray_port
    "$here/ray_node.sh" >"$logs/ray.$(hostname).log" 2>&1 &
    ray=$!
    trap 'kill $ray 2>/dev/null || true; wait $ray || true' EXIT
    python "$here/wait_for_ray.py" "$NNODES"
fi

# In the background, so that a stop signal that reaches this shell is passed on.
megatron-entropy train "$@" --resume \
    --nnodes="$NNODES" --rdzv-endpoint="$HEAD:$port" --rdzv-id="$RUN_ID" &
trainer=$!
trap 'kill -TERM $trainer' TERM
trap 'kill -INT $trainer' INT
code=0
wait $trainer || code=$?
while kill -0 $trainer 2>/dev/null; do # a signal ends `wait` early
    code=0
    wait $trainer || code=$?
done
exit $code
