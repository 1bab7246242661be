"""What the Triton kernels share: where they run, how they are launched, how maps lie in memory.

Shapes: maps are (B, H, W, C); a row is one position's C channels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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


def supports(*tensors: Tensor | None) -> bool | str:
    """Whether kernels can take these tensors, of which the first is the map; otherwise why not."""
    x = tensors[0]
    assert x is not None
    if not (INTERPRETED.value or _is_supported(x.device)):
        return f'{x.device} is not an NVIDIA GPU of compute capability 8.0 or later'
    if x.numel() == 0:
        return 'an empty map'
    if any(t is not None and (t.dtype not in TYPES or t.device != x.device) for t in tensors):
        return 'a tensor is on another device, or of another type than float32, bfloat16, float16'
    return True


@functools.cache
def _is_supported(device: torch.device) -> bool:
    # Older GPUs lack bfloat16 and the shared memory that ``tiles`` counts on.
    return device.type == 'cuda' and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **meta: Any) -> None:
    """Run ``programs`` programs of a kernel on the device of ``like``."""
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        with torch.cuda.device(like.device):  # Triton launches on the current device
            kernel[(programs,)](*args, **meta)
    else:
        kernel[(programs,)](*args, **meta)


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
