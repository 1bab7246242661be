"""Train a detector, segmentor or classifier: python tools/train.py CONFIG [--help]."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # if the package is not installed

from vheat_mm.apis.train_test import exit_process, run_training

if __name__ == '__main__':
    exit_process(run_training())
