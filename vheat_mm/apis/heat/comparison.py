"""Annotations beside predictions, worst images first.

How good the prediction of an image is, from 0 to 1:

- detection: the sum of the IoU of pairs of an annotation and a detection, over the number of pairs, missed
  annotations and false detections. The pairs are those with the largest sum; both are of one class and overlap. The
  IoU is that of the masks where both have them, else of the boxes. Regions marked ``iscrowd`` count neither way.
- segmentation: the mean IoU of the classes that the annotation or the prediction has, without unlabelled pixels.
- classification: the probability of the true class.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import Compose
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from vheat_mm.apis.inference.painting import paint
from vheat_mm.apis.inference.predictor import Predictor
from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.utils.config_place import describe_building, type_name
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.text import some_of

UNLABELLED = 255
IN_CROWD = 0.5  # share of a detection within a region of many objects, from which it is neither right nor wrong


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


@dataclass(frozen=True)
class Compared:
    """A prediction, what it should be, and how good it is (0 to 1, see the module)."""

    truth: Truth
    prediction: Prediction
    quality: float


# ---- how good a prediction is ----


def detection_quality(truth: Truth, prediction: Prediction) -> float:
    """See the module; 1 where there is nothing to find and nothing is found."""
    from pycocotools import mask as coco_mask
    from scipy.optimize import linear_sum_assignment

    assert truth.boxes is not None
    assert truth.labels is not None
    assert prediction.boxes is not None
    assert prediction.labels is not None
    by_mask = truth.masks is not None and prediction.masks is not None
    theirs = truth.masks if by_mask else _to_xywh(truth.boxes)
    ours = prediction.masks if by_mask else _to_xywh(prediction.boxes)
    shape = len(prediction.boxes), len(truth.boxes)
    iou = np.asarray(coco_mask.iou(ours, theirs, [0] * shape[1])).reshape(shape)
    iou = iou * (prediction.labels[:, None] == truth.labels[None])
    rows, columns = linear_sum_assignment(-iou)
    paired = iou[rows, columns] > 0
    total = iou[rows, columns][paired].sum()
    single = set(range(shape[0])) - set(rows[paired].tolist())
    if truth.crowds and single:
        size = truth.crowds[0]['size']
        shapes = prediction.masks or coco_mask.frPyObjects(_to_xywh(prediction.boxes), *size)
        within = np.asarray(coco_mask.iou(shapes, list(truth.crowds), [1] * len(truth.crowds))).max(1)
        single = {index for index in single if within[index] < IN_CROWD}
    count = int(paired.sum()) + (shape[1] - int(paired.sum())) + len(single)
    return float(total) / count if count else 1.0


def segmentation_quality(truth: Truth, prediction: Prediction) -> float:
    """See the module; 1 where no pixel is labelled."""
    assert truth.label_map is not None
    assert prediction.label_map is not None
    if truth.label_map.shape != prediction.label_map.shape:
        sizes = f'{truth.label_map.shape[::-1]}, the image {prediction.label_map.shape[::-1]}'
        raise ToolError(f'{truth.name}: the label map measures {sizes}')
    known = truth.label_map != UNLABELLED
    theirs, ours = truth.label_map[known].astype(int), prediction.label_map[known].astype(int)
    classes = np.union1d(theirs, ours)
    ious = [((theirs == c) & (ours == c)).sum() / ((theirs == c) | (ours == c)).sum() for c in classes]
    return float(np.mean(ious)) if ious else 1.0


def classification_quality(truth: Truth, prediction: Prediction) -> float:
    """See the module."""
    assert truth.label is not None
    assert prediction.scores is not None
    return float(prediction.scores[truth.label])


QUALITIES: dict[str, tuple[Callable[[Truth, Prediction], float], str]] = {
    'detection': (detection_quality, 'IoU'),
    'segmentation': (segmentation_quality, 'mIoU'),
    'classification': (classification_quality, 'probability'),
}


def _to_xywh(boxes: np.ndarray) -> np.ndarray:
    """Corners x1, y1, x2, y2 (N, 4) -> x1, y1, width, height as pycocotools takes them."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)


