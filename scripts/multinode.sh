#!/usr/bin/env bash
# Trains on several nodes: run the same line on each of them. See train_nodes.sbatch for Slurm.
#   NNODES=2                  nodes; MIN:MAX lets a run go on with fewer after a failure
#   HEAD=host:29500           one of the nodes and a free port there, the same on all
#   NGPU=8                    processes per node, one per GPU
#   RUN_ID=nvfp4_titan        name of the run, the same on all nodes
#   MAX_RESTARTS=0            restarts after a failure; each resumes from the newest whole checkpoint
#   CONFIG_FILE=<repository>/train_configs/llama3_debug.toml   options after the script override it
# The dump folder, with the checkpoints, must lie on storage that all nodes share.
# Example: NNODES=16 HEAD=node0:29500 CONFIG_FILE=train_configs/llama3_70b.toml scripts/multinode.sh
set -euo pipefail
: "${NNODES:?set NNODES, the number of nodes}" "${HEAD:?set HEAD=host:port, the same on all nodes}"
. "$(dirname "$(readlink -f "$0")")/env.sh"
# Restarted workers must not meet in the store that holds the addresses of the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
  --nnodes="$NNODES" --nproc-per-node="${NGPU:-8}" --max-restarts="${MAX_RESTARTS:-0}" \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-nvfp4_titan}" \
  --local-ranks-filter="${LOG_RANK:-0}" --role=rank --tee=3 \
  -m nvfp4_titan.train \
  --job.config_file "${CONFIG_FILE:-$ROOT/train_configs/llama3_debug.toml}" "$@"
