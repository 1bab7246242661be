"""Crops at fixed positions, for multi-crop testing of classifiers."""

from __future__ import annotations

from typing import Any

from mmengine.registry import TRANSFORMS

POSITIONS = dict(
    center=(0.5, 0.5), top_left=(0.0, 0.0), top_right=(0.0, 1.0), bottom_left=(1.0, 0.0), bottom_right=(1.0, 1.0)
)  # part of the cropped margin that lies above and to the left


@TRANSFORMS.register_module()
class CropAt:
    """Crop ``results['img']`` (H, W, C) at its center or a corner.

    Args:
        crop_size: Side, or (height, width), in pixels; a side of the image that is smaller is not cropped.
        position: One of :data:`POSITIONS`.

    Raises:
        ValueError: Unknown position; a size that is not positive.
    """

    def __init__(self, crop_size: int | tuple[int, int], position: str = 'center'):
        if position not in POSITIONS:
            raise ValueError(f'position={position!r}, expected one of {sorted(POSITIONS)}')
        self.crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
        if len(self.crop_size) != 2 or min(self.crop_size) < 1:
            raise ValueError(f'crop_size={crop_size!r}, expected a side or (height, width) in pixels')
        self.position = position

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Crop, and set ``results['img_shape']``."""
        image = results['img']
        window = []
        for length, side, share in zip(image.shape[:2], self.crop_size, POSITIONS[self.position], strict=True):
            start = round(max(0, length - side) * share)
            window.append(slice(start, start + side))
        results['img'] = image[tuple(window)]
        results['img_shape'] = results['img'].shape[:2]
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(crop_size={self.crop_size}, position={self.position!r})'
