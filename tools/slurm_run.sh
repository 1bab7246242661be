#!/usr/bin/env bash
# For slurm_train.sh and slurm_test.sh: start tools/train.py or tools/test.py through srun.
# Environment variables: GPUS (in all, default 8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), PORT, PYTHON (interpreter),
# SRUN_ARGS (more options of srun, such as --gres=none on nodes without a GPU).
set -euo pipefail

tool=$1
shift
arguments=(PARTITION JOB_NAME CONFIG)
[[ $tool == test ]] && arguments+=(CHECKPOINT)
if (($# < ${#arguments[@]})); then
    echo "usage: [GPUS= GPUS_PER_NODE= CPUS_PER_TASK= SRUN_ARGS= PORT=] tools/slurm_$tool.sh ${arguments[*]} [options of tools/$tool.py]" >&2
    exit 2
fi
partition=$1 job_name=$2
shift 2
tools=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
gpus_per_node=$((gpus_per_node > gpus ? gpus : gpus_per_node))
# Jobs on the same node need different ports.
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
    "$python" -u "$tools/$tool.py" --launcher slurm "$@"
