"""Residual sums with the LayerNorm before or behind them, through Triton kernels.

Shapes: maps are (B, H, W, C), or of any other shape (..., C); a row is one position's C channels. Rows are read once
and normalised on the chip, in float32. Backward recomputes mean and deviation, so that nothing is saved for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vheat_mm.ops.autograd import once
from vheat_mm.ops.triton import tiles
from vheat_mm.ops.triton.common import as_rows, eager, launch, needs_gradient, runs
from vheat_mm.ops.triton.residual import norm_backward_kernel, norm_kernel


def takes_add_norm(x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> bool:
    return (
        x.ndim >= 1
        and x.shape == branch.shape
        and x.shape[-1] <= tiles.MAX_NORM
        and all(t is None or t.shape == x.shape[-1:] for t in (gamma, weight, bias))
        and runs(x, branch, gamma, weight, bias)
    )


takes_norm_add = takes_add_norm


@eager
def add_norm(
    x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``s = x + gamma * branch`` and ``LayerNorm(s)``, as before an MLP.

    Args:
        x: Map (B, H, W, C).
        branch: Map (B, H, W, C); may be of a narrower type than ``x``, as under autocast.
        gamma: Scale of the branch (C,), or ``None`` for 1.
        weight: Of the norm over channels (C,).
        bias: Of the norm (C,).
        eps: Added to the norm's variance.

    Returns:
        The sum and its norm, (B, H, W, C) each, contiguous, in the wider type of ``x`` and ``branch``.
    """
    if needs_gradient(x, branch, gamma, weight, bias):
        return _AddNorm.apply(x, branch, gamma, weight, bias, eps)
    return _forward(x, branch, gamma, weight, bias, eps, norm_branch=False)


@eager
def norm_add(x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``x + gamma * LayerNorm(branch)``, the end of a branch with its norm behind it.

    Args and result as in :func:`add_norm`, whose norm is not wanted.
    """
    if needs_gradient(x, branch, gamma, weight, bias):
        return _NormAdd.apply(x, branch, gamma, weight, bias, eps)
    return _forward(x, branch, gamma, weight, bias, eps, norm_branch=True)[0]


class _AddNorm(torch.autograd.Function):
    """Saves the sum, which is an output, and the branch where its scale learns."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed = _forward(x, branch, gamma, weight, bias, eps, norm_branch=False)
        assert normed is not None
        ctx.save_for_backward(total, branch if ctx.needs_input_grad[2] else None, gamma, weight)
        ctx.eps, ctx.types = eps, (x.dtype, branch.dtype, bias.dtype)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once
    def backward(ctx: Any, grad_total: Tensor | None, grad_norm: Tensor | None) -> tuple[Tensor | None, ...]:
        total, branch, gamma, weight = ctx.saved_tensors
        needs_x, needs_branch, needs_gamma, needs_weight, needs_bias, _ = ctx.needs_input_grad
        x_type, branch_type, bias_type = ctx.types
        if grad_norm is None:
            if grad_total is None:
                return None, None, None, None, None, None
            # Only the sum was used: a norm whose gradient is zero adds nothing.
            grad_norm = torch.zeros_like(total)
        shared = gamma is None and x_type is branch_type
        grad_x = torch.empty_like(total, dtype=x_type) if needs_x or (shared and needs_branch) else None
        grad_branch = torch.empty_like(total, dtype=branch_type) if needs_branch and not shared else None
        scaled, plain, by_branch = _backward(
            (total, grad_norm, grad_total, branch),
            (gamma, weight, grad_x, grad_branch),
            (needs_weight, needs_bias, needs_gamma),
            ctx.eps,
            scale_grad=False,
        )
        return (
            grad_x if needs_x else None,
            grad_x if shared and needs_branch else grad_branch,
            None if by_branch is None else by_branch.to(gamma.dtype),
            None if scaled is None else scaled.to(weight.dtype),
            None if plain is None else plain.to(bias_type),
            None,
        )


class _NormAdd(torch.autograd.Function):
    """Saves the branch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(branch, gamma, weight, bias)
        ctx.eps, ctx.x_type = eps, x.dtype
        return _forward(x, branch, gamma, weight, bias, eps, norm_branch=True)[0]

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gamma, weight, bias = ctx.saved_tensors
        needs_x, needs_branch, needs_gamma, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format) if needs_branch else None
        scaled, plain, _ = _backward(
            (branch, grad, None, None),
            (gamma, weight, None, grad_branch),
            (needs_weight or needs_gamma, needs_bias or needs_gamma, False),
            ctx.eps,
            scale_grad=True,
        )
        # n = weight * xhat + bias, so the sums over grad * xhat and grad give those over grad * n.
        grad_gamma = None
        if needs_gamma:
            assert scaled is not None
            assert plain is not None
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
