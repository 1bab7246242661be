"""Steps of the network that look at one position at a time: linear maps, MLP, gate.

Each is its reference form; :mod:`vheat_mm.kernels` chooses between it and a fast form of the same signature.

Shapes: maps are (B, H, W, C); C is replaced by the width that a step reads or gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .kernels import step


@step
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight^T + bias``: x (..., C), weight (D, C) or of a 1x1 convolution, bias (D,) -> (..., D)."""
    return F.linear(x, weight.flatten(1), bias)


@step
def split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`linear` to 2C channels, returned as two halves: x (..., C) -> 2 x (..., C)."""
    first, second = linear(x, weight, bias).chunk(2, dim=-1)
    return first, second


@step
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """Two linear maps around an exact GELU: x (..., C), weight1 (D, C), weight2 (C, D) -> (..., C)."""
    return linear(F.gelu(linear(x, weight1, bias1)), weight2, bias2)


@step
def norm_gate(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x) * SiLU(gate)``, the end of the operator before its projection: (..., C) -> (..., C)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps) * F.silu(gate)


@step
def add_norm(
    x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual sum ``s = x + gamma * branch`` and ``LayerNorm(s)``: 2 x (..., C) -> 2 x (..., C)."""
    x = x + (branch if gamma is None else gamma * branch)
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


@step
def norm_add(x: Tensor, branch: Tensor, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Residual sum ``x + gamma * LayerNorm(branch)``: 2 x (..., C) -> (..., C)."""
    branch = F.layer_norm(branch, weight.shape, weight, bias, eps)
    return x + (branch if gamma is None else gamma * branch)


@step
def by_position(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """``function(*maps)`` for a function that treats every position of its maps alike: (..., C) -> (..., C).

    A fast form may call it on some positions at a time. The result may take the memory of the last map.
    """
    return function(*maps)


@step
def by_image(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` for a function that treats every image of a batch alike: (B, H, W, C) -> (B, H, W, C)."""
    return function(x)
