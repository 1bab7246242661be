"""Classes that PyTorch's safe loader may create from a checkpoint, beside tensors and containers."""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_NUMBERS = '?bBhHiIlLqQefd'


def _numpy_globals() -> list:
    """Globals of pickled numpy arrays and scalars of numbers; arrays of objects stay refused."""
    core = getattr(np, '_core', None) or np.core  # its name in numpy 1.x is ``core``
    dtypes = {type(np.dtype(kind)) for kind in _NUMBERS}
    named: list = [np.ndarray, (_number_dtype, 'numpy.dtype'), *dtypes]
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        # numpy 1.x and 2.x write different names for the same two functions
        named.append((core.multiarray._reconstruct, f'{module}._reconstruct'))
        named.append((core.multiarray.scalar, f'{module}.scalar'))
    return named


def _number_dtype(kind: object, *_: object) -> np.dtype:
    """``numpy.dtype`` for pickled arrays and scalars of numbers; it returns numpy's own immutable object.

    Pickles ask for a copy and then set its state, with flags that can make numpy treat numbers as pointers to objects.
    Setting the state of numpy's own objects has no effect. Other byte orders than this machine's are lost by that;
    :func:`~vheat_mm.checkpoint.read_checkpoint` refuses them.
    """
    if not isinstance(kind, str) or kind not in {np.dtype(number).str[1:] for number in _NUMBERS}:
        raise pickle.UnpicklingError('numpy values that are not plain numbers were refused')
    return np.dtype(kind)


def _history_buffer_method(owner: object, name: str) -> object:
    """``getattr`` for a pickled ``HistoryBuffer``, which uses it to name its own four statistics only."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'GLOBAL getattr({owner!r}, {name!r}) was refused')
    return getattr(owner, name)


def _empty_bytes() -> bytes:
    """``bytes`` for pickles of empty bytes and arrays, which call it without arguments."""
    return b''


def register_safe_globals() -> None:
    """Allow PyTorch's safe loader the classes in MMEngine's, timm's and the released checkpoints.

    ``torch.load`` is safe by default since PyTorch 2.6 and then refuses MMEngine's own training checkpoints,
    whose log history is a pickled ``HistoryBuffer`` of numpy arrays (mmengine <= 0.10.7): ``--resume``,
    ``init_detector`` and the inferencers all fail. Allowing exactly these classes by name keeps safe loading on.
    Does nothing before PyTorch 2.6.
    """
    if torch.__version__ < '2.6':  # add_safe_globals does not take (class, name) pairs yet
        return
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            argparse.Namespace,  # the arguments in checkpoints of timm's training script
            (_history_buffer_method, 'builtins.getattr'),
            (_empty_bytes, 'builtins.bytes'),
            # The configuration in released checkpoints, read as a plain dict; yacs need not be installed.
            (OrderedDict, 'yacs.config.CfgNode'),
            *_numpy_globals(),
        ]
    )
