#!/usr/bin/env bash
# Train through Slurm; environment variables: see slurm_run.sh.
#   tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of tools/train.py]
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/slurm_run.sh" train "$@"
