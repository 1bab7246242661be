"""Predictor: the libraries' numbers, one error for each broken input, tiles, flat memory."""

from __future__ import annotations

import functools

import cv2
import numpy as np
import pytest
import torch
from trained_models import CLASSIFIER, DETECTOR, SEGMENTOR, write

from vheat_mm.apis.inference import Item, Predictor, Sample
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()
pytest.importorskip('mmdet.apis')
pytest.importorskip('mmseg.apis')
pytest.importorskip('mmpretrain')
pytestmark = pytest.mark.usefixtures('own_scope')
RNG = np.random.default_rng(0)


def read_plainly(item, max_pixels=None):
    """What reading does with a sound image file: leave it to the pipeline."""
    yield Sample(item)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """``models('detector')``: its config and checkpoint, written once."""

    @functools.cache
    def get(name: str) -> tuple[str, str]:
        torch.manual_seed(0)
        recipe = dict(detector=DETECTOR, segmentor=SEGMENTOR, classifier=CLASSIFIER)[name]
        sizes = dict(
            detector="test_pipeline = _base_.test_pipeline\ntest_pipeline[1]['scale'] = (96, 64)",
            segmentor="test_pipeline = _base_.test_pipeline\ntest_pipeline[1]['scale'] = (128, 64)",
            classifier='',
        )[name]
        sizes += '\ntest_dataloader = dict(dataset=dict(pipeline=test_pipeline))' if sizes else ''
        return write(tmp_path_factory.mktemp(name), *recipe, sizes)

    return get


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> list[Item]:
    """Photograph-like noise in two sizes: 64 x 48, 64 x 48, 40 x 56, 64 x 48."""
    folder = tmp_path_factory.mktemp('images')
    items = []
    for index, size in enumerate([(48, 64), (48, 64), (56, 40), (48, 64)]):
        small = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = str(folder / f'{index}.png')
        cv2.imwrite(path, cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC))
        items.append(Item(path, f'{index}.png', index, path))
    return items


@pytest.fixture(autouse=True)
def _plain_reading(monkeypatch):
    monkeypatch.setattr('vheat_mm.apis.inference.predictor.read', read_plainly)


def masks_of(prediction) -> np.ndarray:
    from pycocotools import mask

    return np.stack([mask.decode(rle) for rle in prediction.masks])


@pytest.mark.parametrize('batch_size', [1, 3])
def test_detector(models, images, batch_size):
    """The numbers of mmdet's own interface, also in batches: of equal sizes, in the order of the inputs."""
    from mmdet.apis import inference_detector, init_detector

    model = init_detector(*models('detector'), device='cpu')
    predictor = Predictor(*models('detector'), device='cpu', batch_size=batch_size, score_thr=0.0)
    assert (predictor.task, predictor.classes, predictor.palette) == (
        'detection',
        ('a', 'b'),
        [(250, 0, 0), (0, 0, 250)],
    )
    found = list(predictor.predict_items(images))
    assert [prediction.item for prediction in found] == images
    tolerance = 0 if batch_size == 1 else 1e-3
    for prediction in found:
        expected = inference_detector(model, prediction.item.path).pred_instances
        assert len(expected) > 5
        np.testing.assert_allclose(prediction.boxes, expected.bboxes.numpy(), atol=tolerance)
        np.testing.assert_allclose(prediction.scores, expected.scores.numpy(), atol=tolerance)
        assert (masks_of(prediction) == expected.masks.numpy()).mean() >= 1 - tolerance
        pixels = cv2.imread(prediction.item.path)
        assert prediction.size == pixels.shape[:2]
        assert (prediction.image == pixels).all()


@pytest.mark.parametrize('batch_size', [1, 3])
def test_segmentor(models, images, batch_size):
    from mmseg.apis import inference_model, init_model

    model = init_model(*models('segmentor'), device='cpu')
    predictor = Predictor(*models('segmentor'), device='cpu', batch_size=batch_size)
    seen = set()
    for prediction in predictor.predict_items(images):
        expected = inference_model(model, prediction.item.path).pred_sem_seg.data[0].numpy()
        seen |= set(expected.flat)
        assert prediction.label_map.dtype == np.uint8
        assert prediction.label_map.shape == prediction.size
        assert (prediction.label_map == expected).mean() >= (1 if batch_size == 1 else 0.999)
    assert len(seen) == 2


def test_classifier(models, images):
    from mmpretrain import ImageClassificationInferencer, get_model

    config, checkpoint = models('classifier')
    oracle = ImageClassificationInferencer(get_model(config, pretrained=checkpoint, device='cpu'))
    predictor = Predictor(config, checkpoint, device='cpu', batch_size=2)
    for prediction in predictor.predict_items(images):
        np.testing.assert_allclose(prediction.scores, oracle(prediction.item.path)[0]['pred_scores'], atol=1e-6)
