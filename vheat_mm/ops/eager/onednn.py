"""Matrix products of the CPU through oneDNN.

PyTorch hands float32 products to MKL, which on some AMD processors falls far behind oneDNN, and hands products in
bfloat16 to oneDNN anyway. PyTorch's compiler calls oneDNN through operators of its own, which are used here; they know
no gradients. The public way with gradients is a 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# Positions are worked off in groups whose map takes this many bytes: what an MLP makes of them (four times as much)
# stays in the cache, and no allocation is so large that it comes as fresh pages, which cost more than the arithmetic.
GROUP_BYTES = 3 << 20

COPIES_BYTES = 1 << 19  # of a matrix that a batch of products shares

TYPES = (torch.float32, torch.bfloat16)
_PACK_ROWS = 4096  # the number of rows that weights are laid out for; others work too

# weight -> what it was prepared from and the result, by (type, number of parts)
_PREPARED: Any = WeakTensorKeyDictionary()


def applies(x: Tensor) -> bool:
    """Whether a map can go to oneDNN: on the CPU, float32 or bfloat16, and nobody watching PyTorch's operators.

    Tracers, compilers, counters of operations and function transforms know the operators of the reference form only.
    """
    return (
        x.device.type == 'cpu'
        and x.dtype in TYPES
        and x.numel() > 0
        and compute_type(x) in TYPES
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
        and not watched(x)
    )


def watched(x: Tensor) -> bool:
    """Whether operators on ``x`` are being traced, compiled, counted or transformed."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def compute_type(x: Tensor) -> torch.dtype:
    """Type that a matrix product of ``x`` is computed in: autocast's where it is on."""
    if not hasattr(torch, 'get_autocast_dtype'):  # PyTorch before 2.4, where no fast form runs
        return x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd is recording any of the tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def group_rows(x: Tensor) -> int:
    """Rows of a map (..., C) to work off at a time: on the CPU :data:`GROUP_BYTES` at most, elsewhere all."""
    width = x.shape[-1]
    rows = max(1, x.numel() // width)
    if x.device.type != 'cpu' or rows * width * x.element_size() <= GROUP_BYTES:
        return rows
    # multiples of 64 rows: what oneDNN's kernels of gradients like best
    return max(64, GROUP_BYTES // (width * x.element_size()) // 64 * 64)


def slices_at_a_time(x: Tensor) -> int:
    """How many slices of a map along its first dimension make a group of :data:`GROUP_BYTES`, one at least."""
    return max(1, GROUP_BYTES // (x[0].numel() * x.element_size()))


def split_rows(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows (M, C) of maps (..., C), a group at a time."""
    size = group_rows(maps[0])
    return zip(*(m.reshape(-1, m.shape[-1]).split(size) for m in maps), strict=True)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight^T + bias`` without gradients on any device: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    if x.dtype is torch.float32 and applies(x):
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def weight_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of ``x @ weight^T + bias``: grad (M, N), x (M, K) -> (N, K), (N,), widened."""
    (m, n), k = grad.shape, x.shape[1]
    if not (grad.dtype is torch.float32 and applies(grad)):
        return widened(grad.mT @ x), widened(grad.sum(0))  # in float32 inside, and rounded once
    # Of a 1x1 convolution: oneDNN's product reads its second operand by columns, which is slow when both are tall.
    side = next(s for s in (64, 32, 16, 8, 4, 2, 1) if m % s == 0)
    as_map = [t.reshape(1, m // side, side, -1).permute(0, 3, 1, 2) for t in (grad, x)]
    weight = grad.new_empty(n, k, 1, 1)
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        *as_map, weight, [n], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, True]
    )
    return grad_weight.view(n, k), grad_bias


def widened(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def empty_rows(like: Tensor) -> Tensor:
    """A map to fill by :func:`split_rows`: contiguous whatever the layout of ``like``, as rows are then no copies."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, post: str = 'none') -> Tensor:
    """``post(x @ weight^T + bias)`` without gradients: x (M, K), weight (N, K), bias (N,) -> (M, N), all of one type.

    Args:
        x: Rows, contiguous.
        weight: Plain, or as :func:`prepared` returns it.
        bias: Plain.
        post: ``'none'`` or ``'gelu'`` (exact).
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, post, [], 'none' if post == 'gelu' else '')


def multiply_each(matrix: Tensor, maps: Tensor, out: Tensor | None = None) -> Tensor:
    """``matrix @ map`` of each map without gradients, into ``out`` if given: (N, K), (B, K, C) -> (B, N, C)."""
    if maps.dtype is torch.float32:  # MKL takes one matrix for all
        return torch.bmm(matrix.expand(len(maps), *matrix.shape), maps, out=out)
    # oneDNN reads a matrix of its own for each map, and copies of one are made at every call: so few, and once.
    out = maps.new_empty(len(maps), len(matrix), maps.shape[2]) if out is None else out
    some = min(len(maps), max(1, COPIES_BYTES // (matrix.numel() * matrix.element_size())))
    copies = matrix.expand(some, *matrix.shape).contiguous()
    for few, result in zip(maps.split(some), out.split(some), strict=True):
        torch.bmm(copies[: len(few)], few, out=result)
    return out


def differentiable(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight^T + bias`` with gradients, on any device: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    if x.ndim == 4 and compute_type(x) is torch.float32 and applies(x):
        return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return F.linear(x, weight, bias)


def prepared(weight: Tensor, dtype: torch.dtype, parts: int = 1) -> list[Tensor]:
    """Weight (N, K) cast and laid out for :func:`product`, in ``parts`` groups of N / parts outputs.

    The result is kept while the weight lives and shows no change (see
    :class:`~vheat_mm.ops.decay_cache.DecayCache` for what shows; :func:`forget` covers the rest).
    """
    results = _kept(weight)
    if (dtype, parts) not in results:
        with torch.inference_mode(False), torch.no_grad():
            plain = weight.detach().flatten(1).to(dtype)
            results[dtype, parts] = [
                torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), _PACK_ROWS) for part in plain.chunk(parts)
            ]
    return results[dtype, parts]


def prepared_filter(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight of a convolution, cast and channels-last; kept like :func:`prepared`'s results."""
    if weight.is_inference() or not isinstance(weight, nn.Parameter):
        return weight
    results = _kept(weight)
    if (dtype, 0) not in results:
        with torch.inference_mode(False), torch.no_grad():
            results[dtype, 0] = weight.detach().to(dtype, memory_format=torch.channels_last)
    return results[dtype, 0]


def _kept(weight: Tensor) -> dict[tuple[torch.dtype, int], Any]:
    if weight.is_inference():
        return {}  # such a tensor keeps no version: changes would go unseen
    state = (weight.data_ptr(), weight._version, weight.dtype)
    kept = _PREPARED.get(weight)
    if kept is None or kept[0] != state:
        kept = _PREPARED[weight] = (state, {})
    return kept[1]


def forget(weights: Any) -> None:
    """Drop what :func:`prepared` keeps of these weights."""
    for weight in weights:
        _PREPARED.pop(weight, None)
