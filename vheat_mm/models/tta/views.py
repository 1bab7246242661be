"""Geometry of a view: its metadata, and transforms between its coordinates and the image's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmengine.structures import BaseDataElement
from torch import Tensor

from vheat_mm.utils.errors import ViewError

DIRECTIONS = ('horizontal', 'vertical', 'diagonal')
_NEEDED = ('ori_shape', 'scale_factor', 'flip', 'flip_direction')


def check_views(views: Sequence[Sequence[BaseDataElement]]) -> None:
    """Check the metadata of every sample of every view.

    Args:
        views: Samples by view and image.

    Raises:
        ViewError: There is no view; metadata is missing; views at the same index are of different images.
    """
    if not views or not views[0]:
        raise ViewError('test-time augmentation got no views: TestTimeAug.transforms of the tta_pipeline is empty')
    for number, samples in enumerate(views):
        for sample, first in zip(samples, views[0], strict=True):
            meta = sample.metainfo
            where = f'view {number} of {meta.get("img_path", "an image without img_path")}'
            missing = [
                key for key in _NEEDED if key not in meta and (key != 'flip_direction' or meta.get('flip', False))
            ]
            if missing:
                raise ViewError(
                    f'{where} lacks {", ".join(missing)}: in the tta_pipeline, every view needs a Resize (or '
                    'scale_factor) and a RandomFlip (prob=0.0 for a view that is not flipped), and PackDetInputs.'
                    "meta_keys must name 'ori_shape', 'img_shape', 'scale_factor', 'flip' and 'flip_direction'"
                )
            if meta['flip'] and meta['flip_direction'] not in DIRECTIONS:
                raise ViewError(f'{where} has flip_direction={meta["flip_direction"]!r}, expected one of {DIRECTIONS}')
            if tuple(meta['ori_shape'][:2]) != tuple(first.metainfo['ori_shape'][:2]):
                raise ViewError(
                    f'{where} has ori_shape={meta["ori_shape"]}, and view 0 {first.metainfo["ori_shape"]}: '
                    'views must be of one image'
                )


def flip_boxes(boxes: Tensor, meta: Mapping) -> Tensor:
    """Boxes (n, 4) as (x1, y1, x2, y2), between the image and its flipped view; its own inverse."""
    if not meta['flip']:
        return boxes
    from mmdet.structures.bbox import bbox_flip

    return bbox_flip(boxes, meta['ori_shape'], meta['flip_direction'])


def to_view(boxes: Tensor, meta: Mapping) -> Tensor:
    """Boxes (n, 4) from pixels of the image to pixels of the view."""
    return flip_boxes(boxes, meta) * boxes.new_tensor(meta['scale_factor']).repeat(2)


def flip_maps(maps: Tensor, meta: Mapping) -> Tensor:
    """Maps (..., H, W) from the view's orientation to the image's; its own inverse."""
    if not meta['flip']:
        return maps
    axes = dict(horizontal=(-1,), vertical=(-2,), diagonal=(-2, -1))[meta['flip_direction']]
    return maps.flip(axes)
