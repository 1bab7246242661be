#!/usr/bin/env bash
# Make an environment of the maintained forks (requirements/onedl.txt), and run the tests that show what works in it.
#
#   .dev_scripts/check_onedl.sh [VENV]      default: .venv-onedl in the repository
#
#   PYTHON    interpreter to build on (default: python3)
#   MAX_JOBS  compiler processes for onedl-mmcv (default: by cores and memory)
#
# Some 10 minutes, and 10 more where onedl-mmcv was not compiled before; so .ci/run leaves it out.
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${1:-$REPO/.venv-onedl}"
[[ -f $VENV/pyvenv.cfg ]] || "${PYTHON:-python3}" -m venv "$VENV"
PY="$(cd "$VENV" && pwd)/bin/python"
pip() { "$PY" -m pip --disable-pip-version-check "$@"; }

cd "$REPO"
pip install -qq -r requirements/pinned.txt
grep -hE '^(torchvision|imaug|onedl-mm)' requirements/openmmlab.txt requirements/onedl.txt | grep -v ^onedl-mmcv |
    pip install -qq --no-deps -r /dev/stdin
.dev_scripts/build_mmcv.sh "$PY"
pip install -qq --no-deps --no-build-isolation -e .

"$PY" -m vheat_mm.doctor
# The fork's DINO has other parameters (docs/onedl.md), so their number is not that of the model index.
OMP_NUM_THREADS=2 "$PY" -m pytest -q tests/test_configs tests/test_models tests/test_checkpoint \
    tests/test_engine/test_{fileio,resume}.py tests/test_tools/test_train_test.py tests/test_apis/test_{doctor,inferencers}.py \
    --deselect 'tests/test_configs/test_model_index.py::test_counted_parameters_and_recipe[detection/dino-4scale_vheat-t_8xb2-12e_coco.py]'