# ---- predictions with annotations ----


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_dataset` and :func:`compare_files` return.

    Attributes:
        task: 'detection', 'segmentation' or 'classification'.
        worst: Images of lowest quality, the worst first.
        qualities: Of all images that could be read, in their order.
    """

    task: str
    worst: list[Compared]
    qualities: list[float]


def compare_dataset(predictor: Predictor, number: int) -> Comparison:
    """Predict on the data set that the config tests, and keep the worst ``number`` images.

    Raises:
        ToolError: The data set cannot be built or has no annotations; no image can be read.
    """
    truths = list(read_dataset(predictor.cfg, predictor.task))
    items = [Item(truth.path, truth.name, index, truth.path) for index, truth in enumerate(truths)]
    return _compare(predictor.task, zip(truths, predictor.predict_items(items), strict=True), number)


def _compare(task: str, pairs: Iterable[tuple[Truth, Prediction]], number: int) -> Comparison:
    measure = QUALITIES[task][0]
    worst: list[Compared] = []
    qualities: list[float] = []
    for truth, prediction in pairs:
        if prediction.error is not None:
            print_log(f'{truth.path} is left out: {prediction.error}', 'current', logging.WARNING)
            continue
        qualities.append(measure(truth, prediction))
        worst = sorted([*worst, Compared(truth, prediction, qualities[-1])], key=lambda it: it.quality)[:number]
    if not qualities:
        raise ToolError('none of the images can be read')
    return Comparison(task, worst, qualities)


def compare_files(
    predictions: str | Path, ann_file: str | Path, image_dir: str | Path, number: int, score_thr: float
) -> tuple[Comparison, list[str]]:
    """Compare detections of ``tools/predict.py --ann-file``, or of a COCO results file, and keep the worst images.

    Returns:
        The comparison, and the names of the classes.

    Raises:
        ToolError: A file is no COCO file; predictions are of images or categories that ``ann_file`` does not have.
    """
    import cv2

    dataset, found = _read_json(ann_file), _read_json(predictions)
    results = found if isinstance(found, list) else found.get('annotations')
    if not isinstance(dataset, dict) or not {'images', 'annotations', 'categories'} <= dataset.keys():
        raise ToolError(f'{str(ann_file)!r} holds no COCO annotations (images, annotations, categories)')
    if not isinstance(results, list) or not all('score' in result for result in results):
        raise ToolError(f'{str(predictions)!r} holds no COCO detections with scores')
    classes = [category['name'] for category in dataset['categories']]
    labels = {category['id']: index for index, category in enumerate(dataset['categories'])}
    images = {image['id']: image for image in dataset['images']}
    for field, known in (('image_id', images), ('category_id', labels)):
        if strange := sorted({str(result[field]) for result in results if result[field] not in known}):
            raise ToolError(
                f'{str(predictions)!r}: {field} {some_of(strange, 5)} is not in {str(ann_file)!r}: make it by '
                'tools/predict.py with this --ann-file'
            )
    results = [result for result in results if result['score'] >= score_thr]
    annotations: dict[Any, list[dict]] = {key: [] for key in images}
    detections: dict[Any, list[dict]] = {key: [] for key in images}
    for group, entries in ((annotations, dataset['annotations']), (detections, results)):
        for entry in entries:
            group[entry['image_id']].append(entry)

    def pairs() -> Iterator[tuple[Truth, Prediction]]:
        for index, (key, image) in enumerate(images.items()):
            path, name, size = (
                str(Path(image_dir, image['file_name'])),
                image['file_name'],
                (image['height'], image['width']),
            )
            truth, found = (
                _detection_truth(path, name, _from_coco(group[key], labels), size)
                for group in (annotations, detections)
            )
            pixels = cv2.imread(path)
            yield (
                truth,
                Prediction(
                    Item(path, name, index, path),
                    error='it cannot be read' if pixels is None else None,
                    image=pixels,
                    size=size,
                    task='detection',
                    boxes=found.boxes,
                    scores=np.array([entry['score'] for entry in detections[key]], np.float32),
                    labels=found.labels,
                    masks=found.masks,
                ),
            )

    return _compare('detection', pairs(), number), classes


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as error:
        raise ToolError(f'{str(path)!r} is no JSON: {error}') from error


def _from_coco(entries: list[dict], labels: dict[Any, int]) -> list[dict]:
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


def _detection_truth(path: str, name: str, objects: list[dict], size: tuple[int, int]) -> Truth:
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


def read_dataset(cfg: Any, task: str) -> Iterator[Truth]:
    """The annotations of the data set that a config tests.

    Raises:
        ToolError: It cannot be built, or has none.
    """
    described = cfg.test_dataloader.dataset
    steps = [step for step in described.get('pipeline') or [] if 'Annotations' in type_name(step)]
    try:
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
            yield _detection_truth(path, name, info['instances'], (info['height'], info['width']))
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


# ---- the figure ----


def comparison_figure(
    comparison: Comparison, classes: Sequence[str], palette: Sequence[tuple[int, int, int]], columns: int = 2
) -> Any:
    """Pairs of annotation (left) and prediction (right), ``columns`` beside each other, as a matplotlib figure."""
    from matplotlib.figure import Figure

    what, pairs = QUALITIES[comparison.task][1], comparison.worst
    rows = -(-len(pairs) // columns)
    shapes = [pair.prediction.size for pair in pairs]
    height = 6.4 / columns * max(height / width for height, width in shapes) + 0.35
    figure = Figure(figsize=(12.8, rows * height + 0.4), layout='constrained')
    figure.suptitle(
        f'Annotation (left) and prediction (right), worst {len(pairs)} of {len(comparison.qualities)} images'
    )
    cells = figure.subfigures(rows, columns, squeeze=False, wspace=0.02).flat
    for number, (pair, cell) in enumerate(zip(pairs, cells, strict=False), 1):
        left, right = cell.subplots(1, 2)
        left.imshow(_painted_truth(pair, classes, palette)[..., ::-1])
        right.imshow(paint(pair.prediction, classes, palette)[..., ::-1])
        left.set_title(f'{number}. {pair.truth.name}', loc='left', fontsize=11)
        right.set_title(f'{what} {pair.quality:.2f}', loc='right', fontsize=11)
        left.axis('off')
        right.axis('off')
    return figure


def _painted_truth(pair: Compared, classes: Sequence[str], palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    truth = pair.truth
    scores = None if truth.boxes is None else np.ones(len(truth.boxes), np.float32)
    if truth.label is not None:
        classes, palette, scores = [classes[truth.label]], [palette[truth.label]], np.ones(1, np.float32)
    fields: dict[str, Any] = {key: getattr(truth, key) for key in ('boxes', 'labels', 'masks', 'label_map')}
    return paint(replace(pair.prediction, scores=scores, **fields), classes, palette, show_scores=False)
