"""Images as arrays, and as a model takes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from mmengine.dataset import pseudo_collate

from vheat_mm.apis.inference.model import LoadedModel
from vheat_mm.apis.inference.preparing import Preparer
from vheat_mm.apis.inference.reading import decoding, read
from vheat_mm.apis.inference.sources import list_items
from vheat_mm.apis.inference.types import Item, Sample
from vheat_mm.engine.hooks.annotation_check_hook import count_bands
from vheat_mm.utils.errors import ToolError


def list_images(sources: Sequence[str]) -> list[Item]:
    """Images among files, folders, globs, lists of paths and addresses.

    Raises:
        ToolError: There are none, or one is a video.
    """
    items = list_items(list(sources))
    if video := next((item for item in items if item.is_video), None):
        raise ToolError(f'{video.source} is a video: give images')
    return items


def open_images(items: Iterable[Item]) -> Iterator[np.ndarray]:
    """Pixels (H, W, 3) uint8 RGB.

    Raises:
        ToolError: An image cannot be read.
    """
    for item in items:
        for sample in read(item):
            if sample.error is not None:
                raise ToolError(f'{item.source}: {sample.error}')
            with decoding():
                image = cv2.imread(sample.item.path)
            if image is None:
                raise ToolError(f'{item.source} cannot be decoded')
            yield np.ascontiguousarray(image[..., ::-1])


def prepare_images(loaded: LoadedModel, samples: Iterable[Sample]) -> Iterator[dict[str, Any]]:
    """Run the test pipeline of a model's config on images.

    Yields:
        Of each image a batch of it alone: ``inputs`` and ``data_samples``.

    Raises:
        ToolError: One cannot be read.
    """
    prepare = Preparer(loaded.cfg, count_bands(loaded.model))
    for sample in samples:
        prepared = next(prepare(sample))
        if prepared.data is None:
            raise ToolError(f'{sample.item.source}: {prepared.sample.error}')
        yield pseudo_collate([prepared.data])
