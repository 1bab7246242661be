"""Matrix products of CPUs through oneDNN, and how maps are divided into groups that stay in the cache.

PyTorch hands float32 products to MKL, which on some AMD processors falls far behind oneDNN, and hands products in
bfloat16 to oneDNN anyway. PyTorch's compiler calls oneDNN through operators of its own, which are used here; they know
no gradients. The public way with gradients is a 1x1 convolution.

Weights go in as they are: packed copies would be wrong after any write that leaves no trace on a tensor, and comparing
all contents takes as long as packing. They would save 2 to 5 % of a forward pass (vHeat-T, one core of an AMD EPYC).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from vheat_mm.ops.autograd import compute_dtype, upcast
from vheat_mm.ops.registry import is_traced

# Rows are computed in groups whose map takes this many bytes: what an MLP makes of them (four times as much) stays in
# the cache, and no allocation is so large that it comes as fresh pages, which cost more than the arithmetic.
GROUP_BYTES = 3 << 20

COPIES_BYTES = 1 << 19  # of a matrix that a batch of products shares

DTYPES = (torch.float32, torch.bfloat16)

_works: dict[torch.dtype, str] = {}  # why oneDNN's products of a type fail on this CPU; empty where they work


def probe() -> None:
    """Ask once which types oneDNN multiplies here, and log those that it does not.

    oneDNN has no bfloat16 products on CPUs without AVX-512; PyTorch's reference operators run everywhere.
    """
    for dtype in DTYPES:
        if dtype not in _works:
            _works[dtype] = _why_not(dtype)
            if _works[dtype]:
                message = f'oneDNN has no products in {dtype} here ({_works[dtype]}): the reference operators run'
                print_log(message, logger='current', level=logging.INFO)


def _why_not(dtype: torch.dtype) -> str:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, '_linear_pointwise'):
        return 'this PyTorch is built without oneDNN'
    try:
        with torch.no_grad(), torch.autocast('cpu', enabled=False):
            x = torch.ones(64, 16, dtype=dtype, device='cpu')
            product(x, x, x.new_ones(64), post='gelu')
            _convolution_gradient(x, x)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0]
    return ''


def supports(x: Tensor) -> bool | str:
    """Whether oneDNN takes products of a map, in eager mode or a compiled graph; otherwise why not."""
    dtype = compute_dtype(x)
    if x.device.type != 'cpu':
        return f'{x.device.type} is not a CPU'
    if x.dtype not in DTYPES or dtype not in DTYPES:
        return f'{dtype} is neither float32 nor bfloat16'
    if torch.compiler.is_compiling():
        # asked when the network was built
        return _works.get(dtype, 'not asked yet') == '' or 'oneDNN lacks this type here'
    if x.numel() == 0:
        return 'an empty map'
    if not torch._C._get_mkldnn_enabled():
        return 'torch.backends.mkldnn.enabled is False'
    if dtype not in _works:
        probe()
    return _works[dtype] or True


def runs_on_cpu(x: Tensor) -> bool:
    """Whether :func:`supports` holds for ``x`` in eager mode and nothing traces it: for kernels that call kernels."""
    return not torch.compiler.is_compiling() and not is_traced(x) and supports(x) is True


def group_rows(x: Tensor) -> int:
    """Rows of a map (..., C) to compute at a time: on the CPU :data:`GROUP_BYTES` at most, elsewhere all."""
    width = x.shape[-1]
    rows = max(1, x.numel() // width)
    if x.device.type != 'cpu' or rows * width * x.element_size() <= GROUP_BYTES:
        return rows
    # multiples of 64 rows: the kernels of oneDNN for gradients are fastest there
    return max(64, GROUP_BYTES // (width * x.element_size()) // 64 * 64)


def slices_per_group(x: Tensor) -> int:
    """How many slices of a map along its first dimension make a group of :data:`GROUP_BYTES`, one at least."""
    return max(1, GROUP_BYTES // max(1, x.shape[1:].numel() * x.element_size()))


def split_rows(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows (M, C) of maps (..., C), a group at a time."""
    size = group_rows(maps[0])
    return zip(*(m.reshape(-1, m.shape[-1]).split(size) for m in maps), strict=True)


def empty_rows(like: Tensor) -> Tensor:
    """A map to fill by :func:`split_rows`: contiguous whatever the layout of ``like``, as rows are then no copies."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, post: str = 'none') -> Tensor:
    """``post(x @ weight^T + bias)`` without gradients: x (M, K), weight (N, K), bias (N,) -> (M, N), all of one type.

    Args:
        x: Rows, contiguous.
        weight: Any layout.
        bias: Optional.
        post: ``'none'`` or ``'gelu'`` (exact).
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, post, [], 'none' if post == 'gelu' else '')


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias`` without gradients on any device: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    if x.dtype is torch.float32 and runs_on_cpu(x):
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def linear_with_grad(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight^T + bias`` with gradients, on any device: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    if x.ndim == 4 and compute_dtype(x) is torch.float32 and runs_on_cpu(x):
        return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return F.linear(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of ``x @ weight^T + bias``: grad (M, N), x (M, K) -> (N, K), (N,), upcast."""
    if grad.dtype is torch.float32 and runs_on_cpu(grad):
        return _convolution_gradient(grad, x)
    return upcast(grad.mT @ x), upcast(grad.sum(0))  # in float32 inside, and rounded once


def _convolution_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`weight_gradient` as that of a 1x1 convolution: oneDNN's product is slow when both operands are tall."""
    (m, n), k = grad.shape, x.shape[1]
    side = next(s for s in (64, 32, 16, 8, 4, 2, 1) if m % s == 0)
    as_map = [t.reshape(1, m // side, side, -1).permute(0, 3, 1, 2) for t in (grad, x)]
    weight = grad.new_empty(n, k, 1, 1)
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        *as_map, weight, [n], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, True]
    )
    return grad_weight.view(n, k), grad_bias


def multiply_each(matrix: Tensor, maps: Tensor, out: Tensor | None = None) -> Tensor:
    """``matrix @ map`` of each map without gradients, into ``out`` if given: (N, K), (B, K, C) -> (B, N, C)."""
    if maps.dtype is torch.float32:  # MKL takes one matrix for all
        return torch.bmm(matrix.expand(len(maps), *matrix.shape), maps, out=out)
    # oneDNN reads a matrix of its own for each map, and copies of one are made at every call: so few, and once.
    out = maps.new_empty(len(maps), len(matrix), maps.shape[2]) if out is None else out
    some = min(len(maps), max(1, COPIES_BYTES // max(1, matrix.numel() * matrix.element_size())))
    copies = matrix.expand(some, *matrix.shape).contiguous()
    for few, result in zip(maps.split(some), out.split(some), strict=True):
        torch.bmm(copies[: len(few)], few, out=result)
    return out
