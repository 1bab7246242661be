"""What the Triton kernels share: where they run, how they are launched, how maps lie in memory.

Shapes: maps are (B, H, W, C); a row is one position's C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vheat_mm.ops.eager.onednn import watched

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``a @ b + acc`` with float32 accumulation: (M, K), (K, N), (M, N) -> (M, N)."""
    if INTERPRETED:
        # Triton's interpreter (3.7.1) multiplies the bit patterns of bfloat16. Float32 holds every product exactly.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# Whether TRITON_INTERPRET was set when Triton decorated these kernels; the variable's present value says nothing.
INTERPRETED = tl.constexpr(not isinstance(dot, triton.JITFunction))


def runs(*tensors: Tensor | None) -> bool:
    """Whether kernels can take these tensors, of which the first is the map: device, types, nobody watching."""
    x = tensors[0]
    assert x is not None
    if not (_is_supported(x.device) or INTERPRETED.value) or x.numel() == 0 or watched(x):
        return False
    return all(t is None or (t.dtype in TYPES and t.device == x.device) for t in tensors)


@functools.cache
def _is_supported(device: torch.device) -> bool:
    # Older GPUs lack bfloat16 and the shared memory that ``tiles`` counts on.
    return device.type == 'cuda' and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is recording what is done to any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **meta: Any) -> None:
    """Run ``programs`` programs of a kernel on the device of ``like``."""
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):  # Triton launches on the current device
            kernel[(programs,)](*args, **meta)
    else:
        kernel[(programs,)](*args, **meta)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep PyTorch's compiler out of a function: it breaks its graph there."""
    return torch.compiler.disable(function)


def precision(dtype: torch.dtype) -> str:
    """How products of this type use the tensor cores: float32 follows PyTorch's switch for TF32."""
    switches = torch.backends.cuda.matmul
    # PyTorch 2.9 replaced the one switch by the other, and refuses to read the old where the new was set.
    tf32 = switches.fp32_precision == 'tf32' if hasattr(switches, 'fp32_precision') else switches.allow_tf32
    return 'tf32' if tf32 or dtype is not torch.float32 else 'ieee'


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """The map (..., C) and the distance between its rows in elements.

    One distance describes contiguous maps and the halves of a (..., 2C) map, which are returned as they are; anything
    else is copied.
    """
    channels = x.shape[-1]
    if x.is_contiguous():
        return x, channels
    distance = expected = None
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue  # never stepped along
        if distance is None:
            distance = stride
        elif stride != expected:
            return x.contiguous(), channels
        expected = stride * size
    if distance is None:
        distance = channels
    if x.stride(-1) != 1 or distance < channels:
        return x.contiguous(), channels
    return x, distance
