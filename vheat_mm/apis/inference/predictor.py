"""Prediction on images, folders and videos, one result at a time."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from mmengine.registry import DefaultScope

from vheat_mm.apis.config import check_cpu_amp
from vheat_mm.apis.inference.model import check_device, load_model
from vheat_mm.apis.inference.preparing import Prepared, Preparer
from vheat_mm.apis.inference.read_ahead import WorkerDied, read_ahead
from vheat_mm.apis.inference.reading import one_line
from vheat_mm.apis.inference.rle import encode_masks
from vheat_mm.apis.inference.slicing import Tile, import_supervision, merge_detections, merge_label_maps
from vheat_mm.apis.inference.sources import list_items
from vheat_mm.apis.inference.types import Item, Prediction, Sample
from vheat_mm.engine.hooks.annotation_check_hook import count_bands
from vheat_mm.utils.config_place import did_you_mean
from vheat_mm.utils.dist import unwrap
from vheat_mm.utils.errors import ArgumentError, ToolError
from vheat_mm.utils.text import first_line, some_of

Source = str | os.PathLike | np.ndarray
IGNORED = 255  # in label maps: pixels of classes that were not chosen; 65535 in those of 16 bits
Result = dict[str, Any] | str  # of an image or tile; a text for an error


class Predictor:
    """A trained model that predicts on files and arrays.

    ``for prediction in Predictor('config.py', 'epoch_12.pth')('photographs/'): ...`` reads, decodes and prepares the
    images in a process of its own while the network runs, and holds a few of them at a time. An input that cannot be
    read gives a prediction whose ``error`` says why.

    Args:
        config: Path, name such as ``'vheat_mm::detection/mask-rcnn_vheat-t_fpn_1x_coco.py'``, or a config.
        checkpoint: Path, address or name of published weights; ``'released'`` for those of the config.
        device: Such as 'cuda:0'; by default the accelerator that is found, else the CPU.
        batch_size: Images, or tiles, that the network takes at once. Only those of equal size after the pipeline: more
            padding would change vHeat's cosine transform, which runs over the whole map, and so the results.
        tta: Test-time augmentation.
        amp: Mixed precision: float16, on the CPU bfloat16 (not for detectors).
        half: Weights in float16, too: half of their memory; needs a GPU.
        classes: Names of the classes to keep; all by default. Label maps hold 255 (of 16 bits 65535) elsewhere, and
            probabilities of other classes are 0.
        score_thr: Of detectors: detections below this score are left out. By default as the config
            shows them, else 0.3.
        slice_size: Cut images that are larger than this many pixels into tiles of this size; not for classifiers.
        overlap: Share of a tile that the next one repeats, 0.2 by default; objects up to this size are found whole.
        cfg_options: Values of the config to replace, such as ``{'model.test_cfg.rcnn.max_per_img': 300}``.
        keep_image: Return the images with the predictions.
        max_pixels: Refuse larger files before they are decoded; by default what is 512 MiB decoded.

    Attributes:
        task: 'detection', 'segmentation' or 'classification'.
        classes: Names of the model's classes.
        palette: A colour (red, green, blue) for each.
        score_thr: See above.
        overlap: See above.
        model: The network.
        cfg: Its config.
        device: Where the network runs.

    Raises:
        ToolError: An option is out of range or does not fit the task; see also
            :func:`~vheat_mm.apis.inference.model.load_model`.
        CheckpointError: The checkpoint is unreadable or of another config.
    """

    def __init__(
        self,
        config: str | os.PathLike | Config,
        checkpoint: str | os.PathLike,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 1,
        tta: bool = False,
        amp: bool = False,
        half: bool = False,
        classes: str | Sequence[str] | None = None,
        score_thr: float | None = None,
        slice_size: int | None = None,
        overlap: float | None = None,
        cfg_options: dict[str, Any] | None = None,
        keep_image: bool = True,
        max_pixels: int | None = None,
    ) -> None:
        for name, value in (('batch_size', batch_size), ('slice_size', slice_size), ('max_pixels', max_pixels)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ArgumentError(name, value, 'expected a positive whole number')
        if overlap is not None and not 0 <= overlap < 1:
            raise ArgumentError('overlap', overlap, 'expected a share of a tile from 0 to below 1, such as 0.2')
        if overlap is not None and slice_size is None:
            raise ArgumentError('overlap', overlap, 'there are no tiles without slice_size (--slice)')
        if score_thr is not None and not 0 <= score_thr <= 1:
            raise ArgumentError('score_thr', score_thr, 'expected a score from 0 to 1')
        if amp and half:
            raise ArgumentError('amp', amp, 'half chooses the precision, too; drop one of the two')
        self.device = check_device(device)
        if half and self.device.type == 'cpu':
            raise ArgumentError('half', half, 'needs a GPU, as convolutions in float16 are slow or missing on the CPU')

        loaded = load_model(config, checkpoint, self.device, cfg_options, tta)
        self.model: Any = loaded.model
        self.cfg, self.task = loaded.cfg, loaded.task
        self.classes, self.palette = loaded.classes, loaded.palette
        if score_thr is not None and self.task != 'detection':
            raise ArgumentError('score_thr', score_thr, f'is for detections, and this is a model for {self.task}')
        if slice_size is not None and self.task == 'classification':
            reason = 'a class belongs to a whole image; tiles are for other tasks'
            raise ArgumentError('slice_size', slice_size, reason)
        if slice_size is not None and self.task == 'detection':
            import_supervision('to merge the tiles of a detector')
        if amp and self.device.type == 'cpu':
            check_cpu_amp(self.cfg)
        if half:
            self.model.half()
            unwrap(self.model).data_preprocessor.float()  # pixels are normalised as in training
        self.score_thr = loaded.score_thr if score_thr is None else float(score_thr)
        self._chosen = self._find_chosen(classes)
        self._low_precision = amp or half
        self._batch_size = batch_size
        self.overlap = 0.2 if overlap is None else overlap
        bands = count_bands(unwrap(self.model))
        self._prepare = Preparer(self.cfg, bands, keep_image, slice_size, self.overlap, max_pixels)

    def __call__(self, sources: Source | Iterable[Source], recursive: bool = False) -> Iterator[Prediction]:
        """Predict on files, folders, globs, lists of paths, videos and addresses; or on arrays.

        Args:
            sources: One of them or several, such as a list: then a path that does not exist gives a prediction with
                an ``error`` in its place, and one that is given twice two predictions. Arrays are (height, width,
                bands) in BGR order, or grey with one band or none, as the config decodes files: uint8, else refused.
            recursive: Also in the folders within folders.

        Raises:
            ToolError: There are no inputs; files and arrays together; a single path that does not exist.
        """
        is_one = isinstance(sources, str | bytes | os.PathLike | np.ndarray) or not isinstance(sources, Iterable)
        several: list[Any] = [sources] if is_one else list(sources)  # type: ignore[arg-type]
        for source in several:
            if not isinstance(source, str | os.PathLike | np.ndarray):
                raise ToolError(
                    f'{first_line(repr(source), 60)} is a {type(source).__name__}: give paths as str or Path, or '
                    "images as NumPy's arrays"
                )
        arrays = [source for source in several if isinstance(source, np.ndarray)]
        if not arrays:
            paths = several[0] if is_one else several
            return self.predict_items(list_items(paths, recursive=recursive, keep_all=True))
        if len(arrays) < len(several):
            raise ToolError('files and arrays in one call: predict on them in two')
        items = [Item('', f'array_{index:06d}.png', index, 'an array') for index in range(len(arrays))]
        # Nothing is to be read: no process of its own.
        return self._predict(prepared for sample in map(Sample, items, arrays) for prepared in self._prepare(sample))

    def predict_items(self, items: Sequence[Item]) -> Iterator[Prediction]:
        """Predict on listed inputs, in order; a video gives a prediction for each frame."""
        return self._predict(self._read_ahead(items))

    def _read_ahead(self, items: Sequence[Item]) -> Generator[Prepared, None, None]:
        samples = [Sample(item) for item in items]
        for sample, result in read_ahead(self._prepare, samples, ahead=2 * self._batch_size):
            yield Prepared(replace(sample, error=result.reason)) if isinstance(result, WorkerDied) else result

    def _predict(self, images: Generator[Prepared, None, None]) -> Iterator[Prediction]:
        """Run the network on all images and tiles, and put tiles together."""
        pieces: list[tuple[Tile, Result]] = []
        with contextlib.closing(images):
            # From two batches, equal sizes are taken together.
            while True:
                # MMEngine's registries are those of the model that was loaded last.
                with DefaultScope.overwrite_default_scope(self.cfg.default_scope):
                    window = list(islice(images, 2 * self._batch_size if self._batch_size > 1 else 1))
                    results = self._predict_all(window)
                if not window:
                    break
                for prepared, result in zip(window, results, strict=True):
                    if prepared.tile is not None:
                        pieces.append((prepared.tile, result))
                        if not prepared.tile.is_last:
                            continue
                        result = self._merge(pieces, prepared.size)
                    pieces = []
                    yield self._prediction(prepared, result)

    def _predict_all(self, window: list[Prepared]) -> list[Result]:
        """Run the network on a few images, those of equal size together, and keep their order."""
        results: list[Result] = [prepared.sample.error or {} for prepared in window]
        groups: dict[tuple, list[int]] = {}
        for place, prepared in enumerate(window):
            if prepared.data is not None:
                groups.setdefault(_shapes(prepared.data['inputs']), []).append(place)
        for places in groups.values():
            for start in range(0, len(places), self._batch_size):
                batch = places[start : start + self._batch_size]
                for place, result in zip(batch, self._run([window[place] for place in batch]), strict=True):
                    results[place] = result
        return results

    def _run(self, batch: list[Prepared]) -> list[Result]:
        """Run the network on a batch and, if it fails, on each image alone: only that with the fault is an error."""
        try:
            return list(self._network(batch))
        except ToolError:
            raise
        except Exception as error:
            if len(batch) == 1:
                return [self._explain(error, batch[0].size)]
            reason = self._explain(error, batch[0].size)
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
        print_log(f'a batch of {len(batch)} is predicted one by one: {reason}', 'current', logging.WARNING)
        return [result for prepared in batch for result in self._run([prepared])]

    def _explain(self, error: Exception, size: tuple[int, int]) -> str:
        full = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not full:
            return one_line(error)
        tiles = '' if self.task == 'classification' else ', or tiles (--slice 640)'
        return f'out of memory at {size[1]} x {size[0]} pixels: use a smaller --batch-size{tiles}'

    def _network(self, batch: list[Prepared]) -> Iterator[dict[str, Any]]:
        precision: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self._low_precision:
            kind = torch.bfloat16 if self.device.type == 'cpu' else torch.float16
            precision = torch.autocast(self.device.type, dtype=kind)
        with torch.no_grad(), precision:
            outputs = self.model.test_step(pseudo_collate([prepared.data for prepared in batch]))
        describe = getattr(self, f'_describe_{self.task}')
        return map(describe, outputs)

    def _describe_detection(self, output: Any) -> dict[str, Any]:
        found = _part(output, 'pred_instances')
        keep = found.scores >= self.score_thr
        if self._chosen is not None:
            keep &= torch.isin(found.labels, torch.tensor(self._chosen, device=found.labels.device))
        found = found[keep]
        return dict(
            boxes=found.bboxes.float().cpu().numpy(),
            scores=found.scores.float().cpu().numpy(),
            labels=found.labels.long().cpu().numpy(),
            masks=encode_masks(found.masks) if 'masks' in found else None,
        )

    def _describe_segmentation(self, output: Any) -> dict[str, Any]:
        labels: torch.Tensor = _part(output, 'pred_sem_seg').data.squeeze(0)
        wide = len(self.classes) > IGNORED
        if self._chosen is not None:
            chosen = torch.isin(labels, torch.tensor(self._chosen, device=labels.device))
            labels = labels.where(chosen, torch.tensor(2**16 - 1 if wide else IGNORED, device=labels.device))
        return dict(label_map=labels.cpu().numpy().astype(np.uint16 if wide else np.uint8))

    def _describe_classification(self, output: Any) -> dict[str, Any]:
        scores = _part(output, 'pred_score').float().cpu().numpy().copy()
        if self._chosen is not None:
            scores[np.isin(np.arange(len(scores)), self._chosen, invert=True)] = 0
        return dict(scores=scores)

    def _merge(self, pieces: list[tuple[Tile, Result]], size: tuple[int, int]) -> Result:
        error = next((result for _, result in pieces if isinstance(result, str)), None)
        if error is not None:
            return error
        merge = merge_detections if self.task == 'detection' else merge_label_maps
        return merge([(tile, result) for tile, result in pieces if isinstance(result, dict)], size)

    def _prediction(self, prepared: Prepared, result: Result) -> Prediction:
        sample = prepared.sample
        prediction = Prediction(sample.item, sample.frame, last=sample.last, fps=sample.fps, task=self.task)
        if isinstance(result, str):
            return replace(prediction, error=result)
        return replace(prediction, image=sample.image, size=prepared.size, **result)

    def _find_chosen(self, classes: str | Sequence[str] | None) -> list[int] | None:
        if classes is None:
            return None
        names = [classes] if isinstance(classes, str) else list(classes)
        if not names:
            raise ArgumentError('classes', names, 'keeps nothing: name those to keep, or drop it')
        for name in names:
            if name not in self.classes:
                hint = did_you_mean(str(name), self.classes)
                reason = f'the model knows no {name!r}{hint}; it knows {some_of(self.classes, 100)}'
                raise ArgumentError('classes', names, reason)
        return [number for number, name in enumerate(self.classes) if name in names]


def _part(output: Any, name: str) -> Any:
    if name not in output:
        raise ToolError(f'the model returns no {name}, only {some_of(output.keys())}: it is of another task')
    return output.get(name)


def _shapes(inputs: Any) -> tuple:
    """Of an image, or of each of its views, as the network gets them."""
    return tuple(_shapes(view) for view in inputs) if isinstance(inputs, list | tuple) else tuple(inputs.shape)
