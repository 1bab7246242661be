"""Fast forms of the CPU inside ``torch.compile``d inference: each is one opaque operator of the graph.

Left to itself the compiler hands float32 products to MKL, makes the MLP's wide map whole, lays convolutions' maps out
anew and computes every decay at every call, and ends up slower than the fast forms run eagerly. It still fuses
everything between these operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vheat_mm.ops.decay_cache import DecayCache
from vheat_mm.ops.eager import convolution, onednn, positionwise, spectral

# Of all compiled graphs: a graph cannot hold on to what it computed in an earlier call.
_DECAYS = DecayCache()


def forget(weights: Iterable[Tensor]) -> None:
    """Drop the decays that graphs have computed from these weights."""
    ids = {id(weight) for weight in weights}
    _DECAYS.clear(lambda key: key[0] in ids)


_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')


def _takes(x: Tensor, *others: Tensor | None) -> bool:
    if not _AVAILABLE or x.device.type != 'cpu' or x.ndim != 4 or not torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others)):
        return False
    return onednn.compute_type(x) in onednn.TYPES


def takes_heat_conduction(x: Tensor, decay: Tensor) -> bool:
    return _takes(x, decay)


def heat_conduction(x: Tensor, decay: Tensor) -> Tensor:
    return _heat_conduction(x.to(onednn.compute_type(x)), decay)


def takes_split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return _takes(x, weight, bias)


def split_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    first, second = _split_linear(x.to(onednn.compute_type(x)), weight, bias)
    return first, second


def takes_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return bias is not None and _takes(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _linear(x.to(onednn.compute_type(x)), weight, bias)


def takes_mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> bool:
    return _takes(x, weight1, bias1, weight2, bias2)


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return _mlp(x.to(onednn.compute_type(x)), weight1, bias1, weight2, bias2)


def takes_decays_of(freq_embed: Tensor, weights: list[Tensor], biases: list[Tensor], size: tuple[int, int]) -> bool:
    return (
        freq_embed.device.type == 'cpu'
        and torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(p.dtype is torch.float32 for p in (freq_embed, *weights, *biases))
    )


def decays_of(freq_embed: Tensor, weights: list[Tensor], biases: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
    return _decays_of(freq_embed, weights, biases, *size)


def takes_convolve(x: Tensor, conv: nn.Conv2d) -> bool:
    return isinstance(conv.padding, tuple) and _takes(x, conv.weight, conv.bias)


def convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    x = x.to(onednn.compute_type(x))
    return _convolve(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.groups)


def takes_embed_patches(x: Tensor, conv1: nn.Conv2d, norm1: nn.Module, conv2: nn.Conv2d, norm2: nn.Module) -> bool:
    return _takes(x, *(p for module in (conv1, norm1, conv2, norm2) for p in module.parameters()))


def embed_patches(x: Tensor, conv1: nn.Conv2d, norm1: nn.Module, conv2: nn.Conv2d, norm2: nn.Module) -> Tensor:
    parameters, epsilons = [], []
    for conv, norm in ((conv1, norm1), (conv2, norm2)):
        layer_norm = cast(nn.Sequential, norm)[1]
        parameters += [conv.weight, conv.bias, layer_norm.weight, layer_norm.bias]
        epsilons.append(layer_norm.eps)
    return _embed_patches(x.to(onednn.compute_type(x)), parameters, epsilons)


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


@torch.library.custom_op('vheat_mm::decays_of', mutates_args=())
def _decays_of(
    freq_embed: Tensor, weights: list[Tensor], biases: list[Tensor], height: int, width: int
) -> list[Tensor]:
    from vheat_mm.ops.reference import decays_of

    size = (height, width)
    build = lambda: decays_of(freq_embed, weights, biases, size)  # noqa: E731
    kept = _DECAYS.get((id(freq_embed), size), [freq_embed, *weights, *biases], build)
    return [decay.clone() for decay in kept]  # the graph may write into what it is given


@torch.library.custom_op('vheat_mm::convolve', mutates_args=())
def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], groups: int
) -> Tensor:
    weight = onednn.prepared_filter(weight, x.dtype).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, padding, groups=groups)
    return out.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op('vheat_mm::embed_patches', mutates_args=())
def _embed_patches(x: Tensor, parameters: list[Tensor], epsilons: list[float]) -> Tensor:
    layers: list[Any] = []
    for i, eps in enumerate(epsilons):
        weight, bias, scale, shift = parameters[4 * i : 4 * i + 4]
        # what the fast form reads of a convolution and a norm; a graph passes tensors, no modules
        layers.append(
            SimpleNamespace(weight=weight, bias=bias.to(x.dtype), stride=(2, 2), out_channels=weight.shape[0])
        )
        layers.append(partial(F.layer_norm, normalized_shape=scale.shape, weight=scale, bias=shift, eps=eps))
    return convolution.embed_patches(x, *layers).to(x.dtype)


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


@_decays_of.register_fake
def _(freq_embed: Tensor, weights: list[Tensor], biases: list[Tensor], height: int, width: int) -> list[Tensor]:
    return [freq_embed.new_empty(height, width, freq_embed.shape[2]) for _ in weights]


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], groups: int) -> Tensor:
    sides = [
        (side + 2 * p - k) // s + 1
        for side, p, k, s in zip(x.shape[1:3], padding, weight.shape[2:], stride, strict=True)
    ]
    return x.new_empty(x.shape[0], *sides, weight.shape[0])


@_embed_patches.register_fake
def _(x: Tensor, parameters: list[Tensor], epsilons: list[float]) -> Tensor:
    sides = [(side + 3) // 4 for side in x.shape[1:3]]
    return x.new_empty(x.shape[0], *sides, parameters[4].shape[0])
