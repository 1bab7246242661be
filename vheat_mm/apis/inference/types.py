"""What passes between the stages of a prediction: an input as listed, an image as read, a result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Item:
    """One input, as listed.

    Attributes:
        path: The local file to read; of an address, the downloaded file.
        name: Unique relative POSIX name, such as 'holiday/a.jpg' or 'clip.mp4', with all characters of the file's.
            Results are mirrored under it, see :func:`~vheat_mm.apis.inference.names.output_names`.
        index: Its place in the listing.
        source: As the user wrote it, for messages.
        is_video: Whether it holds frames rather than one image.
    """

    path: str
    name: str
    index: int
    source: str
    is_video: bool = False


@dataclass
class Sample:
    """One image or frame to predict, or why there is none.

    Attributes:
        item: Where it comes from.
        image: (H, W, 3) uint8 in BGR order, or (H, W, bands); None where the pipeline of the config is to read
            ``item.path``, and after an error.
        frame: Its number from 0 in a video.
        error: One line on why it cannot be predicted.
        last: Whether it is the last sample of its item.
        fps: Frames a second of a video.
    """

    item: Item
    image: np.ndarray | None = None
    frame: int | None = None
    error: str | None = None
    last: bool = True
    fps: float | None = None


@dataclass
class Prediction:
    """What a model says of one image or frame, in pixels of the image as it was read.

    Attributes:
        item: Where it comes from.
        frame: Its number from 0 in a video.
        error: One line on why there is no result; all results are None then.
        last: Whether it is the last of its item.
        fps: Frames a second of a video.
        image: (H, W, 3) uint8 in BGR order, or (H, W, bands); None unless the Predictor keeps images.
        size: (height, width) of the image; (0, 0) after an error.
        task: 'detection', 'segmentation' or 'classification'.
        boxes: Of a detector, (N, 4) float32, corners x1, y1, x2, y2 in pixels, highest score first.
        scores: Of a detector, (N,) float32; of a classifier, (classes,) float32 probabilities.
        labels: Of a detector, (N,) int64 indices of the model's classes.
        masks: Of a detector with masks, one run-length encoding of pycocotools per box (``counts`` are bytes).
        label_map: Of a segmentor, (H, W) class indices, uint8 or uint16.
    """

    item: Item
    frame: int | None = None
    error: str | None = None
    last: bool = True
    fps: float | None = None
    image: np.ndarray | None = field(default=None, repr=False)
    size: tuple[int, int] = (0, 0)
    task: str = ''
    boxes: np.ndarray | None = None
    scores: np.ndarray | None = None
    labels: np.ndarray | None = None
    masks: list[dict[str, Any]] | None = None
    label_map: np.ndarray | None = None
