#!/usr/bin/env bash
# Test on several GPUs (or, without any, in several CPU processes over gloo):
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
# Several nodes: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
exec bash "$(dirname "${BASH_SOURCE[0]}")/_launch.sh" "$0" test "CONFIG CHECKPOINT" "$@"
