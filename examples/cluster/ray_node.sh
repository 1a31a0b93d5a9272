#!/bin/bash
# Be this node's part of the Ray cluster at RAY_ADDRESS (HOST:PORT) until this process is ended: the node that owns the
# address is the head. Used by torchrun.sh and train.sbatch.
#
# RAY_OPTIONS   more options of `ray start`, for instance fixed ports or --num-cpus
# ENGINE_GPUS   the GPUs that Ray may use, as in CUDA_VISIBLE_DEVICES; needed unless rollout.colocate is true
set -euo pipefail

: "${RAY_ADDRESS:?HOST:PORT of the first node}"
[ -z "${ENGINE_GPUS:-}" ] || export CUDA_VISIBLE_DEVICES=$ENGINE_GPUS
ulimit -Sn "$(ulimit -Hn)" # Ray opens many files

address=$(getent ahostsv4 "${RAY_ADDRESS%:*}" | awk 'NR == 1 { print $1 }')
read -r -a options <<<"${RAY_OPTIONS:-}"
options+=(--block --disable-usage-stats)
if [[ $address == 127.* || " $(hostname -I) " == *" $address "* ]]; then
    [[ $address != 127.* ]] || address=$(hostname -I | awk '{ print $1 }') # /etc/hosts leads the own name to loopback
    exec ray start --head --node-ip-address="$address" --port="${RAY_ADDRESS##*:}" --include-dashboard=false "${options[@]}"
fi
# In the background, so that a signal that reaches this shell ends Ray as well.
trap 'kill $ray; wait $ray; exit 143' TERM INT
for _ in $(seq 60); do # until the head listens
    ray start --address="$RAY_ADDRESS" "${options[@]}" &
    ray=$!
    wait $ray && exit
    sleep 2
done
exit 1
