"""Large images in tiles that overlap, and one result from those of all tiles.

Each tile takes the way of a whole image: the config's pipeline, then the network. mmseg's ``mode='slide'`` cuts what
the pipeline has scaled down already, and holds the logits of all classes for every pixel of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vheat_mm.apis.inference.rle import encode_crop
from vheat_mm.utils.errors import ToolError

# Share of the smaller of two boxes or masks of a class from which both are the same object: of one that a tile cuts,
# the part lies inside the whole.
SAME_OBJECT = 0.5
_MARGIN = 2  # pixels within which a box touches the side of its tile


class Span(NamedTuple):
    """Of one axis of a tile, in pixels: from start to stop, of which first to end lies nearer to its middle."""

    start: int
    stop: int
    first: int
    end: int


class Tile(NamedTuple):
    """A part of an image, and whether it is the last one of it."""

    rows: Span
    columns: Span
    is_last: bool


def tiles_of(height: int, width: int, size: int, overlap: float) -> Iterator[Tile]:
    """Tiles of ``size`` x ``size`` pixels, row by row; the last ones of an axis overlap more rather than end early.

    Args:
        height: Of the image.
        width: Of the image.
        size: Side of a tile; an axis of the image that is shorter is not cut.
        overlap: Share of a tile that the next one repeats at least, from 0 to below 1.
    """
    rows, columns = (_spans(length, size, overlap) for length in (height, width))
    for row in rows:
        for column in columns:
            yield Tile(row, column, row is rows[-1] and column is columns[-1])


def _spans(length: int, size: int, overlap: float) -> list[Span]:
    stride = max(1, round(size * (1 - overlap)))
    starts = [*range(0, max(length - size, 0), stride), max(length - size, 0)]
    stops = [min(start + size, length) for start in starts]
    # Neighbours share what they overlap at its middle.
    inner = [(stop + start) // 2 for stop, start in zip(stops[:-1], starts[1:], strict=True)]
    return [Span(*span) for span in zip(starts, stops, [0, *inner], [*inner, length], strict=True)]


def merge_label_maps(pieces: Sequence[tuple[Tile, dict[str, Any]]], size: tuple[int, int]) -> dict[str, Any]:
    """One label map (height, width), each pixel from the tile in which it lies farthest from the sides."""
    merged = np.zeros(size, pieces[0][1]['label_map'].dtype)
    for (rows, columns, _), piece in pieces:
        part = piece['label_map'][rows.first - rows.start : rows.end - rows.start]
        part = part[:, columns.first - columns.start : columns.end - columns.start]
        merged[rows.first : rows.end, columns.first : columns.end] = part
    return dict(label_map=merged)


def merge_detections(pieces: Sequence[tuple[Tile, dict[str, Any]]], size: tuple[int, int]) -> dict[str, Any]:
    """The detections of all tiles in pixels of the image, each object once, highest score first.

    Of two detections of an object that is not cut, the one with the higher score stays. One that touches the side of
    its tile inside the image stays only where no other tile shows the object whole; so objects may be as large as the
    overlap. Masks stay run-length encoded.

    Args:
        pieces: Tiles with their ``boxes``, ``scores``, ``labels`` and ``masks``.
        size: (height, width) of the image.
    """
    sv = import_supervision('to merge the tiles of a detector')
    from pycocotools import mask as coco_mask

    height, width = size
    found = []
    for (rows, columns, _), piece in pieces:
        boxes = piece['boxes'] + np.array([columns.start, rows.start] * 2, np.float32)
        sides = (columns.start, rows.start, columns.stop, rows.stop)
        inside = (columns.start > 0, rows.start > 0, columns.stop < width, rows.stop < height)
        cut = ((np.abs(boxes - np.array(sides, np.float32)) <= _MARGIN) & np.array(inside)).any(axis=1)
        masks = None
        if piece['masks'] is not None:
            shape = rows.stop - rows.start, columns.stop - columns.start
            corners = coco_mask.toBbox(piece['masks']).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2] - 1  # supervision counts the last pixel in
            compact = sv.CompactMask.from_coco_rle(piece['masks'], corners, shape)
            masks = compact.with_offset(columns.start, rows.start, new_image_shape=size)
        found.append(
            sv.Detections(
                xyxy=boxes,
                mask=masks,
                confidence=piece['scores'] - cut,  # those that are cut come after all others
                class_id=piece['labels'],
                data=dict(score=piece['scores']),
            )
        )
    has_masks = found[0].mask is not None
    found = [part for part in found if len(part)]
    if not found:
        return pieces[0][1]
    merged = sv.Detections.merge(found)
    merged = merged.with_nms(threshold=SAME_OBJECT, overlap_metric=sv.OverlapMetric.IOS)
    merged = merged[np.argsort(-merged.data['score'], kind='stable')]
    masks = None
    if has_masks:
        corners = merged.mask.offsets.tolist()
        masks = [encode_crop(merged.mask.crop(place), x, y, size) for place, (x, y) in enumerate(corners)]
    return dict(boxes=merged.xyxy, scores=merged.data['score'], labels=merged.class_id, masks=masks)


def import_supervision(purpose: str) -> Any:
    """supervision, imported where it is needed: it takes most of a second.

    Raises:
        ToolError: It is not installed; the message names the purpose.
    """
    try:
        import supervision
    except ModuleNotFoundError as error:
        raise ToolError(f"supervision is needed {purpose}: pip install 'vheat_mm[predict]'") from error
    return supervision
