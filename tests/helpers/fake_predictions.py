"""Predictions made by hand, for tests of what is done with them."""

import numpy as np
import pytest

from vheat_mm.apis.inference.types import Item, Prediction

CLASSES = ('coin', 'nut')
PALETTE = [(220, 20, 60), (0, 80, 200)]


def detection(name='a.jpg', index=0, size=(60, 80), frame=None, with_masks=True, **changes):
    """Three boxes, the last below most thresholds; masks are rectangles inside of them."""
    mask_of = pytest.importorskip('pycocotools.mask')
    boxes = np.array([[10.25, 20.1, 30.7, 40.9], [40, 25, 70, 55], [5, 5, 9, 9]], np.float32)
    masks = []
    for x1, y1, x2, y2 in boxes.astype(int):
        dense = np.zeros(size, np.uint8, order='F')
        dense[y1 + 2 : y2 - 1, x1 + 2 : x2 - 1] = 1
        masks.append(mask_of.encode(dense))
    found = dict(
        item=Item(f'/data/{name}', name, index, name, is_video=frame is not None),
        frame=frame,
        image=np.full((*size, 3), 100, np.uint8),
        size=size,
        task='detection',
        boxes=boxes,
        scores=np.array([0.9, 0.6, 0.2], np.float32),
        labels=np.array([1, 0, 1]),
        masks=masks if with_masks else None,
    )
    return Prediction(**{**found, **changes})
