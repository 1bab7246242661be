"""Calls of a function on parts of a map, so that what it makes in between stays in the cache of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from vheat_mm.ops.eager import onednn
from vheat_mm.ops.registry import get_backend

# Fewer rows than this do not pay for reading the weights of a stage again.
MIN_ROWS = 1024


def apply_to_rows(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """``function(*maps)`` for a function that treats every position of its maps alike: (..., C) -> (..., C).

    On the CPU without gradients it is called on some positions at a time, (M, C), and the result takes the memory of
    the last map where the types agree.
    """
    if not _splits(maps[0]) or not all(m.is_contiguous() and m.shape == maps[0].shape for m in maps):
        return function(*maps)
    if maps[0].numel() // max(1, maps[0].shape[-1]) <= onednn.group_rows(maps[0]):
        return function(*maps)
    result = None
    for index, group in enumerate(onednn.split_rows(*maps)):
        part = function(*group)
        if result is None:  # under autocast with a float32 residual stream, the types differ
            result = maps[-1] if part.dtype is maps[-1].dtype else torch.empty_like(maps[-1], dtype=part.dtype)
            rows = result.view(-1, result.shape[-1]).split(len(group[0]))
        rows[index].copy_(part)
    return cast(Tensor, result)


def apply_to_images(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` for a function that treats every image of a batch alike: (B, H, W, C) -> (B, H, W, C).

    On the CPU without gradients it is called on some images at a time.
    """
    images = _images_per_group(x) if _splits(x) else len(x)
    if images >= len(x):
        return function(x)
    results = None
    for index, part in enumerate(x.split(images)):
        result = function(part)
        if results is None:
            results = result.new_empty(x.shape)
        results[index * images : index * images + len(part)] = result
    return cast(Tensor, results)


def _images_per_group(x: Tensor) -> int:
    """Images of a batch to compute at a time: as many as stay in the cache and as a product needs."""
    return max(onednn.slices_per_group(x), -(-MIN_ROWS // max(1, x.shape[1] * x.shape[2])))


def _splits(x: Tensor) -> bool:
    return not torch.is_grad_enabled() and get_backend() != 'reference' and x.numel() > 0 and onednn.runs_on_cpu(x)
