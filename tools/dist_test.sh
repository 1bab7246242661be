#!/usr/bin/env bash
# Test with several processes; without a GPU they share the CPU.
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
# Over several machines: NNODES, NODE_RANK, MASTER_ADDR, PORT in the environment. PYTHON names the interpreter.
set -euo pipefail

if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [NNODES= NODE_RANK= MASTER_ADDR= PORT=] $0 CONFIG CHECKPOINT GPUS [options of tools/test.py]" >&2
    exit 2
fi
config=$1 checkpoint=$2 gpus=$3
shift 3
tools=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
exec "$python" "$tools/dist_run.py" "$gpus" "$tools/test.py" "$config" "$checkpoint" --launcher pytorch "$@"
