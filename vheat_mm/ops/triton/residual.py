"""The kernels of residual sums with a LayerNorm (``norm``), forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl


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
