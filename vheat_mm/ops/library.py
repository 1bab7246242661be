"""Custom ops of this package in PyTorch's dispatcher, under ``torch.ops.vheat_mm``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vheat_mm.ops.registry import HAS_CUSTOM_OPS

_FLOPS: dict[str, Callable[..., int]] = {}


class _Missing:
    """Stands for a custom op in PyTorch before 2.4, where no kernel is ever selected."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def register_autograd(self, *args: Any, **kwargs: Any) -> None:
        pass


def custom_op(name: str, flops: Callable[..., int] | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that makes a function of tensors the custom op ``vheat_mm::name``; it returns new tensors only.

    Args:
        name: In ``torch.ops.vheat_mm``.
        flops: Operations by the shapes of the arguments; see :func:`register_flop_formulas`.
    """
    if not HAS_CUSTOM_OPS:
        return _Missing

    def decorate(function: Callable[..., Any]) -> Any:
        if flops is not None:
            _FLOPS[name] = flops
        return torch.library.custom_op(f'vheat_mm::{name}', mutates_args=())(function)

    return decorate


def register_flop_formulas() -> None:
    """Have ``torch.utils.flop_counter`` count the custom ops in graphs; in eager mode it is shown the reference.

    Not done on import, since that module of PyTorch imports Triton where it is installed.
    """
    from torch.utils.flop_counter import register_flop_formula

    for name, flops in _FLOPS.items():
        formula = lambda *args, out_shape=None, flops=flops, **kwargs: flops(*args)  # noqa: E731
        register_flop_formula(getattr(torch.ops.vheat_mm, name))(formula)
    _FLOPS.clear()  # PyTorch takes a formula once


def conduction_flops(x: torch.Size, *_: Any) -> int:
    """Of the transforms along H and W and back, as dense products: x (B, H, W, C), two operations a multiply-add."""
    b, h, w, c = x
    return 4 * b * h * w * c * (h + w)


def linear_flops(x: torch.Size, weight: torch.Size, *_: Any) -> int:
    """Of ``x @ weight^T``: x (..., K), weight (N, K) or (N, K, 1, 1)."""
    return 2 * math.prod(x) * weight[0]


def mlp_flops(x: torch.Size, weight1: torch.Size, bias1: torch.Size, weight2: torch.Size, *_: Any) -> int:
    """Of two linear maps: x (..., K), weight1 (N, K), weight2 (M, N)."""
    return linear_flops(x, weight1) + linear_flops(torch.Size([*x[:-1], weight1[0]]), weight2)


def convolution_flops(
    x: torch.Size, weight: torch.Size, bias: Any, stride: list[int], padding: list[int], dilation: list[int], *_: Any
) -> int:
    """Of a convolution: x (B, H, W, C), weight (N, C / groups, h, w)."""
    sides = convolved_sides(x[1:3], weight[2:], stride, padding, dilation)
    return 2 * x[0] * math.prod(sides) * math.prod(weight)


def convolved_sides(sides: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Height and width of a convolved map."""
    return [
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(sides, kernel, stride, padding, dilation, strict=True)
    ]


def stem_flops(x: torch.Size, parameters: list[torch.Size], *_: Any) -> int:
    """Of two 3x3 convolutions of stride 2: x (B, H, W, C), parameters as ``embed_patches`` takes them."""
    half, quarter = ([-(-side // stride) for side in x[1:3]] for stride in (2, 4))
    return 2 * x[0] * sum(math.prod(s) * math.prod(w) for s, w in ((half, parameters[0]), (quarter, parameters[4])))
