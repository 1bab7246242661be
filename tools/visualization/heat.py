"""Draw what a network has learnt: python tools/visualization/heat.py KIND [--help]."""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the repository, or vheat_mm/.mim of an installed package
PACKAGE = ROOT.parent if ROOT.name == '.mim' else ROOT / 'vheat_mm'
sys.path.append(str(PACKAGE.parent))  # if the package is not installed
# Else the network's threads wait in busy loops for the one whose core reads or paints: up to 40 times slower.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
# Signals are handled from now on, while torch is imported.
runpy.run_path(str(PACKAGE / 'utils' / 'process.py'))['prepare_start'](training=False)

from vheat_mm.apis.heat.command import run_heat  # noqa: E402

if __name__ == '__main__':
    sys.exit(run_heat())
