# What dist_train.sh and dist_test.sh share. Arguments: the script as it was called, the tool, the
# names of what comes before GPUS, and all that was given to the script.
set -euo pipefail
SCRIPT=$1 TOOL=$2
read -ra NAMES <<<"$3"
shift 3
COUNT=${#NAMES[@]}

if [ $# -le "$COUNT" ]; then
    echo "usage: $SCRIPT ${NAMES[*]} GPUS [options of $TOOL.py]" >&2
    exit 2
fi
FILES=("${@:1:COUNT}")
shift "$COUNT"
GPUS=$1
shift
if ! [[ $GPUS =~ ^[1-9][0-9]*$ ]]; then
    echo "error: GPUS is '$GPUS', and must be a number of processes, 1 or more" >&2
    exit 2
fi
PORT=${PORT:-29500}
# Something listens there already; on the first node, where this run wants to listen itself.
if [ "${NODE_RANK:-0}" = 0 ] && (: <"/dev/tcp/127.0.0.1/$PORT") 2>/dev/null; then
    echo "error: port $PORT is in use, by another run perhaps; set PORT to a free one" >&2
    exit 2
fi
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The checkout's own package, where there is one, goes before an installed one.
PYTHONPATH="$(dirname "$TOOLS")${PYTHONPATH:+:$PYTHONPATH}" \
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="$PORT" \
    --nproc_per_node="$GPUS" \
    "$TOOLS/$TOOL.py" "${FILES[@]}" --launcher pytorch "$@"
