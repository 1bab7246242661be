"""Annotations beside predictions: how good each image is, by other ways of counting, and which are shown first."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from vheat_mm.apis.inference.types import Item, Prediction
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()
pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('skimage')
pytest.importorskip('supervision')
mask_api = pytest.importorskip('pycocotools.mask')
intersect_and_union = pytest.importorskip('mmseg.evaluation').IoUMetric.intersect_and_union

from vheat_mm.apis.heat.annotations import Annotated, Truth  # noqa: E402
from vheat_mm.apis.heat.comparison import (  # noqa: E402
    compare,
    comparison_figure,
    detection_quality,
    segmentation_quality,
)

REPO = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures('own_scope')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    script = REPO / 'demo' / 'make_demo_data.py'
    spec = importlib.util.spec_from_file_location('make_demo_data_here', script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    root = tmp_path_factory.mktemp('comparison') / 'data'
    module.make_demo_data(root, num_train=1, num_val=3, size=96)
    return root


def config(name, data, monkeypatch):
    from mmengine.registry import init_default_scope

    monkeypatch.setenv('VHEAT_DEMO_DATA', str(data))
    cfg = Config.fromfile(REPO / 'configs' / 'demo' / name)
    init_default_scope(cfg.default_scope)
    return cfg


def found(boxes, labels=None, masks=None, **fields):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes), int) if labels is None else np.asarray(labels)
    fields = dict(boxes=boxes, labels=labels, masks=masks, task='detection', **fields)
    return Prediction(Item('a.jpg', 'a.jpg', 0, 'a.jpg'), scores=np.ones(len(boxes), np.float32), **fields)


def truth_of(boxes, labels=None, **fields):
    prediction = found(boxes, labels)
    return Truth('a.jpg', prediction.boxes, prediction.labels, **fields)


def box_iou(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    return shared / (sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - shared)


# --- how good a prediction is


@pytest.mark.parametrize('seed', range(6))
def test_detection_is_the_best_of_all_pairings(seed):
    rng = np.random.default_rng(seed)
    corners, labels = rng.integers(0, 40, (2, 4, 2)), rng.integers(0, 2, (2, 4))
    theirs, ours = (np.concatenate([c, c + rng.integers(10, 40, (4, 2))], 1) for c in corners)
    ours, our_labels = ours[: seed % 5], labels[1][: seed % 5]
    totals = []
    for order in itertools.permutations(range(4), len(ours)):
        ious = [box_iou(ours[i], theirs[j]) if our_labels[i] == labels[0][j] else 0 for i, j in enumerate(order)]
        pairs = sum(iou > 0 for iou in ious)
        totals.append((sum(ious), sum(ious) / (pairs + (4 - pairs) + (len(ours) - pairs))))
    assert detection_quality(truth_of(theirs, labels[0]), found(ours, our_labels)) == pytest.approx(max(totals)[1])


def test_detection_by_masks_and_with_crowds():
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10]]
    assert detection_quality(truth_of([]), found([])) == 1
    assert detection_quality(truth_of(boxes), found([])) == detection_quality(truth_of([]), found(boxes)) == 0

    def encode(columns):
        mask = np.zeros((10, 40), np.uint8, order='F')
        mask[:, columns] = 1
        return mask_api.encode(mask)

    halves = found(boxes, masks=[encode(slice(0, 5)), encode(slice(20, 25))])
    whole = truth_of(boxes, masks=[encode(slice(0, 10)), encode(slice(20, 30))])
    assert detection_quality(whole, halves) == 0.5
    assert detection_quality(truth_of(boxes), halves) == 1  # masks of one side: boxes are compared
    crowd = truth_of(boxes[:1], crowds=(encode(slice(18, 35)),))
    assert detection_quality(crowd, found(boxes)) == 1
    assert detection_quality(truth_of(boxes[:1]), found(boxes)) == 0.5
    assert detection_quality(crowd, found([*boxes, [34, 0, 40, 10]])) == 0.5  # mostly outside


def test_segmentation_equals_mmsegs_counts():
    rng = np.random.default_rng(0)
    theirs, ours = rng.integers(0, 4, (2, 30, 40))
    theirs[:5] = 255
    theirs[theirs == 3] = 0  # only predicted
    shared, union, _, _ = intersect_and_union(torch.from_numpy(ours), torch.from_numpy(theirs), 6, 255)
    expected = (shared / union)[union > 0].mean().item()
    prediction = Prediction(Item('', '', 0, ''), label_map=ours.astype(np.uint8))
    assert segmentation_quality(Truth('', label_map=theirs), prediction) == pytest.approx(expected)
    with pytest.raises(ToolError, match=r'the label map measures \(20, 30\), the image \(40, 30\)'):
        segmentation_quality(Truth('', label_map=theirs[:, :20]), prediction)


# --- annotations and predictions of data sets


def read(cfg, task):
    annotated = Annotated(cfg, task)
    return [annotated.truth(index) for index in range(len(annotated.items))], annotated.items


def test_annotations_are_those_of_the_files(data, monkeypatch):
    content = json.loads((data / 'coco/annotations/instances_val.json').read_text())
    truths, _ = read(config('mask-rcnn_vheat-demo_coins.py', data, monkeypatch), 'detection')
    assert [truth.name for truth in truths] == [image['file_name'] for image in content['images']]
    for truth, image in zip(truths, content['images'], strict=True):
        own = [a for a in content['annotations'] if a['image_id'] == image['id']]
        assert [mask_api.area(mask) for mask in truth.masks] == [a['area'] for a in own]
        np.testing.assert_allclose(truth.boxes[:, 2:] - truth.boxes[:, :2], [a['bbox'][2:] for a in own])

    truths, items = read(config('vheat-demo_upernet_coins.py', data, monkeypatch), 'segmentation')
    for truth, item in zip(truths, items, strict=True):
        labels = np.array(Image.open(data / 'ade/annotations/validation' / f'{Path(item.path).stem}.png'))
        np.testing.assert_array_equal(truth.label_map, labels - np.uint8(1))  # 0, unlabelled, becomes 255

    truths, _ = read(config('vheat-demo_textures.py', data, monkeypatch), 'classification')
    assert [(truth.label, truth.name.split('/')[0]) for truth in truths] == [(0, 'brick'), (1, 'grass'), (2, 'gravel')]


def test_worst_images_of_a_data_set_come_first(data, monkeypatch, caplog):
    """A classifier that is sure, less sure and wrong; a fourth image cannot be read."""
    cfg = config('vheat-demo_textures.py', data, monkeypatch)
    broken = data / 'textures/val/brick/zzz.jpg'
    broken.write_bytes(b'')
    scores = dict(brick=[1, 0, 0], grass=[0.1, 0.6, 0.3], gravel=[0.9, 0, 0.1])

    def predict(items):
        for item in items:
            error = 'empty' if item.path == str(broken) else None
            image = np.array(Image.open(item.path)) if error is None else None
            label = np.array(scores[item.name.split('/')[0]], np.float32)
            fields = dict(image=image, size=(96, 96), scores=label, task='classification')
            yield Prediction(item, error=error, **fields)

    try:
        predictor = SimpleNamespace(cfg=cfg, task='classification', predict_items=predict)
        worst, qualities = compare(predictor, 2)
    finally:
        broken.unlink()
    assert qualities == pytest.approx([1, 0.6, 0.1])
    assert [pair.truth.name for pair in worst] == ['gravel/val_00002.jpg', 'grass/val_00001.jpg']
    figure = comparison_figure(worst, 3, cfg.classes, cfg.metainfo.palette)
    titles = [axis.get_title(side) for part in figure.subfigs for axis in part.axes for side in ('left', 'right')]
    assert [title for title in titles if title] == [
        '1. gravel/val_00002.jpg', 'probability 0.10', '2. grass/val_00001.jpg', 'probability 0.60',
    ]  # fmt: skip
