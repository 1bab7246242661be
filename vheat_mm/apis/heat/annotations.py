"""Annotations of images, of a data set that a config tests or of a COCO file."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import Compose
from mmengine.registry import DATASETS

from vheat_mm.utils.config_place import describe_building, type_name
from vheat_mm.utils.errors import ToolError


@dataclass(frozen=True)
class Truth:
    """Annotations of an image.

    Attributes:
        path: The image's file.
        name: What it is called in the data set.
        boxes: (N, 4) corners x1, y1, x2, y2 in pixels.
        labels: (N,) indices of the model's classes.
        masks: Run-length encodings of pycocotools, where all objects have one.
        crowds: Run-length encodings of regions with many objects.
        label_map: (H, W) class indices, 255 where unlabelled.
        label: Index of the image's class.
    """

    path: str
    name: str
    boxes: np.ndarray | None = None
    labels: np.ndarray | None = None
    masks: list[dict[str, Any]] | None = None
    crowds: tuple[dict[str, Any], ...] = ()
    label_map: np.ndarray | None = None
    label: int | None = None


def read_dataset(cfg: Any, task: str) -> Iterator[Truth]:
    """The annotations of the data set that a config tests.

    Raises:
        ToolError: It cannot be built, or has none.
    """
    described = cfg.test_dataloader.dataset
    steps = [step for step in described.get('pipeline') or [] if 'Annotations' in type_name(step)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            dataset = DATASETS.build({**described, 'pipeline': [], 'test_mode': True})
        load_map = Compose(steps)
    except Exception as error:
        raise ToolError(f'cannot build the data set test_dataloader.dataset: {describe_building(error)}') from error
    objects = 0
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        path = info['img_path']
        name = str(Path(path).relative_to(Path(path).parents[1])) if task == 'classification' else Path(path).name
        if task == 'detection':
            objects += len(info['instances'])
            yield detection_truth(path, name, info['instances'], (info['height'], info['width']))
        elif task == 'segmentation':
            if not info.get('seg_map_path'):
                raise ToolError(f'the data set has no label map for {path!r}')
            yield Truth(path, name, label_map=load_map(info)['gt_seg_map'])
        elif 'gt_label' in info:
            yield Truth(path, name, label=int(info['gt_label']))
        else:
            raise ToolError(f'the data set has no class for {path!r}')
    if task == 'detection' and not objects:
        raise ToolError('the data set test_dataloader.dataset has no annotations')


def from_coco(entries: list[dict], labels: dict[Any, int]) -> list[dict]:
    """COCO's annotations or detections as MMDetection's data sets have them."""
    return [
        dict(
            bbox=np.add(entry['bbox'], [0, 0, *entry['bbox'][:2]]),
            bbox_label=labels[entry['category_id']],
            ignore_flag=entry.get('iscrowd', 0),
            mask=entry.get('segmentation'),
        )
        for entry in entries
    ]


def detection_truth(path: str, name: str, objects: list[dict], size: tuple[int, int]) -> Truth:
    """Of objects as MMDetection's data sets have them: ``bbox``, ``bbox_label``, ``ignore_flag``, ``mask``."""
    from pycocotools import mask as coco_mask

    def encode(mask: Any) -> dict[str, Any]:
        parts = (
            coco_mask.frPyObjects(mask, *size) if isinstance(mask, list) or isinstance(mask['counts'], list) else mask
        )
        return coco_mask.merge(parts) if isinstance(parts, list) else parts

    single = [it for it in objects if not it.get('ignore_flag')]
    crowds = tuple(encode(it['mask']) for it in objects if it.get('ignore_flag') and it.get('mask'))
    return Truth(
        path,
        name,
        boxes=np.array([it['bbox'] for it in single], np.float32).reshape(-1, 4),
        labels=np.array([it['bbox_label'] for it in single], np.int64),
        masks=[encode(it['mask']) for it in single] if all(it.get('mask') for it in single) else None,
        crowds=crowds,
    )
