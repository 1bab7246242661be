"""The networks that benchmark.py compares: 4-output backbones of the same class, built without weights files."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from vheat_mm import VHeat
from vheat_mm.ops import use_backend
from vheat_mm.ops.eager.heat import uses_even_odd_split
from vheat_mm.ops.freq_embed import grid_sizes
from vheat_mm.ops.registry import BACKENDS
from vheat_mm.utils.torchvision import ensure_torchvision

MODELS = ('vheat', 'vheat-triton', 'vheat-reference', 'swin', 'swin-scaled', 'convnext')
ARCHS = ('tiny', 'small', 'base')
_SWIN = dict(
    tiny=dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    small=dict(embed_dims=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    base=dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
)
WINDOW_RULES = dict(swin='window 7 at every size', **{'swin-scaled': "window = side / 32, the papers' rule"})


class ModelError(Exception):
    """A model cannot be built here, or not for this size."""


def build(name: str, arch: str, size: tuple[int, int]) -> nn.Module:
    """Build a model for images of (height, width) pixels.

    Raises:
        ModelError: The package it comes from is missing; it does not exist for this size.
    """
    if name == 'vheat-triton' and not torch.cuda.is_available():
        raise ModelError('Triton kernels need a CUDA device, and PyTorch sees none here')
    if name.startswith('vheat'):
        return VHeat(arch, img_size=size)
    ensure_torchvision()  # mmdet imports mmpretrain, which imports torchvision
    if name.startswith('swin'):
        window = 7
        if name == 'swin-scaled':
            if size[0] != size[1] or size[0] % 32:
                raise ModelError(f'the scaled window needs a square size in steps of 32, not {size[0]}x{size[1]}')
            window = size[0] // 32
        with _needs('mmdet', 'pip install mmdet'):
            from mmdet.models.backbones import SwinTransformer
        return SwinTransformer(**_SWIN[arch], window_size=window, out_indices=(0, 1, 2, 3), drop_path_rate=0.0)
    with _needs('mmpretrain', 'pip install mmpretrain'):
        from mmpretrain.models.backbones import ConvNeXt
    return ConvNeXt(arch, out_indices=(0, 1, 2, 3), gap_before_final_norm=False)


def backend_of(name: str) -> contextlib.AbstractContextManager:
    """Context in which a model's ops run with the backend that its name ends in; else with the current one."""
    _, _, backend = name.partition('-')
    return use_backend(backend) if backend in BACKENDS else contextlib.nullcontext()


@contextlib.contextmanager
def _needs(package: str, remedy: str):
    try:
        yield
    except ImportError as error:
        raise ModelError(f'{package} cannot be imported ({error}): {remedy}, or leave the model out') from error


def minimal_bytes(model: nn.Module, batch: int, size: tuple[int, int], element: int) -> int:
    """Bytes that a forward pass of vHeat must move at least, for the roofline.

    Counted: every weight once; every block's map read and written by its two residual branches (4 times the map of
    its stage) in ``element`` bytes a value; its decay map once; every output once. Not counted: whatever a kernel
    could keep on chip.
    """
    total = sum(p.numel() for p in model.parameters()) * element
    for (height, width), dim, depth in zip(grid_sizes(size), model.num_features, model.depths, strict=True):
        positions = height * width
        total += depth * (4 * batch + 1) * positions * dim * element + batch * positions * dim * element
    return total


def even_odd_flops(model: nn.Module, batch: int, size: tuple[int, int], dtype: torch.dtype) -> int:
    """FLOPs that the even/odd split of the DCT saves against the reference backend, two per multiply-add."""
    saved = 0
    for (h, w), dim, depth in zip(grid_sizes(size), model.num_features, model.depths, strict=True):
        if uses_even_odd_split(h, w, dtype):
            products = sum((n * n - (n - n // 2) ** 2 - (n // 2) ** 2) * other for n, other in ((h, w), (w, h)))
            saved += depth * batch * 2 * 2 * products * dim
    return saved
