"""Convolutions on the CPU: the stem in strips, and what compiled graphs hold in place of PyTorch's convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vheat_mm.ops import reference
from vheat_mm.ops.autograd import compute_dtype, needs_gradient
from vheat_mm.ops.eager import onednn
from vheat_mm.ops.eager.linear import supports_inference
from vheat_mm.ops.library import convolution_flops, convolved_sides, custom_op, stem_flops

Pair = tuple[Tensor, Tensor]
Ints = tuple[int, ...]


def _supports_stem(
    x: Tensor, conv1: Pair, norm1: Pair, eps1: float, conv2: Pair, norm2: Pair, eps2: float
) -> bool | str:
    return supports_inference(x, *conv1, *norm1, *conv2, *norm2)


@reference.embed_patches.register('fast', _supports_stem, compiled=True)
def embed_patches(x: Tensor, conv1: Pair, norm1: Pair, eps1: float, conv2: Pair, norm2: Pair, eps2: float) -> Tensor:
    """See :func:`vheat_mm.ops.reference.embed_patches`."""
    return _embed_patches(x.to(compute_dtype(x)), [*conv1, *norm1, *conv2, *norm2], eps1, eps2)


@custom_op('embed_patches', stem_flops)
def _embed_patches(x: Tensor, parameters: list[Tensor], eps1: float, eps2: float) -> Tensor:
    """The map between the convolutions is twice as large as any other: it is made image by image, strip by strip."""
    weight1, bias1, scale1, shift1, weight2, bias2, scale2, shift2 = parameters
    weight1, bias1, weight2, bias2 = (t.to(x.dtype) for t in (weight1, bias1, weight2, bias2))
    height = x.shape[1]
    half, quarter = -(-height // 2), -(-height // 4)
    row_bytes = x.shape[2] * weight1.shape[0] * x.element_size()  # of two rows of that map, for one of the result
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
            y = _convolve_rows(rows, weight1, bias1, start == 0, 2 * stop > height, stop - start == half)
            y = F.gelu(F.layer_norm(y, scale1.shape, scale1, shift1, eps1)).to(x.dtype)
            y = _convolve_rows(y, weight2, bias2, first == 0, 2 * last > half, last - first == quarter)
            strips.append(F.layer_norm(y, scale2.shape, scale2, shift2, eps2).to(x.dtype))
        parts.append(strips[0] if len(strips) == 1 else torch.cat(strips, dim=1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()


def _convolve_rows(x: Tensor, weight: Tensor, bias: Tensor, at_top: bool, at_bottom: bool, whole: bool) -> Tensor:
    """Convolve a strip, or a whole map; rows of zeros stand in for the border only where the strip has it."""
    border = 0
    if at_top and (at_bottom or whole):
        border = 1
    elif at_top or at_bottom:
        x = F.pad(x, (0, 0, 0, 0, int(at_top), int(at_bottom)))
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, 2, (border, 1)).permute(0, 2, 3, 1)


@_embed_patches.register_fake
def _(x: Tensor, parameters: list[Tensor], eps1: float, eps2: float) -> Tensor:
    sides = [(side + 3) // 4 for side in x.shape[1:3]]
    return x.new_empty(x.shape[0], *sides, parameters[4].shape[0])


def _supports_convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> bool | str:
    return 'a gradient is recorded' if needs_gradient(x, weight, bias) else onednn.supports(x)


@reference.convolve.register('fast', _supports_convolve, compiled=True, eager=False)
def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """See :func:`vheat_mm.ops.reference.convolve`; compilers would change the layout of maps."""
    return _convolve(x.to(compute_dtype(x)), weight, bias, list(stride), list(padding), list(dilation), groups)


@custom_op('convolve', convolution_flops)
def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), bias, stride, padding, dilation, groups)
    return out.permute(0, 2, 3, 1).contiguous()


@_convolve.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    sides = convolved_sides(x.shape[1:3], weight.shape[2:], stride, padding, dilation)
    return x.new_empty(x.shape[0], *sides, weight.shape[0])
