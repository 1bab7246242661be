#!/usr/bin/env bash
# Train with several processes; without a GPU they share the CPU. Environment variables: see dist_run.py.
#   tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
exec "${PYTHON:-$(command -v python || command -v python3)}" "$(dirname -- "${BASH_SOURCE[0]}")/dist_run.py" train "$@"
