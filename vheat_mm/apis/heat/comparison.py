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
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.logging import print_log

from vheat_mm.apis.config import add_config_arguments
from vheat_mm.apis.heat.annotations import Annotated, Truth
from vheat_mm.apis.heat.figures import WIDTH, new_figure, save_figure
from vheat_mm.apis.inference.painting import paint
from vheat_mm.apis.inference.predictor import Predictor
from vheat_mm.apis.inference.types import Prediction
from vheat_mm.utils.errors import ToolError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 100  # number of images in a figure
UNLABELLED = 255
IN_CROWD = 0.5  # share of a detection within a region of many objects, from which it is neither right nor wrong


@dataclass(frozen=True)
class Compared:
    """A prediction, what it should be, and how good it is (0 to 1, see the module)."""

    truth: Truth
    prediction: Prediction
    quality: float


# ---- how good a prediction is ----


def detection_quality(truth: Truth, prediction: Any) -> float:
    """See the module; 1 where there is nothing to find and nothing is found."""
    from pycocotools import mask as coco_mask
    from scipy.optimize import linear_sum_assignment

    assert truth.boxes is not None
    by_mask = truth.masks is not None and prediction.masks is not None
    theirs = truth.masks if by_mask else _to_xywh(truth.boxes)
    ours = prediction.masks if by_mask else _to_xywh(prediction.boxes)
    shape = len(prediction.boxes), len(truth.boxes)
    iou = np.asarray(coco_mask.iou(ours, theirs, [0] * shape[1])).reshape(shape)
    iou = iou * (prediction.labels[:, None] == np.asarray(truth.labels))
    rows, columns = linear_sum_assignment(iou, maximize=True)
    single = set(range(shape[0])) - set(rows[iou[rows, columns] > 0].tolist())
    if truth.crowds and single:
        shapes = prediction.masks or coco_mask.frPyObjects(_to_xywh(prediction.boxes), *truth.crowds[0]['size'])
        within = np.asarray(coco_mask.iou(shapes, list(truth.crowds), [1] * len(truth.crowds))).max(1)
        single = {index for index in single if within[index] < IN_CROWD}
    count = shape[1] + len(single)
    return float(iou[rows, columns].sum()) / count if count else 1.0


def segmentation_quality(truth: Truth, prediction: Any) -> float:
    """See the module; 1 where no pixel is labelled."""
    assert truth.label_map is not None
    if truth.label_map.shape != prediction.label_map.shape:
        sizes = f'{truth.label_map.shape[::-1]}, the image {prediction.label_map.shape[::-1]}'
        raise ToolError(f'{truth.name}: the label map measures {sizes}')
    known = truth.label_map != UNLABELLED
    theirs, ours = truth.label_map[known], prediction.label_map[known]
    classes = np.union1d(theirs, ours)
    ious = [((theirs == c) & (ours == c)).sum() / ((theirs == c) | (ours == c)).sum() for c in classes]
    return float(np.mean(ious)) if ious else 1.0


QUALITIES: dict[str, tuple[Callable[[Truth, Any], float], str]] = {
    'detection': (detection_quality, 'IoU'),
    'segmentation': (segmentation_quality, 'mIoU'),
    'classification': (lambda truth, prediction: float(prediction.scores[truth.label]), 'probability'),
}


def _to_xywh(boxes: np.ndarray) -> np.ndarray:
    """Corners x1, y1, x2, y2 (N, 4) -> x1, y1, width, height as pycocotools takes them."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)


def compare(predictor: Predictor, number: int) -> tuple[list[Compared], list[float]]:
    """Predict on the data set that the config tests.

    Returns:
        The ``number`` images of lowest quality, the worst first; and the qualities of all that could be read.

    Raises:
        ToolError: The data set cannot be built or has no annotations; no image can be read.
    """
    data = Annotated(predictor.cfg, predictor.task)
    measure = QUALITIES[predictor.task][0]
    worst: list[Compared] = []
    qualities: list[float] = []
    for prediction in predictor.predict_items(data.items):
        if prediction.error is not None:
            print_log(f'{prediction.item.path} is left out: {prediction.error}', 'current', logging.WARNING)
            continue
        truth = data.truth(prediction.item.index)
        qualities.append(measure(truth, prediction))
        worst = sorted([*worst, Compared(truth, prediction, qualities[-1])], key=lambda it: it.quality)[:number]
    if not qualities:
        raise ToolError('none of the images can be read')
    return worst, qualities


# ---- the figure and its command ----


def comparison_figure(
    pairs: Sequence[Compared], of: int, classes: Sequence[str], palette: Sequence[tuple[int, int, int]]
) -> Figure:
    """Pairs of annotation (left) and prediction (right), the worst of ``of`` images; two of them in a row."""
    what = QUALITIES[pairs[0].prediction.task][1]
    rows = -(-len(pairs) // 2)
    shapes = [pair.prediction.size for pair in pairs]
    height = WIDTH / 4 * max(height / width for height, width in shapes) + 0.35
    figure = new_figure(rows * height + 0.4)
    figure.suptitle(f'Annotation (left) and prediction (right), worst {len(pairs)} of {of} images')
    cells = figure.subfigures(rows, 2, squeeze=False, wspace=0.02).flat
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
    parser.add_argument('checkpoint', help="checkpoint: file, address, published name, or 'released'")
    parser.add_argument('--number', type=int, default=6, metavar='N', help='how many images to show (6)')
    parser.add_argument(
        '--score-thr', type=float, metavar='X', help="detections from this score on (the config's, or 0.3)"
    )
    parser.add_argument('--device', help='such as cpu or cuda:1')


def run(args: argparse.Namespace) -> None:
    """Draw the kind ``predictions``."""
    if not 1 <= args.number <= LARGEST:
        raise ToolError(f'--number {args.number}: give 1 to {LARGEST}')
    predictor = Predictor(
        args.config, args.checkpoint, device=args.device, score_thr=args.score_thr, cfg_options=args.cfg_options
    )
    worst, qualities = compare(predictor, args.number)
    print(f'{len(qualities)} images, mean {QUALITIES[predictor.task][1]} {np.mean(qualities):.3f}; the worst:')
    for pair in worst:
        print(f'  {pair.quality:.3f}  {pair.prediction.item.path}')
    save_figure(comparison_figure(worst, len(qualities), predictor.classes, predictor.palette), args.out)
