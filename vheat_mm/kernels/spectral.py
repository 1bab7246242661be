"""Fast form of :mod:`vheat_mm.heat_conduction`'s steps on the CPU, forward and backward.

Small maps go through batched products as in the reference form. Large ones are transposed to (B, H, C, W) so that the
transform along W, like the one along H, is one large product for oneDNN. Shapes: B, H, W, C as in the reference form;
modes are (B, H, W, C) or, of large maps, (B, H, C, W).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..positionwise import by_position, norm_gate
from . import onednn
from .autograd import once

# The transform's intermediate maps are made for some channels at a time, of this many bytes: together they stay below
# what the C library gives back to the system when it is freed, and takes anew, page by page, for the next block.
PART_BYTES = 12 << 20

# From these widths on, the two transpositions cost less than oneDNN's large products gain.
_LARGE = {torch.float32: 40, torch.bfloat16: 100}


def takes_heat_conduction(x: Tensor, decay: Tensor) -> bool:
    return onednn.applies(x) and onednn.compute_type(x) is x.dtype and decay.device == x.device


def heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    if onednn.needs_gradient(x, decay):
        return _HeatConduction.apply(x, decay)
    return _conduct(x, decay, torch.empty(x.shape, dtype=x.dtype))


def takes_heat_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> bool:
    recorded = onednn.needs_gradient(x, gate, decay, weight, bias)
    return not recorded and x.is_contiguous() and takes_heat_conduction(x, decay)


def heat_norm_gate(x: Tensor, gate: Tensor, decay: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    heat = _conduct(x, decay, out=x)
    return by_position(lambda gate, heat: norm_gate(heat, gate, weight, bias, eps), gate, heat)


def _conduct(x: Tensor, decay: Tensor, out: Tensor) -> Tensor:
    """Without gradients; ``out`` may be ``x``."""
    large = _is_large(x)
    images = max(1, onednn.GROUP_BYTES // (x[0].numel() * x.element_size()))
    channels = _channels(x) if large else x.shape[-1]
    for batch, results in zip(x.split(images), out.split(images), strict=True):
        for part, damping, result in zip(*(t.split(channels, -1) for t in (batch, decay, results)), strict=True):
            _inverse(_damp(_transform(part, large), damping, large), large, result)
    return out


def _channels(x: Tensor) -> int:
    """Channels of an image to work on at a time, in whole cache lines."""
    line = 64 // x.element_size()
    return max(line, PART_BYTES // (x.shape[1] * x.shape[2] * x.element_size()) // line * line)


class _HeatConduction(torch.autograd.Function):
    """Linear and self-adjoint in x, so that the modes are all that its backward needs beside the decay."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decay: Tensor) -> Tensor:
        large = _is_large(x)
        modes = _transform(x, large)
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward(decay)
            return _inverse(_damp(modes, decay, large), large)
        ctx.save_for_backward(decay, modes)
        return _inverse(_damp(modes, decay, large, torch.empty_like(modes)), large)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        decay, *saved = ctx.saved_tensors
        large = _is_large(grad)
        modes = _transform(grad.contiguous(), large)
        grad_decay = None
        if saved:
            # sample by sample, in the decay's type: no map of products for the whole batch
            products = torch.mul(saved[0], modes) if modes.shape[0] == 1 else None
            summed = (
                products[0] if products is not None else torch.einsum('b...,b...->...', saved[0].float(), modes.float())
            )
            grad_decay = (summed.transpose(1, 2) if large else summed).to(decay.dtype).contiguous()
        grad_x = _inverse(_damp(modes, decay, large), large) if ctx.needs_input_grad[0] else None
        return grad_x, grad_decay


def _is_large(x: Tensor) -> bool:
    return min(x.shape[1:3]) >= _LARGE[x.dtype]


def _damp(modes: Tensor, decay: Tensor, large: bool, out: Tensor | None = None) -> Tensor:
    """Product in the wider type, rounded once; in place unless ``out`` is given."""
    return torch.mul(modes, decay.transpose(1, 2) if large else decay, out=modes if out is None else out)


