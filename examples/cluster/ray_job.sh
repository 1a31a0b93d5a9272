#!/bin/bash
# Train as a job of a Ray cluster that is there already (KubeRay, verl's or your own), from any machine:
#
#   RAY_DASHBOARD=http://head:8265 examples/cluster/ray_job.sh CONFIG.toml --output=/shared/runs/mine [--key=value ...]
#
# The ranks start on the head, whose machine they need for themselves; the engines are Ray actors wherever the cluster
# has room. The paths of CONFIG and this project must be valid on the head. `ray job stop ID` stops after the step and
# saves; the same command goes on from there.
#
# STOP_SECONDS   how long a stopped job may take for its step and checkpoint, default 600
set -euo pipefail

: "${RAY_DASHBOARD:?http://HEAD:8265 of the cluster}"
environment=$(printf '{"env_vars": {"RAY_ADDRESS": "auto", "RAY_JOB_STOP_WAIT_TIME_S": "%s"}}' "${STOP_SECONDS:-600}")
exec ray job submit --address="$RAY_DASHBOARD" --runtime-env-json="$environment" \
    -- megatron-entropy train "$@" --resume
