"""Fast forms of :mod:`vheat_mm.positionwise` on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import onednn

# Positions are worked off in groups whose map takes this many bytes: what an MLP makes of them (four times as much)
# stays in the cache, and no allocation is so large that it comes as fresh pages, which cost more than the arithmetic.
GROUP_BYTES = 3 << 19


def takes_by_position(function: Callable[..., Tensor], *maps: Tensor) -> bool:
    first = maps[0]
    return (
        not torch.is_grad_enabled()
        and first.device.type == 'cpu'
        and not onednn.watched(first)
        and first.numel() * first.element_size() > GROUP_BYTES
        and all(m.is_contiguous() and m.shape == first.shape for m in maps)
    )


def by_position(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    width = maps[0].shape[-1]
    rows = [m.view(-1, width) for m in maps]
    groups = -(-maps[0].numel() * maps[0].element_size() // GROUP_BYTES)
    out = rows[-1]
    for group in zip(*(r.tensor_split(groups) for r in rows), strict=True):
        group[-1].copy_(function(*group))
    return out.view(maps[-1].shape)


def takes_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not onednn.applies(x):
        return False
    if _needs_gradient(x, weight):
        # MKL's bfloat16 products are oneDNN's already
        return x.ndim == 4 and onednn.compute_type(x) is torch.float32
    return isinstance(weight, nn.Parameter) and not weight.is_inference()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _needs_gradient(x, weight):
        return onednn.differentiable_product(x, weight.flatten(1), bias)
    dtype = onednn.compute_type(x)
    out = onednn.product(_rows(x, dtype), onednn.prepared(weight, dtype)[0], None if bias is None else bias.to(dtype))
    return out.view(*x.shape[:-1], out.shape[-1])


def takes_split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return onednn.applies(x) and not _needs_gradient(x, weight) and takes_linear(x, weight, bias)


def split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    dtype = onednn.compute_type(x)
    rows = _rows(x, dtype)
    biases = bias.to(dtype).chunk(2)
    first, second = (
        onednn.product(rows, w, b).view(x.shape)
        for w, b in zip(onednn.prepared(weight, dtype, parts=2), biases, strict=True)
    )
    return first, second


def takes_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> bool:
    return not _needs_gradient(x, weight1) and takes_linear(x, weight1, bias1)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    dtype = onednn.compute_type(x)
    hidden = onednn.product(_rows(x, dtype), onednn.prepared(weight1, dtype)[0], bias1.to(dtype), post='gelu')
    out = onednn.product(hidden, onednn.prepared(weight2, dtype)[0], bias2.to(dtype))
    return out.view(*x.shape[:-1], out.shape[-1])


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
