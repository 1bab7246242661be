"""Environments of subprocesses that use the libraries beside the stack: openmim, transformers and others."""

import os
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / 'interop'


def interop_env(*paths: Path, **variables: str) -> dict[str, str]:
    """The environment with the folder of requirements/interop.txt on PYTHONPATH, after the given paths.

    Without the folder, which `make setup` makes, the test is skipped; in continuous integration it fails.
    """
    if not FOLDER.is_dir():
        reason = f'no {FOLDER}: make setup installs the packages of requirements/interop.txt there'
        (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(reason)
    before = [os.environ['PYTHONPATH']] if os.environ.get('PYTHONPATH') else []
    return os.environ | {'PYTHONPATH': os.pathsep.join([*map(str, paths), *before, str(FOLDER)])} | variables
