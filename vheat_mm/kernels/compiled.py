"""Fast forms of the CPU inside ``torch.compile``d inference: each is one opaque operator of the graph.

Left to itself the compiler hands float32 products to MKL and makes the MLP's wide map whole, and ends up slower than
the fast forms run eagerly (docs/performance.md). It still fuses everything between these operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import onednn, positionwise, spectral


def _takes(x: Tensor, *others: Tensor) -> bool:
    if x.device.type != 'cpu' or x.ndim != 4 or not torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)):
        return False
    return onednn.compute_type(x) in onednn.TYPES


def takes_heat_conduction(x: Tensor, decay: Tensor) -> bool:
    return _takes(x, decay)


def heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    return _heat_conduction(x.to(onednn.compute_type(x)), decay)


def takes_split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return _takes(x, weight)


def split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _split_linear(x.to(onednn.compute_type(x)), weight, bias)
    return first, second


def takes_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return bias is not None and _takes(x, weight)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _linear(x.to(onednn.compute_type(x)), weight, bias)


def takes_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> bool:
    return _takes(x, weight1)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return _mlp(x.to(onednn.compute_type(x)), weight1, bias1, weight2, bias2)


@torch.library.custom_op('vheat_mm::heat_conduction', mutates_args=())
def _heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    return spectral.heat_conduction(x, decay)


@torch.library.custom_op('vheat_mm::split_linear', mutates_args=())
def _split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return list(positionwise.split_linear(x, weight, bias))


@torch.library.custom_op('vheat_mm::linear', mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return positionwise.linear(x, weight, bias)


@torch.library.custom_op('vheat_mm::mlp', mutates_args=())
def _mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return positionwise.mlp(x, weight1, bias1, weight2, bias2)


@_heat_conduction.register_fake
def _(x: Tensor, decay: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_split_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0] // 2) for _ in range(2)]


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_mlp.register_fake
def _(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight2.shape[0])
