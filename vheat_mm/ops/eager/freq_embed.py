"""FVEs brought to the size of a map in training: bicubic interpolation as two matrix products.

PyTorch's own backward of it takes longer than the products, and on CUDA adds in an order that changes from run to run.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vheat_mm.ops import reference
from vheat_mm.ops.autograd import needs_gradient, without_autocast


def _supports(freq_embed: Tensor, size: tuple[int, int]) -> bool | str:
    if not needs_gradient(freq_embed):
        return 'no gradient is recorded'
    if freq_embed.dtype is not torch.float32:
        return f'the FVEs are {freq_embed.dtype}'
    return tuple(freq_embed.shape[:2]) != tuple(size) or 'the size is right already'


@reference.fit_freq_embed.register('fast', _supports)
def fit_freq_embed(freq_embed: Tensor, size: tuple[int, int]) -> Tensor:
    """See :func:`vheat_mm.ops.reference.fit_freq_embed`."""
    h, w, c = freq_embed.shape
    device = freq_embed.device
    with without_autocast(freq_embed):
        rows = _matrix(h, size[0], device) @ freq_embed.reshape(h, w * c)
        return torch.matmul(_matrix(w, size[1], device), rows.view(size[0], w, c))


@functools.lru_cache(maxsize=256)
def _matrix(source: int, target: int, device: torch.device) -> Tensor:
    """Bicubic interpolation of one axis, (target, source): what it makes of every unit vector, in float64."""
    with torch.inference_mode(False), torch.no_grad():
        unit = torch.eye(source, dtype=torch.float64, device='cpu')[None, :, :, None]  # (1, vector, source, 1)
        resized = F.interpolate(unit, size=(target, 1), mode='bicubic', align_corners=False)
        return resized[0, :, :, 0].mT.float().contiguous().to(device)
