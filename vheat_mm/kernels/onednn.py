"""Matrix products of the CPU through oneDNN.

PyTorch hands float32 products to MKL, which reaches less than half of what oneDNN does on AMD processors (figures in
docs/performance.md), and hands products in bfloat16 to oneDNN anyway. PyTorch's compiler calls oneDNN through operators
of its own, which are used here; they know no gradients. The public way with gradients is a 1x1 convolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_TYPES = (torch.float32, torch.bfloat16)
_PACK_ROWS = 4096  # the number of rows that weights are laid out for; others work too

# weight -> what it was prepared from and the result, by (type, number of parts)
_PREPARED: Any = WeakTensorKeyDictionary()


def applies(x: Tensor) -> bool:
    """Whether a map can go to oneDNN: on the CPU, float32 or bfloat16, and nobody watching PyTorch's operators.

    Tracers, compilers, counters of operations and function transforms know the operators of the reference form only.
    """
    return (
        x.device.type == 'cpu'
        and x.dtype in _TYPES
        and x.numel() > 0
        and compute_type(x) in _TYPES
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
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, post: str = 'none') -> Tensor:
    """``post(x @ weight^T + bias)`` without gradients: x (M, K), weight (N, K), bias (N,) -> (M, N), all of one type.

    Args:
        x: Rows, contiguous.
        weight: Plain, or as :func:`prepared` returns it.
        bias: Plain.
        post: ``'none'`` or ``'gelu'`` (exact).
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, post, [], 'none')


def differentiable_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight^T + bias`` with gradients: x (B, H, W, K), weight (N, K), bias (N,) -> (B, H, W, N)."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)


def prepared(weight: Tensor, dtype: torch.dtype, parts: int = 1) -> list[Tensor]:
    """Weight (N, K) cast and laid out for :func:`product`, in ``parts`` groups of N / parts outputs.

    The result is kept while the weight lives and shows no change (see
    :class:`~vheat_mm.decay_cache.DecayCache` for what shows; :func:`forget` covers the rest).
    """
    state = (weight.data_ptr(), weight._version, weight.dtype)
    kept = _PREPARED.get(weight)
    if kept is None or kept[0] != state:
        kept = (state, {})
        _PREPARED[weight] = kept
    results = kept[1]
    if (dtype, parts) not in results:
        with torch.inference_mode(False), torch.no_grad():
            plain = weight.detach().flatten(1).to(dtype)
            results[dtype, parts] = [
                torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), _PACK_ROWS) for part in plain.chunk(parts)
            ]
    return results[dtype, parts]


def forget(weights: Any) -> None:
    """Drop what :func:`prepared` keeps of these weights."""
    for weight in weights:
        _PREPARED.pop(weight, None)
