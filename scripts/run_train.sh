#!/usr/bin/env bash
# Trains with torchtitan in NVFP4 on this machine, with or without GPUs.
#   NGPU=1                    processes, one per GPU (on a CPU: any number)
#   CONFIG_FILE=<repository>/train_configs/llama3_debug.toml   options after the script override it
#   LOG_RANK=0                ranks whose log is shown
# Example: NGPU=8 CONFIG_FILE=train_configs/llama3_8b.toml scripts/run_train.sh --training.steps 100
set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/env.sh"
exec python -m nvfp4_titan.train \
  --job.config_file "${CONFIG_FILE:-$ROOT/train_configs/llama3_debug.toml}" "$@"
