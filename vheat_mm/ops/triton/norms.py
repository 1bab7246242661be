"""Residual sums with the LayerNorm before or behind them.

Shapes: maps are (B, H, W, C), or of any other shape (..., C); a row is one position's C channels. Rows are read once
and normalised on the chip, in float32. Backward recomputes mean and deviation, so that nothing is saved for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vheat_mm.ops import reference
from vheat_mm.ops.autograd import once_differentiable
from vheat_mm.ops.library import custom_op
from vheat_mm.ops.triton import tiles
from vheat_mm.ops.triton.common import as_rows, launch, supports


def _supports(x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> bool | str:
    channels = x.shape[-1:]
    if (
        x.ndim < 1
        or x.shape != branch.shape
        or any(t is not None and t.shape != channels for t in (gamma, weight, bias))
    ):
        return 'shapes of map, branch and parameters do not fit'
    if channels[0] > tiles.MAX_NORM:
        return f'{channels[0]} channels are more than {tiles.MAX_NORM}'
    return supports(x, branch, gamma, weight, bias)


@triton.jit
def norm_kernel(
    x,
    branch,
    gamma,
    weight,
    bias,
    total,
    normed,
    rows,
    channels,
    x_row,
    branch_row,
    eps,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``norm_add`` of some rows, or ``add_norm`` where there is a ``normed`` to write.

    x, branch (rows, channels) with rows x_row and branch_row apart; gamma, weight, bias (channels,), gamma may be
    None; total, normed (rows, channels).
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_C)
    inside = c < channels
    mask = (first + row < rows)[:, None] & inside[None, :]
    offsets = row[:, None] * channels + c[None, :]
    s = tl.load(x + first * x_row + row[:, None] * x_row + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(branch + first * branch_row + row[:, None] * branch_row + c[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if normed is None:
        mean = tl.sum(y, 1) / channels
        y = tl.where(inside[None, :], y - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(y * y, 1) / channels + eps)
        y = y * rstd[:, None] * w[None, :] + b[None, :]
    if gamma is not None:
        y *= tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)[None, :]
    s += y
    rounded = s.to(total.dtype.element_ty)
    tl.store(total + first * channels + offsets, rounded, mask=mask)
    if normed is not None:
        s = rounded.to(tl.float32)  # the norm of what is stored, which is what backward sees
        mean = tl.sum(s, 1) / channels
        s = tl.where(inside[None, :], s - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(s * s, 1) / channels + eps)
        s = s * rstd[:, None] * w[None, :] + b[None, :]
        tl.store(normed + first * channels + offsets, s.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    normalised,
    grad,
    grad_total,
    branch,
    gamma,
    weight,
    grad_x,
    grad_branch,
    partial_scaled,
    partial_plain,
    partial_branch,
    rows,
    channels,
    normalised_row,
    grad_row,
    total_row,
    branch_row,
    per_program,
    eps,
    SCALE_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Backward of a LayerNorm of ``normalised`` and of the residual sum around it, for some rows.

    Of ``add_norm``: ``grad`` is the norm's and ``grad_total`` the sum's or None; ``grad_x = grad_total +
    LN'(grad)``, ``grad_branch = gamma * grad_x``, and partial_branch sums ``grad_x * branch``. Of ``norm_add``,
    with SCALE_GRAD: ``grad_branch = LN'(gamma * grad)``. Maps are (rows, channels); those read have rows as far apart
    as said. The partials (programs, channels) float32 sum ``grad * xhat`` and ``grad``. None where not wanted.
    """
    c = tl.arange(0, BLOCK_C)
    inside = c < channels
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if gamma is not None:
        scale = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32)
        if SCALE_GRAD:
            w *= scale
    row = tl.arange(0, ROWS)
    # Summed over the tile's rows at the end only: doing it each time would make warps wait for each other.
    scaled = tl.zeros((ROWS, BLOCK_C), tl.float32)
    plain = tl.zeros((ROWS, BLOCK_C), tl.float32)
    by_branch = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for i in range(per_program):
        first = (tl.program_id(0).to(tl.int64) * per_program + i) * ROWS
        mask = (first + row < rows)[:, None] & inside[None, :]
        offsets = row[:, None] * channels + c[None, :]
        y = tl.load(
            normalised + first * normalised_row + row[:, None] * normalised_row + c[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        dy = tl.load(grad + first * grad_row + row[:, None] * grad_row + c[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        mean = tl.sum(y, 1) / channels
        y = tl.where(inside[None, :], y - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(y * y, 1) / channels + eps)
        y *= rstd[:, None]
        scaled += dy * y
        plain += dy
        dy *= w[None, :]
        along = tl.sum(dy * y, 1) / channels
        dx = rstd[:, None] * (dy - tl.sum(dy, 1)[:, None] / channels - y * along[:, None])
        if grad_total is not None:
            dx += tl.load(
                grad_total + first * total_row + row[:, None] * total_row + c[None, :], mask=mask, other=0.0
            ).to(tl.float32)
        if partial_branch is not None:
            z = tl.load(branch + first * branch_row + row[:, None] * branch_row + c[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
            by_branch += dx * z
        if grad_x is not None:
            tl.store(grad_x + first * channels + offsets, dx.to(grad_x.dtype.element_ty), mask=mask)
        if grad_branch is not None:
            if gamma is not None and not SCALE_GRAD:
                dx *= scale[None, :]
            tl.store(grad_branch + first * channels + offsets, dx.to(grad_branch.dtype.element_ty), mask=mask)
    sums = tl.program_id(0).to(tl.int64) * channels + c
    if partial_scaled is not None:
        tl.store(partial_scaled + sums, tl.sum(scaled, 0), mask=inside)
    if partial_plain is not None:
        tl.store(partial_plain + sums, tl.sum(plain, 0), mask=inside)
    if partial_branch is not None:
        tl.store(partial_branch + sums, tl.sum(by_branch, 0), mask=inside)


@reference.add_norm.register('triton', _supports, compiled=True)
def add_norm(
    x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See :func:`vheat_mm.ops.reference.add_norm`.

    ``branch`` may be of a narrower type than ``x``, as under autocast; the results have the wider type of the two.
    """
    return _add_norm(x, branch, gamma, weight, bias, eps)


@custom_op('triton_add_norm')
def _add_norm(
    x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _forward(x, branch, gamma, weight, bias, eps, norm_branch=False)


@_add_norm.register_fake
def _(
    x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    return total, torch.empty_like(total)


def _save_add_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    """Saves the sum, which is an output, and the branch where its scale learns."""
    x, branch, gamma, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[0], branch if ctx.needs_input_grad[2] else None, gamma, weight)
    ctx.types = x.dtype, branch.dtype, bias.dtype
    ctx.set_materialize_grads(False)


@once_differentiable
def _add_norm_gradients(ctx: Any, grad_total: Tensor | None, grad_norm: Tensor | None) -> tuple[Tensor | None, ...]:
    total, branch, gamma, weight = ctx.saved_tensors
    needs_x, needs_branch, needs_gamma, needs_weight, needs_bias, _ = ctx.needs_input_grad
    x_type, branch_type, bias_type = ctx.types
    if grad_norm is None:
        if grad_total is None:
            return None, None, None, None, None, None
        # Only the sum was used: a norm whose gradient is zero adds nothing.
        grad_norm = torch.zeros_like(total)
    shared = gamma is None and x_type is branch_type
    wanted = [needs_x or (shared and needs_branch), needs_branch and not shared, needs_weight, needs_bias, needs_gamma]
    some = iter(
        _add_norm_backward(total, grad_norm, grad_total, branch, gamma, weight, x_type, branch_type, wanted, ctx.eps)
    )
    grad_x, grad_branch, scaled, plain, by_branch = (next(some) if want else None for want in wanted)
    return (
        grad_x if needs_x else None,
        grad_x if shared and needs_branch else grad_branch,
        None if by_branch is None else by_branch.to(gamma.dtype),
        None if scaled is None else scaled.to(weight.dtype),
        None if plain is None else plain.to(bias_type),
        None,
    )


@custom_op('triton_add_norm_backward')
def _add_norm_backward(
    total: Tensor,
    grad_norm: Tensor,
    grad_total: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    x_type: torch.dtype,
    branch_type: torch.dtype,
    wanted: list[bool],
    eps: float,
) -> list[Tensor]:
    """Those wanted of the gradients of x, branch, and, in float32, weight, bias, gamma."""
    grad_x = torch.empty_like(total, dtype=x_type) if wanted[0] else None
    grad_branch = torch.empty_like(total, dtype=branch_type) if wanted[1] else None
    sums = _backward(
        (total, grad_norm, grad_total, branch),
        (gamma, weight, grad_x, grad_branch),
        (wanted[2], wanted[3], wanted[4]),
        eps,
        scale_grad=False,
    )
    return [t for t in (grad_x, grad_branch, *sums) if t is not None]


@_add_norm_backward.register_fake
def _(
    total: Tensor,
    grad_norm: Tensor,
    grad_total: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor,
    x_type: torch.dtype,
    branch_type: torch.dtype,
    wanted: list[bool],
    eps: float,
) -> list[Tensor]:
    maps = [torch.empty_like(total, dtype=t) for t, want in zip((x_type, branch_type), wanted, strict=False) if want]
    return maps + [weight.new_empty(weight.shape, dtype=torch.float32) for want in wanted[2:] if want]


_add_norm.register_autograd(_add_norm_gradients, setup_context=_save_add_norm)


@reference.norm_add.register('triton', _supports, compiled=True)
def norm_add(x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See :func:`vheat_mm.ops.reference.norm_add`; types as in :func:`add_norm`."""
    return _norm_add(x, branch, gamma, weight, bias, eps)


@custom_op('triton_norm_add')
def _norm_add(x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _forward(x, branch, gamma, weight, bias, eps, norm_branch=True)[0]


@_norm_add.register_fake
def _(x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))


def _save_norm_add(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Saves the branch."""
    x, branch, gamma, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(branch, gamma, weight, bias)
    ctx.x_type = x.dtype


@once_differentiable
def _norm_add_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    branch, gamma, weight, bias = ctx.saved_tensors
    needs_x, needs_branch, needs_gamma, needs_weight, needs_bias, _ = ctx.needs_input_grad
    wanted = [needs_branch, needs_weight or needs_gamma, needs_bias or needs_gamma]
    some = iter(_norm_add_backward(branch, grad, gamma, weight, wanted, ctx.eps))
    grad_branch, scaled, plain = (next(some) if want else None for want in wanted)
    # n = weight * xhat + bias, so the sums over grad * xhat and grad give those over grad * n.
    grad_gamma = None
    if needs_gamma and scaled is not None and plain is not None:
        grad_gamma = (weight.float() * scaled + bias.float() * plain).to(gamma.dtype)
    scale = 1.0 if gamma is None else gamma.float()
    return (
        grad.to(ctx.x_type) if needs_x else None,
        grad_branch,
        grad_gamma,
        (scaled * scale).to(weight.dtype) if needs_weight and scaled is not None else None,
        (plain * scale).to(bias.dtype) if needs_bias and plain is not None else None,
        None,
    )


@custom_op('triton_norm_add_backward')
def _norm_add_backward(
    branch: Tensor, grad: Tensor, gamma: Tensor | None, weight: Tensor, wanted: list[bool], eps: float
) -> list[Tensor]:
    """Those wanted of the gradient of the branch, and of the sums over ``grad * xhat`` and ``grad``, in float32."""
    grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format) if wanted[0] else None
    maps, others = (branch, grad, None, None), (gamma, weight, None, grad_branch)
    sums = _backward(maps, others, (wanted[1], wanted[2], False), eps, scale_grad=True)
    return [t for t in (grad_branch, *sums) if t is not None]


@_norm_add_backward.register_fake
def _(
    branch: Tensor, grad: Tensor, gamma: Tensor | None, weight: Tensor, wanted: list[bool], eps: float
) -> list[Tensor]:
    maps = [torch.empty_like(branch, memory_format=torch.contiguous_format)] if wanted[0] else []
    return maps + [weight.new_empty(weight.shape, dtype=torch.float32) for want in wanted[1:] if want]


_norm_add.register_autograd(_norm_add_gradients, setup_context=_save_norm_add)


def _forward(
    x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float, norm_branch: bool
) -> tuple[Tensor, Any]:
    """The sum and, where it is not the branch that is normed, the sum's norm."""
    channels = x.shape[-1]
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device)
    normed = None if norm_branch else torch.empty_like(total)
    x, x_row = as_rows(x)
    branch, branch_row = as_rows(branch)
    tile = tiles.norm(channels)
    rows = total.numel() // channels
    launch(
        norm_kernel,
        tiles.ceil_div(rows, tile['ROWS']),
        x,
        *(x, branch, None if gamma is None else gamma.contiguous(), weight.contiguous(), bias.contiguous()),
        *(total, normed, rows, channels, x_row, branch_row, eps),
        **tile,
    )
    return total, normed


def _backward(
    maps: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    others: tuple[Tensor | None, Tensor, Tensor | None, Tensor | None],
    wanted: tuple[bool, bool, bool],
    eps: float,
    scale_grad: bool,
) -> list[Tensor | None]:
    """Launch :func:`norm_backward_kernel`, and sum its partials (C,) where wanted."""
    like = maps[0]
    channels = like.shape[-1]
    strided = [(None, 0) if t is None else as_rows(t) for t in maps]
    rows = like.numel() // channels
    tile, programs, per_program = tiles.norm_backward(channels, rows)
    partials = [
        torch.empty(programs, channels, dtype=torch.float32, device=like.device) if want else None for want in wanted
    ]
    gamma, weight, grad_x, grad_branch = others
    launch(
        norm_backward_kernel,
        programs,
        like,
        *(t for t, _ in strided),
        *(None if gamma is None else gamma.contiguous(), weight.contiguous(), grad_x, grad_branch),
        *(*partials, rows, channels, *(row for _, row in strided), per_program, eps),
        SCALE_GRAD=scale_grad,
        **tile,
    )
    return [None if partial is None else partial.sum(0) for partial in partials]
