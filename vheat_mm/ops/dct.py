"""Cosine matrices and frequencies."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

_BASES: OrderedDict[tuple, Tensor] = OrderedDict()


_MAX_BASES = 256  # a matrix per side length seen: 800x1333 detection needs about 60


def squared_frequencies(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``w_nm = (pi n / H)^2 + (pi m / W)^2``, shape (H, W), in (rad / position)^2."""
    n = torch.arange(height, dtype=dtype, device=device) * (math.pi / height)
    m = torch.arange(width, dtype=dtype, device=device) * (math.pi / width)
    return n.square()[:, None] + m.square()


def dct_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Orthonormal DCT-II, shape (N, N): row k is mode k, ``sqrt(2/N) cos(pi k (x + 1/2) / N)``, row 0 over sqrt(2).

    Angles are reduced modulo a full turn in integers, so that high modes of large maps lose no digits.
    """
    k = torch.arange(n, device=device)
    turns = k[:, None] * (2 * k + 1) % (4 * n)  # in units of pi / 2N
    matrix = torch.cos(turns.to(torch.float64) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    matrix[0] = 1 / math.sqrt(n)
    return matrix.to(dtype)


def basis(n: int, like: Tensor) -> Tensor:
    """:func:`dct_matrix` in the type and on the device of ``like``, computed once."""
    # Tracers and tensor subclasses (fake tensors) must see the construction, not somebody else's tensor.
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return dct_matrix(n, like.dtype, like.device)
    key = (n, like.dtype, like.device)
    if key in _BASES:
        _BASES.move_to_end(key)
        return _BASES[key]
    # A matrix born in inference mode could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        matrix = dct_matrix(n, like.dtype).to(like.device)
    _BASES[key] = matrix
    while len(_BASES) > _MAX_BASES:
        _BASES.popitem(last=False)
    return matrix