def _transform(x: Tensor, large: bool) -> Tensor:
    """DCT2: (B, H, W, C) -> modes."""
    from ..heat_conduction import basis

    b, h, w, c = x.shape
    along_h, along_w = basis(h, x), basis(w, x)
    if not large:
        x = torch.bmm(along_w.expand(b * h, w, w), x.reshape(b * h, w, c))
        return torch.bmm(along_h.expand(b, h, h), x.view(b, h, w * c)).view(b, h, w, c)
    x = x.reshape(b * h, w, c)
    modes = x.new_empty(b * h, c, w)
    size = _image_rows(x)
    for rows, out in zip(x.split(size), modes.split(size), strict=True):
        turned = rows.transpose(1, 2).contiguous()
        out.copy_(onednn.product(turned.view(-1, w), along_w).view(turned.shape))
    return _along_h(modes.view(b, h, c, w), along_h)


def _inverse(modes: Tensor, large: bool, out: Tensor | None = None) -> Tensor:
    """Inverse DCT2: modes -> (B, H, W, C), into ``out`` if given."""
    from ..heat_conduction import basis

    if not large:
        b, h, w, c = modes.shape
        from_h, from_w = basis(h, modes).mT, basis(w, modes).mT
        x = torch.bmm(from_h.expand(b, h, h), modes.view(b, h, w * c))
        x = torch.bmm(
            from_w.expand(b * h, w, w), x.view(b * h, w, c), out=None if out is None else out.view(b * h, w, c)
        )
        return x.view(b, h, w, c)
    b, h, c, w = modes.shape
    modes = _along_h(modes, basis(h, modes).mT.contiguous()).view(b * h, c, w)
    x = modes.new_empty(b * h, w, c) if out is None else out.view(b * h, w, c)
    size = _image_rows(modes)
    from_w = basis(w, modes).mT
    for rows, turned in zip(modes.split(size), x.split(size), strict=True):
        turned.copy_(onednn.product(rows.view(-1, w), from_w).view(rows.shape).transpose(1, 2))
    return x.view(b, h, w, c)


def _image_rows(x: Tensor) -> int:
    return max(1, onednn.GROUP_BYTES // (x[0].numel() * x.element_size()))


def _along_h(x: Tensor, matrix: Tensor) -> Tensor:
    """``matrix`` times each image: (B, H, ...), (H, H) -> (B, H, ...)."""
    out = [onednn.product(matrix, image.flatten(1).mT) for image in x]
    return (out[0][None] if len(out) == 1 else torch.stack(out)).view(x.shape)


def takes_decay_map(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return (
        freq_embed.dtype is torch.float32
        and freq_embed.device == weight.device
        and not onednn.watched(freq_embed)
        and onednn.needs_gradient(freq_embed, weight, bias)
    )


def decay_map(freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _DecayMap.apply(freq_embed, weight.float(), bias.float())


class _DecayMap(torch.autograd.Function):
    """Keeps the decay, which the operator keeps as well, and where the diffusivity is positive."""

    @staticmethod
    def forward(ctx: Any, freq_embed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from ..heat_conduction import squared_frequencies

        with torch.autocast(freq_embed.device.type, enabled=False):
            k = onednn.dense(freq_embed, weight, bias).relu_()
            active = k > 0
        h, w, _ = freq_embed.shape
        frequencies = squared_frequencies(h, w, k.dtype, k.device)
        decay = k.mul_(frequencies.unsqueeze(-1)).neg_().exp_()
        ctx.save_for_backward(freq_embed, weight, decay, active)
        return decay

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from ..heat_conduction import squared_frequencies

        freq_embed, weight, decay, active = ctx.saved_tensors
        h, w, c = freq_embed.shape
        with torch.autocast(grad.device.type, enabled=False):
            grad_k = (grad * decay).mul_(squared_frequencies(h, w, grad.dtype, grad.device).unsqueeze(-1)).neg_()
            grad_k = grad_k.mul_(active).view(-1, c)
            grad_weight, grad_bias = onednn.weight_gradient(grad_k, freq_embed.reshape(-1, c))
            return onednn.dense(grad_k, weight.mT).view(h, w, c), grad_weight, grad_bias
