"""Frequency value embeddings (FVEs): the size of their grid, and three ways to bring them to another.

Entry ``n`` of a grid with N entries along an axis belongs to the cosine mode with n half waves across the map, that is
to the angular frequency ``pi n / N`` per position. Going from N to N' entries:

- ``pad`` keeps the *number of half waves across the map*: entry n stays entry n, entries above N get zero (there k
  depends on the bias of ``to_k`` alone). Growing keeps every learned value untouched; shrinking drops the highest
  modes. This is how the release prepares detection and segmentation.
- ``bicubic`` and ``bilinear`` keep the *frequency per position*: entry n' takes what was learned at ``n' N / N'``
  (``align_corners=False``, no antialiasing). ``bicubic`` is what the network does at run time for a map whose size
  differs from the grid's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RESIZE_MODES = ('pad', 'bicubic', 'bilinear')
NUM_STAGES = 4


def to_pair(size: int | Sequence[int], name: str) -> tuple[int, int]:
    """Read ``size`` or ``(height, width)`` in pixels; ``name`` is the argument named in errors."""
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in pair):
        raise ValueError(f'{name} must be an int or a pair (height, width) of ints, got {size!r}')
    if min(pair) < 32:
        raise ValueError(f'{name} must be at least 32 pixels a side (the network divides by 32), got {size!r}')
    return pair


def grid_sizes(img_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes (H, W) of the four stages' maps for an image: stride-2 convolutions with padding round up."""
    height, width = img_size
    sizes = []
    for stage in range(NUM_STAGES):
        stride = 4 << stage
        sizes.append((-(-height // stride), -(-width // stride)))
    return sizes


def resize_freq_embed(freq_embed: Tensor, size: tuple[int, int], mode: str = 'pad') -> Tensor:
    """Bring FVEs to another grid; differentiable; returns the input itself where the size is right already.

    Args:
        freq_embed: (H, W, C).
        size: Target (H', W').
        mode: One of ``RESIZE_MODES``, explained at the top of this file.

    Returns:
        (H', W', C) in the type of the input.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f'unknown FVE resize mode {mode!r}, expected one of {RESIZE_MODES}')
    height, width = freq_embed.shape[:2]
    if (height, width) == tuple(size):
        return freq_embed
    if mode == 'pad':
        return F.pad(freq_embed, (0, 0, 0, size[1] - width, 0, size[0] - height))
    # Interpolation in half precision would lose more than the embeddings hold, and some devices lack it.
    exact = freq_embed.to(torch.promote_types(freq_embed.dtype, torch.float32))
    resized = F.interpolate(exact.permute(2, 0, 1)[None], size=size, mode=mode, align_corners=False)
    return resized[0].permute(1, 2, 0).to(freq_embed.dtype)
