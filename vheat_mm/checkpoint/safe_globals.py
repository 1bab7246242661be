"""Everything that mends the stack around this package, each with its reason and the version that ends it."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_NUMBERS = '?bBhHiIlLqQefd'


def _numpy_globals() -> list:
    """What a pickled numeric numpy array or scalar names; object arrays stay refused."""
    core = getattr(np, '_core', None) or np.core  # numpy 1.x spells it ``core``
    dtypes = {type(np.dtype(kind)) for kind in _NUMBERS}
    named: list = [np.ndarray, (_number_dtype, 'numpy.dtype'), *dtypes]
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        # files written under either major version name the same two functions differently
        named.append((core.multiarray._reconstruct, f'{module}._reconstruct'))
        named.append((core.multiarray.scalar, f'{module}.scalar'))
    return named


def _number_dtype(kind: object, *_: object) -> np.dtype:
    """All that a pickled array or scalar of numbers uses ``numpy.dtype`` for, as numpy's own, unchangeable object.

    Pickles ask for a copy and then set its state, flags included: one that marks numbers as pointers to objects has
    numpy follow them. On numpy's own objects that does nothing. Byte orders but this machine's are lost with it;
    :func:`~vheat_mm.checkpoint.read_checkpoint` refuses them.
    """
    if not isinstance(kind, str) or kind not in {np.dtype(number).str[1:] for number in _NUMBERS}:
        raise pickle.UnpicklingError('numpy values that are no plain numbers were refused')
    return np.dtype(kind)


def _history_buffer_method(owner: object, name: str) -> object:
    """All that a pickled ``HistoryBuffer`` uses ``getattr`` for: naming its own four statistics."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'GLOBAL getattr({owner!r}, {name!r}) was refused')
    return getattr(owner, name)


def register_safe_globals() -> None:
    """Register the classes found in MMEngine's and the released checkpoints with PyTorch's safe loader.

    ``torch.load`` is safe by default since PyTorch 2.6 and then refuses MMEngine's own training checkpoints,
    whose log history is a pickled ``HistoryBuffer`` of numpy arrays (mmengine <= 0.10.7): ``--resume``,
    ``init_detector`` and the inferencers all fail. Allowing exactly these classes by name keeps safe loading on.
    Does nothing on a PyTorch whose safe loader has no allow-list (< 2.6).
    """
    if torch.__version__ < '2.6':  # cannot allow a class under a given name
        return
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_history_buffer_method, 'builtins.getattr'),
            # The configuration in released checkpoints, read as a plain dict; yacs need not be installed.
            (OrderedDict, 'yacs.config.CfgNode'),
            *_numpy_globals(),
        ]
    )
