#!/usr/bin/env bash
# Train on several GPUs (or, without any, in several CPU processes over gloo):
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
exec bash "$(dirname "${BASH_SOURCE[0]}")/_launch.sh" "$0" train "CONFIG" "$@"
