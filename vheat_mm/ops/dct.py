"""Matrices of the cosine transform, and the frequencies of its modes."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vheat_mm.ops.registry import is_traced


def dct_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = 'cpu') -> Tensor:
    """Orthonormal DCT-II, shape (N, N): row k is mode k, ``sqrt(2/N) cos(pi k (x + 1/2) / N)``, row 0 over sqrt(2).

    Angles are reduced modulo a full turn in integers, so that high modes of large maps lose no digits.
    """
    k = torch.arange(n, device=device)
    turns = k[:, None] * (2 * k + 1) % (4 * n)  # in units of pi / 2N
    matrix = torch.cos(turns.to(torch.float64) * (math.pi / (2 * n))) * math.sqrt(2 / n)
    matrix[0] = 1 / math.sqrt(n)
    return matrix.to(dtype)


def dct_basis(n: int, like: Tensor) -> Tensor:
    """:func:`dct_matrix` in the type and on the device of ``like``; kept, except for tracers and compilers.

    Those must see the construction, or a tensor of their own; the matrix depends on nothing that can change.
    """
    if torch.compiler.is_compiling() or is_traced(like):
        return dct_matrix(n, like.dtype, like.device)
    return kept_basis(n, like.dtype, like.device)


@functools.lru_cache(maxsize=512)  # for each length of a side one, two of Triton's: detection at 800x1333 needs 120
def kept_basis(
    n: int, dtype: torch.dtype, device: torch.device, inverse: bool = False, side: int | None = None
) -> Tensor:
    """:func:`dct_matrix`, or its inverse, padded with zeros to (side, side)."""
    with torch.inference_mode(False), torch.no_grad():  # a matrix made in inference mode could not serve backward
        matrix = dct_matrix(n, dtype)
        matrix = matrix.mT if inverse else matrix
        padding = 0 if side is None else side - n
        return F.pad(matrix, (0, padding, 0, padding)).contiguous().to(device)


def frequencies_of(like: Tensor) -> Tensor:
    """:func:`squared_frequencies` (H, W, 1) of a map (H, W, C), in its type and on its device; kept as bases are."""
    size = (like.shape[0], like.shape[1])
    if torch.compiler.is_compiling() or is_traced(like):
        return squared_frequencies(*size, like.dtype, like.device).unsqueeze(-1)
    return _kept_frequencies(*size, like.dtype, like.device)


@functools.lru_cache(maxsize=64)
def _kept_frequencies(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return squared_frequencies(height, width, dtype, device).unsqueeze(-1)


def squared_frequencies(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``w_nm = (pi n / H)^2 + (pi m / W)^2``, shape (H, W), in (rad / position)^2."""
    n = torch.arange(height, dtype=dtype, device=device) * (math.pi / height)
    m = torch.arange(width, dtype=dtype, device=device) * (math.pi / width)
    return n.square()[:, None] + m.square()
