"""Predict on images, folders and videos: python tools/predict.py CONFIG CHECKPOINT SOURCE --out DIR [--help]."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the repository, or vheat_mm/.mim of an installed package
PACKAGE = ROOT.parent if ROOT.name == '.mim' else ROOT / 'vheat_mm'
sys.path.append(str(PACKAGE.parent))  # if the package is not installed
# Else the network's threads wait in busy loops for the one whose core reads or paints: up to 40 times slower.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
# Signals are handled from now on, while torch is imported.
runpy.run_path(str(PACKAGE / 'utils' / 'process.py'))['prepare_start'](training=False)

from vheat_mm.apis.inference.command import run_prediction  # noqa: E402

if __name__ == '__main__':
    sys.exit(run_prediction())
