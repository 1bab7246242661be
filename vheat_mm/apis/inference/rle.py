"""Masks as COCO's run-length encodings, at the cost of what they cover rather than of the whole image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def encode_masks(masks: Any) -> list[dict[str, Any]]:
    """Run-length encodings, equal to those of pycocotools, of (N, height, width) booleans."""
    dense = masks.cpu().numpy() if isinstance(masks, torch.Tensor) else np.asarray(masks)
    return [_encode(mask) for mask in dense]


def _encode(mask: np.ndarray) -> dict[str, Any]:
    columns, rows = (np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1))
    if not len(rows):
        return encode_crop(mask[:1, :1], 0, 0, mask.shape)
    x, y = int(columns[0]), int(rows[0])
    return encode_crop(mask[y : rows[-1] + 1, x : columns[-1] + 1], x, y, mask.shape)


def encode_crop(crop: np.ndarray, x: int, y: int, size: tuple[int, ...]) -> dict[str, Any]:
    """Encode the mask of an image that is false outside of a crop.

    pycocotools goes through all pixels of the image, column by column; those of a photograph take 50 ms a mask.

    Args:
        crop: (height, width) booleans.
        x: Of the crop's first column in the image.
        y: Of its first row.
        size: (height, width) of the image.
    """
    from pycocotools import mask as coco_mask

    height, width = size
    slab = np.zeros((crop.shape[1], height), bool)  # the columns that the crop touches
    slab[:, y : y + crop.shape[0]] = crop.T
    flat = slab.ravel()
    turns = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(turns, prepend=0, append=flat.size).tolist()
    if flat[0]:
        counts.insert(0, 0)  # runs of false come first
    if len(counts) % 2 == 0:
        counts.append(0)
    counts[0] += x * height
    counts[-1] += (width - x - crop.shape[1]) * height
    if not counts[-1]:
        counts.pop()
    return coco_mask.frPyObjects(dict(counts=counts, size=[height, width]), height, width)
