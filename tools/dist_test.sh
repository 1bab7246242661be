#!/usr/bin/env bash
# Test with several processes; without a GPU they share the CPU. Environment variables: see dist_run.py.
#   tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of tools/test.py]
exec "${PYTHON:-$(command -v python || command -v python3)}" "$(dirname -- "${BASH_SOURCE[0]}")/dist_run.py" test "$@"
