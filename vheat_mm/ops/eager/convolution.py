"""Fast forms of the convolutions on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vheat_mm.ops.eager import onednn


def takes_embed_patches(x: Tensor, conv1: nn.Conv2d, norm1: nn.Module, conv2: nn.Conv2d, norm2: nn.Module) -> bool:
    return onednn.applies(x) and not torch.is_grad_enabled()


def embed_patches(x: Tensor, conv1: nn.Conv2d, norm1: nn.Module, conv2: nn.Conv2d, norm2: nn.Module) -> Tensor:
    """The map between the convolutions is twice as large as any other: it is made image by image, strip by strip."""
    height = x.shape[1]
    half, quarter = -(-height // 2), -(-height // 4)
    row_bytes = x.shape[2] * conv1.out_channels * x.element_size()  # of two rows of that map, for one of the result
    step = min(quarter, max(1, 2 * onednn.GROUP_BYTES // row_bytes))
    images = max(1, 2 * onednn.GROUP_BYTES // (row_bytes * quarter))
    parts = []
    for batch in x.split(images):
        strips = []
        for first in range(0, quarter, step):
            last = min(first + step, quarter)
            # A row of a stride-2 convolution reads rows 2 i - 1 to 2 i + 1: [start, stop) between the two, then above.
            start, stop = max(2 * first - 1, 0), min(2 * last, half)
            rows = batch[:, max(2 * start - 1, 0) : min(2 * stop, height)]
            y = _rows(conv1, rows, start == 0, 2 * stop > height, stop - start == half)
            y = F.gelu(norm1(y))
            strips.append(norm2(_rows(conv2, y, first == 0, 2 * last > half, last - first == quarter)))
        parts.append(strips[0] if len(strips) == 1 else torch.cat(strips, dim=1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows(conv: nn.Conv2d, x: Tensor, at_top: bool, at_bottom: bool, whole: bool) -> Tensor:
    """Convolve a strip, or a whole map; rows of zeros stand in for the border only where the strip has it."""
    border = 0
    if at_top and (at_bottom or whole):
        border = 1
    elif at_top or at_bottom:
        x = F.pad(x, (0, 0, 0, 0, int(at_top), int(at_bottom)))
    dtype = onednn.compute_type(x)
    weight = onednn.prepared_filter(conv.weight, dtype).to(dtype)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, conv.bias, conv.stride, (border, 1))
    return out.permute(0, 2, 3, 1)


def takes_convolve(x: Tensor, conv: nn.Conv2d) -> bool:
    return onednn.applies(x) and not torch.is_grad_enabled() and not conv.weight.is_inference()


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    weight = onednn.prepared_filter(conv.weight, onednn.compute_type(x))
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, conv.bias, conv.stride, conv.padding, groups=conv.groups)
    return out.permute(0, 2, 3, 1)
