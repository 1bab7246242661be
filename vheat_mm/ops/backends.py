"""The choice of a backend: ``VHEAT_KERNELS``, read at import, or :func:`use_backend`.

======================  ================================================================================================
``fast`` (default)      optimised kernels in plain PyTorch and oneDNN where they apply, the reference elsewhere
``reference``           the reference everywhere
``triton``              Triton kernels where they apply (NVIDIA GPUs), ``fast`` elsewhere
======================  ================================================================================================
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vheat_mm.ops.registry import set_backend

VARIABLE = 'VHEAT_KERNELS'


def _use(backend: str, where: str) -> str:
    before = set_backend(backend, where)
    if backend == 'triton':
        try:
            # Its kernels register themselves. Triton is optional and takes a second to import, hence not at the top.
            importlib.import_module('vheat_mm.ops.triton')
        except ModuleNotFoundError as error:
            set_backend(before)
            if error.name != 'triton':
                raise
            raise ModuleNotFoundError(f'{where}=triton needs the package triton: pip install triton') from error
    return before


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run a block of code with another backend than ``VHEAT_KERNELS`` says; for tests and measurements.

    Raises:
        ValueError: Unknown backend.
        ModuleNotFoundError: ``'triton'`` without the package triton.
    """
    before = _use(backend, 'backend')
    try:
        yield
    finally:
        set_backend(before)


_use(os.environ.get(VARIABLE) or 'fast', f'environment variable {VARIABLE}')
