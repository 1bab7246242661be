"""Fast form of :mod:`vheat_mm.ops.reference`'s steps on the CPU, forward and backward.

Whatever is done to a map's modes is done to some of them at a time, between the transform and its inverse. Small maps
go through batched products as in the reference form, large ones through :mod:`.mirrored`.

Shapes: B, H, W, C as in the reference form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vheat_mm.ops.autograd import once
from vheat_mm.ops.eager import mirrored, onednn
from vheat_mm.ops.eager.positionwise import write_norm_gate

# Modes of a large image are made for some channels at a time, of this many bytes: two halves of them each stay below
# what the C library gives back to the system when it is freed, and takes anew, page by page, for the next block.
PART_BYTES = 24 << 20

# From this sum of sides on, half the products save more time than mirroring costs: products of a position are as many
# as the sides together are long, and mirroring costs every position the same.
MIRROR_FROM = {torch.float32: 144, torch.bfloat16: 300}

# What to do with modes (b, h, w, c), in place, given where they belong among all modes (B, H, W, C).
Place = tuple[slice, slice, slice, slice]
AtModes = Callable[[Tensor, Place], None]


def mirrors(height: int, width: int, dtype: torch.dtype) -> bool:
    """Whether maps of this size and type are transformed in mirrored halves."""
    return height + width >= MIRROR_FROM[dtype]


def takes_heat_conduction(x: Tensor, decay: Tensor) -> bool:
    return onednn.applies(x) and onednn.compute_type(x) is x.dtype and decay.device == x.device


def heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    if onednn.needs_gradient(x, decay):
        return _HeatConduction.apply(x, decay)
    return _conduct(x, _damping(decay, x.dtype), torch.empty(x.shape, dtype=x.dtype))


def takes_heat_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    recorded = onednn.needs_gradient(x, gate, decay, weight, bias)
    return not recorded and x.is_contiguous() and gate.dtype is x.dtype and takes_heat_conduction(x, decay)


def heat_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    heat = _conduct(x, _damping(decay, x.dtype), out=x)
    return write_norm_gate(heat, gate, weight, bias, eps, out=heat)


class _HeatConduction(torch.autograd.Function):
    """Linear and self-adjoint in x, so that the modes are all that its backward needs beside the decay."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor) -> Tensor:
        damp, out = _damping(decay, x.dtype), torch.empty(x.shape, dtype=x.dtype)
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward(decay)
            return _conduct(x, damp, out)
        kept = torch.empty_like(out)

        def keep_and_damp(modes: Tensor, place: Place) -> None:
            kept[place] = modes
            damp(modes, place)

        out = _conduct(x, keep_and_damp, out)
        ctx.save_for_backward(decay, kept)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        decay, *kept = ctx.saved_tensors
        damp, grad_x = _damping(decay, grad.dtype), torch.empty(grad.shape, dtype=grad.dtype)
        if not kept:
            return _conduct(grad, damp, grad_x), None
        grad_decay = torch.empty_like(decay)

        def add_products_and_damp(modes: Tensor, place: Place) -> None:
            for index, products in enumerate(kept[0][place] * modes):  # summed in the decay's type
                total = grad_decay[place[1:]]
                total.copy_(products) if place[0].start + index == 0 else total.add_(products)
            damp(modes, place)

        return _conduct(grad, add_products_and_damp, grad_x), grad_decay


def _damping(decay: Tensor, dtype: torch.dtype) -> AtModes:
    decay = decay.to(dtype)  # PyTorch's products of two types are many times slower

    def damp(modes: Tensor, place: Place) -> None:
        modes.mul_(decay[place[1:]])

    return damp


