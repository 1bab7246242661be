"""Heat conduction on the CPU, forward and backward.

Whatever is done to the modes of a map is done to some of them at a time, between the transform and its inverse. Small
maps go through batched products as in the reference, large ones through the even/odd split of the DCT.

Shapes: B, H, W, C as in the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vheat_mm.ops import reference
from vheat_mm.ops.autograd import compute_dtype, needs_gradient, once_differentiable
from vheat_mm.ops.dct import dct_basis
from vheat_mm.ops.eager import even_odd, onednn
from vheat_mm.ops.eager.norm_gate import write_norm_gate
from vheat_mm.ops.library import conduction_flops, custom_op

# Modes of a large image are made for some channels at a time, of this many bytes: the two halves of them then each stay
# below the mmap threshold of glibc, above which memory is returned to the system and requested again page by page.
PART_BYTES = 24 << 20

# From this sum of sides on, half the products save more time than folding costs: the products of a position grow with
# the sides, and folding costs every position the same.
SPLIT_FROM = {torch.float32: 144, torch.bfloat16: 300}

# What to do with modes (b, h, w, c), in place, given where they belong among all modes (B, H, W, C).
Place = tuple[slice, slice, slice, slice]
FilterFn = Callable[[Tensor, Place], None]


def uses_even_odd_split(height: int, width: int, dtype: torch.dtype) -> bool:
    """Whether maps of this size and type are transformed by the even/odd split of the DCT."""
    return height + width >= SPLIT_FROM[dtype]


def _supports(x: Tensor, decay: Tensor) -> bool | str:
    if decay.device != x.device:
        return f'the decay is on {decay.device}, the map on {x.device}'
    if x.ndim != 4 or decay.shape != x.shape[1:]:
        return f'shapes {tuple(x.shape)} and {tuple(decay.shape)}'
    return onednn.supports(x)


def _supports_inference(x: Tensor, decay: Tensor) -> bool | str:
    return 'a gradient is recorded' if needs_gradient(x, decay) else _supports(x, decay)


def _supports_training(x: Tensor, decay: Tensor) -> bool | str:
    return _supports(x, decay) if compute_dtype(x) is x.dtype else 'autocast changes the type of the map'


@reference.heat_conduction.register('fast', _supports_inference, compiled=True)
def heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    """See :func:`vheat_mm.ops.reference.heat_conduction`."""
    return _heat_conduction(x.to(compute_dtype(x)), decay)


@custom_op('heat_conduction', conduction_flops)
def _heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    return _filter_dct(x, _multiply(decay, x.dtype), x.new_empty(x.shape))


@_heat_conduction.register_fake
def _(x: Tensor, decay: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@reference.heat_conduction.register('fast', _supports_training)
def heat_conduction_with_grad(x: Tensor, decay: Tensor) -> Tensor:
    """See :func:`vheat_mm.ops.reference.heat_conduction`."""
    return _HeatConduction.apply(x, decay)


def _supports_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool | str:
    if needs_gradient(x, gate, decay, weight, bias):
        return 'a gradient is recorded'
    if (gate.dtype, gate.shape) != (x.dtype, x.shape) or compute_dtype(x) is not x.dtype or not x.is_contiguous():
        return 'signal, gate and products differ in type or shape, or the signal is not contiguous'
    return _supports(x, decay)


@reference.heat_norm_gate_.register('fast', _supports_norm_gate)
def heat_norm_gate_(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`vheat_mm.ops.reference.heat_norm_gate_`; the result takes the memory of ``x``."""
    heat = _filter_dct(x, _multiply(decay, x.dtype), out=x)
    return write_norm_gate(heat, gate, weight, bias, eps, out=heat)


class _HeatConduction(torch.autograd.Function):
    """Linear and self-adjoint in x, so that the modes are all that its backward needs beside the decay."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor) -> Tensor:
        multiply, out = _multiply(decay, x.dtype), x.new_empty(x.shape)
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward(decay)
            return _filter_dct(x, multiply, out)
        kept = torch.empty_like(out)

        def keep_and_multiply(modes: Tensor, place: Place) -> None:
            kept[place] = modes
            multiply(modes, place)

        out = _filter_dct(x, keep_and_multiply, out)
        ctx.save_for_backward(decay, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        decay, *kept = ctx.saved_tensors
        multiply, grad_x = _multiply(decay, grad.dtype), grad.new_empty(grad.shape)
        if not kept:
            return _filter_dct(grad, multiply, grad_x), None
        grad_decay = torch.empty_like(decay)

        def add_products_and_multiply(modes: Tensor, place: Place) -> None:
            for index, products in enumerate(kept[0][place] * modes):  # summed in the type of the decay
                total = grad_decay[place[1:]]
                total.copy_(products) if place[0].start + index == 0 else total.add_(products)
            multiply(modes, place)

        return _filter_dct(grad, add_products_and_multiply, grad_x), grad_decay


def _multiply(decay: Tensor, dtype: torch.dtype) -> FilterFn:
    decay = decay.to(dtype)  # PyTorch's products of two types are many times slower

    def multiply(modes: Tensor, place: Place) -> None:
        modes.mul_(decay[place[1:]])

    return multiply


def _filter_dct(x: Tensor, filter_fn: FilterFn, out: Tensor) -> Tensor:
    """Inverse DCT2 of what ``filter_fn`` makes of the DCT2: (B, H, W, C) -> ``out``, which may be ``x``."""
    batch, height, width, channels = x.shape
    every = slice(None)
    if not uses_even_odd_split(height, width, x.dtype):
        for images in _slices(batch, onednn.slices_per_group(x)):
            modes = _dct2(x[images])
            filter_fn(modes, (images, every, every, every))
            _idct2(modes, out[images])
        return out
    line = 64 // x.element_size()  # channels of a line of the cache
    at_a_time = PART_BYTES // (height * width * x.element_size()) // line * line
    for some in _slices(channels, max(line, at_a_time)):
        for image in range(batch):
            even_odd.filter_dct(x[image, ..., some], _of_image(filter_fn, image, some), out[image, ..., some])
    return out


def _of_image(filter_fn: FilterFn, image: int, channels: slice) -> even_odd.FilterFn:
    def filter_image(modes: Tensor, rows: slice, columns: slice) -> None:
        filter_fn(modes[None], (slice(image, image + 1), rows, columns, channels))

    return filter_image


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(first, first + step) for first in range(0, size, step))


def _dct2(x: Tensor) -> Tensor:
    """DCT2 of (B, H, W, C)."""
    b, h, w, c = x.shape
    x = onednn.multiply_each(dct_basis(w, x), x.reshape(b * h, w, c))
    return onednn.multiply_each(dct_basis(h, x), x.view(b, h, w * c)).view(b, h, w, c)


def _idct2(modes: Tensor, out: Tensor) -> None:
    """Inverse of :func:`_dct2`, into ``out``."""
    b, h, w, c = modes.shape
    x = onednn.multiply_each(dct_basis(h, modes).mT, modes.view(b, h, w * c))
    onednn.multiply_each(dct_basis(w, modes).mT, x.view(b * h, w, c), out=out.view(b * h, w, c))
