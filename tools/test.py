"""Test a detector, segmentor or classifier: python tools/test.py CONFIG CHECKPOINT [--help]."""

import sys
from pathlib import Path

try:
    import vheat_mm  # noqa: F401
except ModuleNotFoundError as error:  # not installed: take the package this file lies beside
    if error.name != 'vheat_mm':
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vheat_mm.apis.train_test import leave, run_testing

if __name__ == '__main__':
    leave(run_testing())
