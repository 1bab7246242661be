"""Annotations beside predictions, worst images first.

How good the prediction of an image is, from 0 to 1:

- detection: the sum of the IoU of pairs of an annotation and a detection, over the number of pairs, missed
  annotations and false detections. The pairs are those with the largest sum; both are of one class and overlap. The
  IoU is that of the masks where both have them, else of the boxes. Regions marked ``iscrowd`` count neither way.
- segmentation: the mean IoU of the classes that the annotation or the prediction has, without unlabelled pixels.
- classification: the probability of the true class.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.logging import print_log

from vheat_mm.apis.config import add_config_arguments
from vheat_mm.apis.heat.annotations import Truth, detection_truth, from_coco, read_dataset
from vheat_mm.apis.heat.figures import WIDTH, check_out, new_figure, save_figure
from vheat_mm.apis.inference.model import DEFAULT_SCORE_THR, distinct_colours
from vheat_mm.apis.inference.painting import paint
from vheat_mm.apis.inference.predictor import Predictor
from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.text import some_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNLABELLED = 255
IN_CROWD = 0.5  # share of a detection within a region of many objects, from which it is neither right nor wrong


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
) -> tuple[Comparison, tuple[str, ...]]:
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
                detection_truth(path, name, from_coco(group[key], labels), size) for group in (annotations, detections)
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

    return _compare('detection', pairs(), number), tuple(classes)


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as error:
        raise ToolError(f'{str(path)!r} is no JSON: {error}') from error


# ---- the figure and its command ----


def comparison_figure(
    comparison: Comparison, classes: Sequence[str], palette: Sequence[tuple[int, int, int]], columns: int = 2
) -> Figure:
    """Pairs of annotation (left) and prediction (right), ``columns`` of them beside each other."""
    what, pairs = QUALITIES[comparison.task][1], comparison.worst
    rows = -(-len(pairs) // columns)
    shapes = [pair.prediction.size for pair in pairs]
    height = WIDTH / 2 / columns * max(height / width for height, width in shapes) + 0.35
    figure = new_figure(rows * height + 0.4)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the kind ``predictions``."""
    add_config_arguments(parser)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help="checkpoint: file, address, published name, or 'released'. Without one, CONFIG is a predictions.json of "
        'tools/predict.py or a COCO results file',
    )
    parser.add_argument('--ann-file', metavar='FILE', help='COCO annotations for a predictions.json')
    parser.add_argument('--image-dir', metavar='DIR', help='folder of its images')
    parser.add_argument('--number', type=int, default=6, metavar='N', help='how many images to show (6)')
    parser.add_argument(
        '--score-thr', type=float, metavar='X', help="detections from this score on (the config's, or 0.3)"
    )
    parser.add_argument('--device', help='such as cpu or cuda:1')


def run(args: argparse.Namespace) -> None:
    """Draw the kind ``predictions``."""
    check_out(args.out)
    if args.number < 1:
        raise ToolError(f'--number {args.number}: give 1 or more')
    files = args.ann_file, args.image_dir
    if args.checkpoint is not None:
        if any(files):
            raise ToolError('--ann-file and --image-dir belong to a predictions.json without CHECKPOINT: drop them')
        predictor = Predictor(
            args.config, args.checkpoint, device=args.device, score_thr=args.score_thr, cfg_options=args.cfg_options
        )
        comparison = compare_dataset(predictor, args.number)
        classes, palette = predictor.classes, predictor.palette
    else:
        if not all(files) or args.device or args.cfg_options:
            raise ToolError('give CONFIG CHECKPOINT, or a predictions.json with --ann-file and --image-dir alone')
        threshold = DEFAULT_SCORE_THR if args.score_thr is None else args.score_thr
        comparison, classes = compare_files(args.config, *files, args.number, threshold)
        palette = distinct_colours(len(classes))
    what, mean = QUALITIES[comparison.task][1], np.mean(comparison.qualities)
    print(f'{len(comparison.qualities)} images, mean {what} {mean:.3f}; the worst:')
    for pair in comparison.worst:
        print(f'  {pair.quality:.3f}  {pair.truth.path}')
    save_figure(comparison_figure(comparison, classes, palette), args.out)
