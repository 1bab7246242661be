"""Predictions of a test as images and label maps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class WritePredictionsHook(Hook):
    """Draw each test image with its prediction, and write label maps of segmentors.

    The libraries' own hooks write files under the last part of an image's path, so that images of the same name in
    different folders replace each other, and read images of up to three bands. Here the files lie in the same
    subfolders as the images, and an image is read with the first step of the test pipeline. Of more than three bands,
    the first three are drawn; values beyond 8 bits are scaled to the image's range.

    Args:
        image_dir: Folder for the drawn images.
        map_dir: Folder for the predicted label maps, as PNG (16 bits a pixel with more than 256 classes).
        show: Show each drawn image in a window.
        wait_time: Seconds that it is shown.
        options: Further arguments of the visualizer, such as ``pred_score_thr`` of mmdet's.
    """

    def __init__(
        self,
        image_dir: str | None = None,
        map_dir: str | None = None,
        show: bool = False,
        wait_time: float = 0,
        options: dict | None = None,
    ) -> None:
        self.image_dir, self.map_dir = image_dir, map_dir
        self.show, self.wait_time, self.options = show, wait_time, options or {}
        self._bands_mentioned = False

    def before_test(self, runner: Runner) -> None:
        """Find the folder that holds all images, and the step that reads them."""
        datasets = list(_parts(runner.test_dataloader.dataset))
        prefixes = [getattr(dataset, 'data_prefix', None) or {} for dataset in datasets]
        folders = [value for prefix in prefixes for key, value in prefix.items() if key.startswith('img')]
        self._root = os.path.commonpath([Path(folder).absolute() for folder in folders]) if folders else os.curdir
        self._load = datasets[0].pipeline.transforms[0]
        if self.show:
            runner.visualizer._vis_backends = {}

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence | None = None
    ) -> None:
        """Write the predictions of a batch."""
        for sample in outputs or ():
            name = self._name(sample.img_path)
            if self.map_dir is not None:
                _write_map(Path(self.map_dir) / name.with_suffix('.png'), sample)
            if self.image_dir is not None or self.show:
                self._draw(runner, name, sample)

    def _name(self, path: str) -> Path:
        """Name of an image below the folder of all images."""
        absolute = Path(path).absolute()
        return absolute.relative_to(self._root if absolute.is_relative_to(self._root) else absolute.anchor)

    def _draw(self, runner: Runner, name: Path, sample: Any) -> None:
        out_file = None
        if self.image_dir is not None:
            target = Path(self.image_dir) / name
            out_file = str(target if target.suffix in ('.jpg', '.jpeg', '.png') else f'{target}.png')
        image = self._load(dict(sample.metainfo))['img']
        if image.ndim == 3 and image.shape[2] > 3 and not self._bands_mentioned:
            self._bands_mentioned = True
            runner.logger.info(f'{sample.img_path} has {image.shape[2]} bands: the first three are drawn')
        picture = _to_rgb(image, bgr=getattr(self._load, 'imdecode_backend', 'cv2') != 'tifffile')
        draw = getattr(runner.visualizer, 'visualize_cls', runner.visualizer.add_datasample)
        # Visualizers draw in rank 0 only: their decorator ``mmengine.dist.master_only`` calls this function.
        with mock.patch('mmengine.dist.utils.is_main_process', return_value=True):
            if runner.visualizer.dataset_meta is None:  # MMEngine sets it in rank 0 only
                runner.visualizer.dataset_meta = runner.test_dataloader.dataset.metainfo
            draw(
                name=name.name,
                image=picture,
                data_sample=sample,
                show=self.show,
                wait_time=self.wait_time,
                out_file=out_file,
                **self.options,
            )


def _parts(dataset: Any) -> Iterator[Any]:
    """All data sets inside wrappers."""
    inner = getattr(dataset, 'datasets', None) or ([dataset.dataset] if hasattr(dataset, 'dataset') else [])
    if not inner:
        yield dataset
    for part in inner:
        yield from _parts(part)


def _to_rgb(image: np.ndarray, bgr: bool) -> np.ndarray:
    """An image of (H, W) or (H, W, bands) as uint8 of (H, W, 3)."""
    image = image[..., None] if image.ndim == 2 else image
    image = image[..., :3] if image.shape[2] >= 3 else image[..., [0, 0, 0]]
    low, high = float(image.min()), float(image.max())
    if image.dtype != np.uint8 and (low < 0 or high > 255):
        image = (image.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return np.ascontiguousarray((image[..., ::-1] if bgr else image).astype(np.uint8))


def _write_map(path: Path, sample: Any) -> None:
    labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
    if sample.metainfo.get('reduce_zero_label'):  # the numbers of the annotations, as mmseg's IoUMetric writes them
        labels = labels + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), labels.astype(np.uint8 if labels.max() < 256 else np.uint16)):
        raise OSError(f'could not write {path}')
