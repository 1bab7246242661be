"""Images as a model takes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import default_collate, pseudo_collate

from vheat_mm.apis.inference.model import LoadedModel
from vheat_mm.apis.inference.preparing import Job, Preparer
from vheat_mm.apis.inference.reading import read
from vheat_mm.apis.inference.sources import list_items
from vheat_mm.apis.inference.types import Item
from vheat_mm.engine.hooks.annotation_check_hook import count_bands
from vheat_mm.utils.errors import ToolError

Source = str | os.PathLike | np.ndarray


def prepare_images(loaded: LoadedModel, sources: Source | Sequence[Source]) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Run the test pipeline of a model's config on images.

    Args:
        loaded: The model.
        sources: Files, folders, globs, lists of paths, addresses; or arrays (height, width, bands) in BGR order.

    Yields:
        Each image, and a batch of it alone: ``inputs`` and ``data_samples``.

    Raises:
        ToolError: There are no images, one cannot be read, or it is a video.
    """
    prepare = Preparer(loaded.cfg, count_bands(loaded.model), read, keep_image=False, slice_size=None, overlap=0)
    several: list[Any] = list(sources) if isinstance(sources, list | tuple) else [sources]
    arrays = all(isinstance(source, np.ndarray) for source in several)
    jobs = (
        [Job(Item('', f'array {number}', number, 'an array'), array) for number, array in enumerate(several)]
        if arrays
        else [Job(item) for item in list_items(several)]
    )
    # As the libraries' own loaders: mmpretrain's stack images, the others' leave that to the model.
    collate = default_collate if loaded.task == 'classification' else pseudo_collate
    for job in jobs:
        if job.item.is_video:
            raise ToolError(f'{job.item.source} is a video: give images')
        prepared = next(prepare(job))
        if prepared.data is None:
            raise ToolError(f'{job.item.source}: {prepared.sample.error}')
        yield job.item, collate([prepared.data])
