#!/usr/bin/env bash
# Train with several processes; without a GPU they share the CPU.
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# Over several machines: NNODES, NODE_RANK, MASTER_ADDR, PORT in the environment. PYTHON names the interpreter.
set -euo pipefail

if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [NNODES= NODE_RANK= MASTER_ADDR= PORT=] $0 CONFIG GPUS [options of tools/train.py]" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2
tools=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
exec "$python" "$tools/dist_run.py" "$gpus" "$tools/train.py" "$config" --launcher pytorch "$@"