def _conduct(x: Tensor, at_modes: AtModes, out: Tensor) -> Tensor:
    """Inverse DCT2 of what ``at_modes`` makes of the DCT2: (B, H, W, C) -> ``out``, which may be ``x``."""
    batch, height, width, channels = x.shape
    every = slice(None)
    if not mirrors(height, width, x.dtype):
        for images in _slices(batch, onednn.slices_at_a_time(x)):
            modes = _to_modes(x[images])
            at_modes(modes, (images, every, every, every))
            _from_modes(modes, out[images])
        return out
    line = 64 // x.element_size()  # channels of a line of the cache
    at_a_time = PART_BYTES // (height * width * x.element_size()) // line * line
    for some in _slices(channels, max(line, at_a_time)):
        for image in range(batch):
            mirrored.conduct(x[image, ..., some], _of_image(at_modes, image, some), out[image, ..., some])
    return out


def _of_image(at_modes: AtModes, image: int, channels: slice) -> mirrored.AtModes:
    def at_modes_of_image(modes: Tensor, rows: slice, columns: slice) -> None:
        at_modes(modes[None], (slice(image, image + 1), rows, columns, channels))

    return at_modes_of_image


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(first, first + step) for first in range(0, size, step))


def _to_modes(x: Tensor) -> Tensor:
    """DCT2 of (B, H, W, C)."""
    from vheat_mm.ops.dct import basis

    b, h, w, c = x.shape
    x = onednn.multiply_each(basis(w, x), x.reshape(b * h, w, c))
    return onednn.multiply_each(basis(h, x), x.view(b, h, w * c)).view(b, h, w, c)


def _from_modes(modes: Tensor, out: Tensor) -> None:
    """Inverse of :func:`_to_modes`, into ``out``."""
    from vheat_mm.ops.dct import basis

    b, h, w, c = modes.shape
    x = onednn.multiply_each(basis(h, modes).mT, modes.view(b, h, w * c))
    onednn.multiply_each(basis(w, modes).mT, x.view(b * h, w, c), out=out.view(b * h, w, c))


def takes_decay_map(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return (
        freq_embed.dtype is torch.float32
        and freq_embed.device == weight.device
        and not onednn.watched(freq_embed)
        and onednn.needs_gradient(freq_embed, weight, bias)
    )


def decay_map(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Not float16: gradients summed over all modes leave its range.
    dtype = torch.bfloat16 if onednn.compute_type(freq_embed) is torch.bfloat16 else torch.float32
    return _DecayMap.apply(freq_embed, weight.float(), bias.float(), dtype)


class _DecayMap(torch.autograd.Function):
    """Keeps the decay, which the operator keeps as well, and where the diffusivity is positive.

    The decay is made in float32 under autocast too; products of its gradients are in autocast's type, as others are.
    """

    @staticmethod
    def forward(ctx: Any, freq_embed: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        from vheat_mm.ops.dct import squared_frequencies

        with torch.autocast(freq_embed.device.type, enabled=False):
            k = onednn.dense(freq_embed, weight, bias).relu_()
            active = k > 0
        h, w, _ = freq_embed.shape
        decay = k.mul_(-squared_frequencies(h, w, k.dtype, k.device).unsqueeze(-1)).exp_()
        ctx.save_for_backward(freq_embed, weight, decay, active)
        ctx.dtype = dtype
        return decay

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from vheat_mm.ops.dct import squared_frequencies

        freq_embed, weight, decay, active = ctx.saved_tensors
        h, w, c = freq_embed.shape
        with torch.autocast(grad.device.type, enabled=False):
            grad_k = (grad * decay).mul_(-squared_frequencies(h, w, grad.dtype, grad.device).unsqueeze(-1))
            grad_k, embeds, weight = (t.to(ctx.dtype) for t in (grad_k.mul_(active).view(-1, c), freq_embed, weight))
            grad_weight, grad_bias = onednn.weight_gradient(grad_k, embeds.reshape(-1, c))
            grad_embed = onednn.dense(grad_k, weight.mT).to(freq_embed.dtype)
            return grad_embed.view(h, w, c), grad_weight, grad_bias, None
