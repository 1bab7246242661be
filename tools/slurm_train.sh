#!/usr/bin/env bash
# Train through Slurm.
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of tools/train.py]
# In the environment: GPUS (8, in all), GPUS_PER_NODE (8), CPUS_PER_TASK (5), SRUN_ARGS (further options of srun,
# such as --gres=none on nodes without a GPU), PORT. PYTHON names the interpreter.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "usage: [GPUS= GPUS_PER_NODE= CPUS_PER_TASK= SRUN_ARGS= PORT=] $0 PARTITION JOB_NAME CONFIG [options of tools/train.py]" >&2
    exit 2
fi
partition=$1 job_name=$2 config=$3
shift 3
tools=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
if ((gpus_per_node > gpus)); then
    gpus_per_node=$gpus
fi
# Jobs that share a node must not share the port.
export MASTER_PORT=${PORT:-$((20000 + RANDOM % 20000))}
read -ra srun_args <<<"${SRUN_ARGS:-}"

exec srun --partition="$partition" \
    --job-name="$job_name" \
    --gres="gpu:$gpus_per_node" \
    --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    "${srun_args[@]}" \
    "$python" -u "$tools/train.py" "$config" --launcher slurm "$@"
