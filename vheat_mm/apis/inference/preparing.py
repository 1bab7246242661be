"""From an input to what the network takes: the config's test pipeline without the loading of annotations."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope

from vheat_mm.apis.inference.reading import decoding, one_line, read
from vheat_mm.apis.inference.slicing import Tile, tiles_of
from vheat_mm.apis.inference.types import Sample
from vheat_mm.datasets.checks.images import LIMIT, Loader
from vheat_mm.utils.config_place import describe_building, type_name
from vheat_mm.utils.errors import ToolError


@dataclass
class Prepared:
    """An image or a tile of one, ready for the network.

    Attributes:
        sample: Where it comes from; its image only if it is kept, and of tiles only with the last one.
        size: (height, width) of the whole image.
        data: What the pipeline returns: 'inputs' and 'data_samples'; ``None`` after an error.
        tile: Its place; ``None`` for a whole image.
    """

    sample: Sample
    size: tuple[int, int] = (0, 0)
    data: dict[str, Any] | None = None
    tile: Tile | None = None


class Preparer:
    """Reads an input and runs the pipeline on each of its images.

    Args:
        cfg: Its test pipeline is used.
        bands: Number of bands that the model takes; 1 fits any image.
        keep_image: Whether the images themselves are returned, too.
        slice_size: Side of the tiles in pixels of the image; ``None`` for whole images.
        overlap: Share of a tile that the next one repeats.
        max_pixels: Of an image or frame, see :func:`~vheat_mm.apis.inference.reading.read`.

    Raises:
        ToolError: The config's pipeline cannot be built.
    """

    def __init__(
        self,
        cfg: Config,
        bands: int,
        keep_image: bool = False,
        slice_size: int | None = None,
        overlap: float = 0.0,
        max_pixels: int | None = None,
    ) -> None:
        steps = test_pipeline(cfg)
        loading = next((place for place, step in enumerate(steps) if place and not _loads(step)), len(steps))
        try:
            # MMEngine's default scope is that of the model that was loaded last.
            with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
                self._load, self._transform = Compose(steps[:loading]), Compose(steps[loading:])
        except Exception as error:
            raise ToolError(f'cannot build the test pipeline: {describe_building(error)}') from error
        self._loader = Loader(steps[0].get('color_type', 'color'), steps[0].get('imdecode_backend', 'cv2'))
        self._to_float32 = steps[0].get('to_float32', False)
        self._is_rgb = steps[0].get('imdecode_backend') == 'tifffile'
        # Of more than three bands, the pipeline subtracts the means where the preprocessor cannot.
        means = [step['mean'] for step in steps if type_name(step) == 'Normalize']
        self._bands = len(means[0]) if means and bands == 1 else bands
        self._keep, self._max_pixels = keep_image, max_pixels
        self._slice_size, self._overlap = slice_size, overlap

    def __call__(self, sample: Sample) -> Iterator[Prepared]:
        """The images of an input, which is read unless its pixels are given; or why there is none, in one line."""
        if sample.image is not None:
            yield from self._prepare(sample)
            return
        if self._max_pixels is not None:  # in the process that reads: the tools' file backend has the same limit
            os.environ[LIMIT] = str(self._max_pixels)
        for found in read(sample.item, self._max_pixels, self._loader):
            yield from self._prepare(found)

    def _prepare(self, sample: Sample) -> Iterator[Prepared]:
        if sample.error is not None:
            yield Prepared(sample)
            return
        try:
            loaded = self._loaded(sample)
            image = loaded['img']
            kept = replace(sample, image=self._display(image) if self._keep else None)
            size = image.shape[0], image.shape[1]
            if self._slice_size is None or max(size) <= self._slice_size:
                yield Prepared(kept, size, self._run(loaded))
                return
            for tile in tiles_of(*size, self._slice_size, self._overlap):
                part = np.ascontiguousarray(
                    image[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop]
                )
                data = self._run(self._results(sample, part))
                yield Prepared(kept if tile.is_last else replace(kept, image=None), size, data, tile)
        except Exception as error:
            yield Prepared(replace(sample, image=None, error=one_line(error)))

    def _loaded(self, sample: Sample) -> dict[str, Any]:
        """The pipeline's results after its loading: of a file by the config's own step, so as in a test."""
        if sample.image is None:
            with decoding():
                loaded = self._load(dict(img_path=sample.item.path, img_id=sample.item.index))
            if loaded is None:
                raise ValueError('the first step of the test pipeline returns no image')
        else:
            image = sample.image
            if self._loader.flag != 'unchanged' and self._loader.backend != 'tifffile' and image.dtype != np.uint8:
                raise ValueError(f'an array of {image.dtype}; the config decodes images to uint8, from 0 to 255')
            if image.ndim == 2 or image.shape[2:] == (1,):
                image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
            if image.ndim != 3 or 0 in image.shape:
                raise ValueError(f'an array of shape {image.shape}, expected (height, width, bands)')
            loaded = self._results(sample, image.astype(np.float32) if self._to_float32 else image)
        shape = loaded['img'].shape
        bands = shape[2] if len(shape) > 2 else 1
        if bands != self._bands and 1 not in (bands, self._bands):
            raise ValueError(f'an image of {bands} bands, and the model takes {self._bands}')
        return loaded

    @staticmethod
    def _results(sample: Sample, image: np.ndarray) -> dict[str, Any]:
        """What a loading step returns."""
        shape = image.shape[:2]
        return dict(img=image, img_path=sample.item.path, img_id=sample.item.index, img_shape=shape, ori_shape=shape)

    def _run(self, results: dict[str, Any]) -> dict[str, Any]:
        data = self._transform(results)
        if data is None:
            raise ValueError('the test pipeline leaves this image out')
        return data

    def _display(self, image: np.ndarray) -> np.ndarray:
        """An own copy, of three bands as uint8 in BGR order."""
        if image.ndim == 3 and image.shape[2] == 3:
            image = image[..., ::-1] if self._is_rgb else image
            return np.array(image.clip(0, 255) if image.dtype != np.uint8 else image, np.uint8, order='C')
        return image.copy()


def test_pipeline(cfg: Config) -> list[dict[str, Any]]:
    """The steps of the data set that a config tests, without those that load annotations.

    Raises:
        ToolError: The data set has none.
    """
    dataset = cfg.test_dataloader.dataset
    while not dataset.get('pipeline') and (inner := dataset.get('dataset') or dataset.get('datasets')):
        dataset = inner[0] if isinstance(inner, list | tuple) else inner
    if not dataset.get('pipeline'):
        raise ToolError(f'test_dataloader.dataset is a {type_name(dataset)} without a pipeline to prepare images with')
    return _without_annotations(copy.deepcopy(list(dataset.pipeline)))


def _without_annotations(steps: list[Any]) -> list[Any]:
    """Also within the views of test-time augmentation, which are lists of alternatives."""
    kept = []
    for step in steps:
        if isinstance(step, list | tuple):
            if inner := _without_annotations(list(step)):
                kept.append(inner)
        elif not (_loads(step) and 'Annotation' in type_name(step)):
            if step.get('transforms'):
                step['transforms'] = _without_annotations(list(step['transforms']))
            kept.append(step)
    return kept


def _loads(step: dict[str, Any]) -> bool:
    return type_name(step).startswith('Load')
