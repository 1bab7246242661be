#!/usr/bin/env bash
# Test through Slurm; environment variables: see slurm_run.sh.
#   tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of tools/test.py]
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/slurm_run.sh" test "$@"
