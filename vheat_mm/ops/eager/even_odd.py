"""Even/odd split of the DCT: heat conduction of a large image with half the products of the reference's transforms.

Even modes of the cosine transform see only the sum of a map and its mirror image, odd modes only the difference: N
positions are transformed by two matrices of half the size instead of one, the first step of a fast cosine transform.

Shapes: image H x W, C channels; of the N modes along a side, N - N // 2 are even and N // 2 are odd.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vheat_mm.ops.dct import dct_basis
from vheat_mm.ops.eager import onednn

# Changes some of the modes (h, w, C) in place, given which rows and columns of all these are.
FilterFn = Callable[[Tensor, slice, slice], None]
Halves = tuple[Tensor, Tensor]  # of even modes, and of odd ones


def filter_dct(x: Tensor, filter_fn: FilterFn, out: Tensor) -> None:
    """Write the inverse DCT2 of what ``filter_fn`` makes of the DCT2 of an image to ``out``.

    Args:
        x: Image (H, W, C).
        filter_fn: See :data:`FilterFn`.
        out: Memory of the result (H, W, C); may be that of ``x``.
    """
    height, width, channels = x.shape
    to_modes, from_modes = _bases(width, x)
    modes = tuple(x.new_empty(height, len(matrix), channels) for matrix in to_modes)
    rows = onednn.slices_per_group(x)
    for image, *parts in zip(x.split(rows), *(half.split(rows) for half in modes), strict=True):
        for matrix, folded, part in zip(to_modes, _fold(image, dim=1), parts, strict=True):
            onednn.multiply_each(matrix, folded, out=part)
    along_h = _bases(height, x)
    for parity, half in enumerate(modes):
        _filter_along_h(half, parity, along_h, filter_fn)
    for result, *parts in zip(out.split(rows), *(half.split(rows) for half in modes), strict=True):
        even, odd = (onednn.multiply_each(matrix, part) for matrix, part in zip(from_modes, parts, strict=True))
        _unfold(even, odd, result, dim=1)


def _filter_along_h(half: Tensor, parity: int, bases: tuple[Halves, Halves], filter_fn: FilterFn) -> None:
    """The same along H, in place, of every other mode along W: (H, W / 2, C)."""
    to_modes, from_modes = bases
    size = onednn.slices_per_group(half.transpose(0, 1))
    for index, part in enumerate(half.split(size, dim=1)):
        first = parity + 2 * size * index
        columns = slice(first, first + 2 * part.shape[1], 2)
        results = []
        for row, folded in enumerate(_fold(part, dim=0)):
            some = onednn.product(to_modes[row], folded.flatten(1).mT).view(folded.shape)
            filter_fn(some, slice(row, None, 2), columns)
            results.append(onednn.product(from_modes[row], some.flatten(1).mT).view(folded.shape))
        _unfold(results[0], results[1], part, dim=0)


def _bases(n: int, like: Tensor) -> tuple[Halves, Halves]:
    """Matrices (n / 2, n / 2) to modes and from modes."""
    matrix, half = dct_basis(n, like), n // 2
    even, odd = matrix[0::2, : n - half].contiguous(), matrix[1::2, :half].contiguous()
    return (even, odd), (even.mT.contiguous(), odd.mT.contiguous())


def _fold(x: Tensor, dim: int) -> Halves:
    """The first half of the positions along ``dim`` plus, and minus, the last half mirrored; a middle one is itself."""
    n = x.shape[dim]
    half = n // 2
    first, last = x.narrow(dim, 0, half), x.narrow(dim, n - half, half).flip(dim)
    odd = first - last
    even = last.add_(first)
    return (even if n % 2 == 0 else torch.cat([even, x.narrow(dim, half, 1)], dim)), odd


def _unfold(even: Tensor, odd: Tensor, out: Tensor, dim: int) -> None:
    """Inverse of :func:`_fold` up to a factor that the matrices hold; writes over ``odd``."""
    half = odd.shape[dim]
    first = even.narrow(dim, 0, half)
    torch.add(first, odd, out=out.narrow(dim, 0, half))
    out.narrow(dim, half, even.shape[dim] - half).copy_(even.narrow(dim, half, even.shape[dim] - half))
    last = torch.sub(first, odd, out=odd).flip(dim)
    out.narrow(dim, even.shape[dim], half).copy_(last)
