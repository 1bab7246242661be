"""Annotations of the data set that a config tests."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DATASETS

from vheat_mm.apis.inference.types import Item
from vheat_mm.utils.config_place import describe_building, type_name
from vheat_mm.utils.errors import ToolError


@dataclass(frozen=True)
class Truth:
    """Annotations of an image.

    Attributes:
        name: What it is called in the data set.
        boxes: (N, 4) corners x1, y1, x2, y2 in pixels.
        labels: (N,) indices of the model's classes.
        masks: Run-length encodings of pycocotools, where all objects have one.
        crowds: Run-length encodings of regions with many objects.
        label_map: (H, W) class indices, 255 where unlabelled.
        label: Index of the image's class.
    """

    name: str
    boxes: np.ndarray | None = None
    labels: np.ndarray | None = None
    masks: list[dict[str, Any]] | None = None
    crowds: tuple[dict[str, Any], ...] = ()
    label_map: np.ndarray | None = None
    label: int | None = None


class Annotated:
    """The images that a config tests, and what they show; label maps are read when they are asked for.

    Args:
        cfg: The config.
        task: 'detection', 'segmentation' or 'classification'.

    Attributes:
        items: The images.

    Raises:
        ToolError: The data set cannot be built, or an image or the whole has no annotations.
    """

    def __init__(self, cfg: Config, task: str) -> None:
        described = cfg.test_dataloader.dataset
        steps = [step for step in described.get('pipeline') or [] if 'Annotations' in type_name(step)]
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
                self._dataset: Any = DATASETS.build({**described, 'pipeline': [], 'test_mode': True})
            self._load_map = Compose(steps)
        except Exception as error:
            raise ToolError(f'cannot build the data set test_dataloader.dataset: {describe_building(error)}') from error
        self._task, self.items = task, []
        annotated = False
        field = dict(detection='instances', segmentation='seg_map_path', classification='gt_label')[task]
        for index in range(len(self._dataset)):
            info = self._dataset.get_data_info(index)
            path = info['img_path']
            if info.get(field) is None:
                raise ToolError(f'the data set test_dataloader.dataset has no annotation for {path!r}')
            annotated |= info[field] != []
            name = str(Path(path).relative_to(Path(path).parents[1])) if task == 'classification' else Path(path).name
            self.items.append(Item(path, name, index, path))
        if not annotated:
            raise ToolError('the data set test_dataloader.dataset has no annotations')

    def truth(self, index: int) -> Truth:
        """The annotations of an image."""
        info, name = self._dataset.get_data_info(index), self.items[index].name
        if self._task == 'detection':
            return _of_objects(name, info['instances'], (info['height'], info['width']))
        if self._task == 'segmentation':
            return Truth(name, label_map=self._load_map(info)['gt_seg_map'])
        return Truth(name, label=int(info['gt_label']))


def _of_objects(name: str, objects: list[dict[str, Any]], size: tuple[int, int]) -> Truth:
    """Of objects as MMDetection's data sets have them: ``bbox``, ``bbox_label``, ``ignore_flag``, ``mask``."""
    from pycocotools import mask as coco_mask

    def encode(mask: Any) -> dict[str, Any]:
        if isinstance(mask, list):  # polygons
            return coco_mask.merge(coco_mask.frPyObjects(mask, *size))
        return coco_mask.frPyObjects(mask, *size) if isinstance(mask['counts'], list) else mask

    single = [it for it in objects if not it.get('ignore_flag')]
    return Truth(
        name,
        boxes=np.array([it['bbox'] for it in single], np.float32).reshape(-1, 4),
        labels=np.array([it['bbox_label'] for it in single], np.int64),
        masks=[encode(it['mask']) for it in single] if all(it.get('mask') for it in single) else None,
        crowds=tuple(encode(it['mask']) for it in objects if it.get('ignore_flag') and it.get('mask')),
    )
