"""Environments of subprocesses that use the libraries beside the stack: openmim, transformers and others."""

import os
import sys
from pathlib import Path

import pytest


def skip_or_fail(reason: str) -> None:
    """Skip the test; fail in continuous integration, where nothing may be missing."""
    (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(reason)


def interop_folder() -> Path:
    """The folder of requirements/interop.txt, which ``make setup`` makes; see :func:`skip_or_fail`."""
    folder = Path(sys.prefix) / 'interop'
    if not folder.is_dir():
        skip_or_fail(f'no {folder}: make setup installs the packages of requirements/interop.txt there')
    return folder


def interop_env(*paths: Path, **variables: str) -> dict[str, str]:
    """This process's environment variables with ``paths`` and, at last, that folder on PYTHONPATH."""
    before = [os.environ['PYTHONPATH']] if os.environ.get('PYTHONPATH') else []
    path = os.pathsep.join([*map(str, paths), *before, str(interop_folder())])
    return os.environ | {'PYTHONPATH': path} | variables
