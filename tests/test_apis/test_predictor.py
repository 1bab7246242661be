"""Predictor: the libraries' numbers, one error for each broken input, tiles, flat memory."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import DefaultScope
from trained_models import CLASSES, CLASSIFIER, DETECTOR, SEGMENTOR, write

from vheat_mm.apis.inference import Item, Prediction, Predictor, Sample
from vheat_mm.apis.inference.preparing import Preparer
from vheat_mm.apis.inference.read_ahead import WorkerDied, read_ahead
from vheat_mm.apis.inference.rle import encode_masks
from vheat_mm.apis.inference.slicing import merge_detections, merge_label_maps, tiles_of
from vheat_mm.engine import fileio
from vheat_mm.utils.errors import CheckpointError, ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()
pytest.importorskip('mmdet.apis')
pytest.importorskip('mmseg.apis')
pytest.importorskip('mmpretrain')
pytestmark = pytest.mark.usefixtures('own_scope')
RNG = np.random.default_rng(0)


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


def test_arrays_and_frames_give_what_files_give(models, images, monkeypatch):
    """They enter the pipeline behind its first step; a video's frames keep their numbers."""
    files = models('detector')
    predictor = Predictor(*files, device='cpu', score_thr=0.0, keep_image=False)
    arrays = [cv2.imread(item.path) for item in images]
    clip = Item('clip.mp4', 'clip.mp4', 0, 'clip.mp4', is_video=True)

    def read_clip(item, *_):
        for number, array in enumerate(arrays):
            yield Sample(item, array, number, last=number == 3, fps=25.0)

    with monkeypatch.context() as patch:
        patch.setattr('vheat_mm.apis.inference.preparing.read', read_clip)
        frames = list(predictor.predict_items([clip]))
    assert [(frame.frame, frame.last, frame.fps) for frame in frames] == [(n, n == 3, 25.0) for n in range(4)]
    for of_file, of_array, of_frame in zip(predictor.predict_items(images), predictor(arrays), frames, strict=True):
        assert of_array.image is None
        assert len(of_file.boxes) > 5
        assert (of_file.boxes == of_array.boxes).all()
        assert (of_file.boxes == of_frame.boxes).all()
    grey, one_band, *wrong = predictor(
        [arrays[0][..., 0], arrays[0][..., :1], arrays[0][..., :2], arrays[0] / np.float32(255), arrays[0][0, 0]]
    )
    assert grey.error is None
    assert (grey.boxes == one_band.boxes).all()
    assert [found.error for found in wrong] == [
        'an image of 2 bands, and the model takes 3',
        'an array of float32; the config decodes images to uint8, from 0 to 255',
        'an array of shape (3,), expected (height, width, bands)',
    ]


def test_a_list_gives_one_prediction_for_each_file(models, images):
    """Also for a path that is given twice or does not exist; alone, that is a mistyped one."""
    predictor = Predictor(*models('classifier'), device='cpu')
    paths = [images[0].path, 'nowhere.jpg', images[2].path, images[0].path]
    found = list(predictor(iter(paths)))
    assert [prediction.item.path for prediction in found] == paths
    assert [prediction.error for prediction in found] == [None, 'no such file or directory', None, None]
    assert found[0].item.name != found[3].item.name
    for sources, words in (('nowhere.jpg', "no 'nowhere.jpg'"), ([b'a.jpg'], 'is a bytes'), (7, 'is a int')):
        with pytest.raises(ToolError, match=words):
            predictor(sources)


def test_models_of_several_libraries_take_turns(models, images):
    """Each in the scope of its own library, which MMEngine has one of in a process."""
    predictors = [Predictor(*models(name), device='cpu') for name in ('detector', 'segmentor', 'classifier')]
    scopes = []
    for predictor in predictors:
        predictor.model.register_forward_pre_hook(lambda *_: scopes.append(DefaultScope.get_current_instance()))
    for found in zip(*(predictor(cv2.imread(images[0].path)) for predictor in predictors), strict=True):
        assert [prediction.error for prediction in found] == [None] * 3
    assert [scope.scope_name for scope in scopes] == ['mmdet', 'mmseg', 'mmpretrain']
    for predictor in predictors:  # as pictures of heat do
        [prepared] = Preparer(predictor.cfg, 3)(Sample(images[0], cv2.imread(images[0].path)))
        assert type(prepared.data['data_samples']).__module__.startswith(predictor.cfg.default_scope)


def test_a_broken_input_is_one_error(models, images, tmp_path):
    """In its place, with the others of its batch as they are without it."""
    text, hostile = tmp_path / 'text.jpg', tmp_path / 'hostile.png'
    text.write_text('no image')
    hostile.write_bytes(Path(images[0].path).read_bytes())
    items = [images[0], Item(str(text), 'text.jpg', 1, ''), Item(str(hostile), 'hostile.png', 2, ''), images[1]]
    items.append(Item(str(tmp_path / 'none.png'), 'none.png', 4, ''))
    predictor = Predictor(*models('detector'), device='cpu', batch_size=4, score_thr=0.0)
    expected = [next(predictor.predict_items([item])) for item in images[:2]]
    network = predictor.model.test_step

    def fail_for_hostile(data):
        if any('hostile' in sample.img_path for sample in data['data_samples']):
            raise torch.cuda.OutOfMemoryError('CUDA out of memory')
        return network(data)

    predictor.model.test_step = fail_for_hostile
    first, broken, failing, last, missing = predictor.predict_items(items)
    for found, wanted in zip((first, last), expected, strict=True):
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-3)
    assert broken.error
    assert '\n' not in broken.error
    assert (broken.image, broken.boxes, broken.size) == (None, None, (0, 0))
    assert failing.error.startswith('out of memory at 64 x 48 pixels: use a smaller --batch-size')
    assert missing.error == 'no such file or directory'


def test_limit_of_pixels_holds_for_the_file_backend_of_the_tools(models, images, monkeypatch):
    monkeypatch.setenv('OPENCV_IO_MAX_IMAGE_PIXELS', '1000')
    fileio.install()
    try:
        for limit, error in (
            (None, '64 x 48 pixels, more than 1000'),
            (5000, None),
            (3000, '64 x 48 pixels, more than 3'),
        ):
            [prediction] = Predictor(*models('classifier'), device='cpu', max_pixels=limit).predict_items(images[:1])
            assert (prediction.error or '').startswith(error or '')
            assert (prediction.error is None) == (error is None), prediction.error
        assert os.environ['OPENCV_IO_MAX_IMAGE_PIXELS'] == '1000'
    finally:
        register_backend('local', LocalBackend, prefixes='', force=True)


def test_other_bands_are_told_by_both_numbers():
    """Also where the pipeline subtracts the means, as for detectors of more than three bands."""
    steps = [
        dict(type='LoadImageFromFile', imdecode_backend='tifffile'),
        dict(type='Normalize', mean=[0.0] * 5, std=[1.0] * 5, to_rgb=False),
    ]
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps))))
    prepare = Preparer(cfg, 1)
    [five], [four] = (list(prepare(Sample(Item('', '', 0, ''), np.ones((8, 8, bands), np.uint16)))) for bands in (5, 4))
    assert five.data['img'].shape == (8, 8, 5)
    assert four.sample.error == 'an image of 4 bands, and the model takes 5'
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=steps[:1]))))
    rgb = np.full((8, 8, 3), (300, 20, 10), np.uint16)  # as tifffile decodes
    [three] = Preparer(cfg, 3, keep_image=True)(Sample(Item('', '', 0, ''), rgb))
    assert (three.sample.image == np.array([10, 20, 255], np.uint8)).all()
    assert three.data['img'] is rgb


def count_until_crash(job: int):
    """Results of a job; 3 crashes as a decoder may, in the middle, and 4 hangs, before a process's first result."""
    if job == 4:
        time.sleep(60)
    yield job, np.zeros(300_000)
    if job == 3:
        os.kill(os.getpid(), signal.SIGSEGV)
    yield job, torch.full((2,), job)


@pytest.mark.parametrize('ahead', [1, 8])
def test_a_crash_costs_one_input(ahead):
    results = list(read_ahead(count_until_crash, range(8), ahead, timeout=1))
    assert [job for job, _ in results] == [job for job in range(8) for _ in range(1 if job == 4 else 2)]
    died = {job: result.reason for job, result in results if isinstance(result, WorkerDied)}
    assert died.keys() == {3, 4}
    assert 'SIGSEGV' in died[3]
    assert 'more than 1 seconds' in died[4]
    arrived = [result[1].sum() for job, result in results if job not in died]
    assert arrived[1::2] == [2 * job for job in range(8) if job not in died]
    assert multiprocessing.active_children() == []


def test_the_process_ends_with_its_consumer():
    results = read_ahead(count_until_crash, range(100), 2)
    next(results)
    assert len(multiprocessing.active_children()) == 1
    results.close()
    assert multiprocessing.active_children() == []


def test_the_process_removes_what_it_has_downloaded(tmp_path):
    def download(_):
        with tempfile.TemporaryDirectory(dir=tmp_path):
            yield from np.zeros((9, 300_000))  # more than a pipe holds

    results = read_ahead(download, [0], 2)
    next(results)
    assert len(list(tmp_path.iterdir())) == 1
    results.close()
    assert not list(tmp_path.iterdir())


def test_the_process_outlives_the_thread_that_began():
    """As of a web server, which has another thread for each call."""
    results, first = read_ahead(lambda job: [job], range(9), 1), []
    thread = threading.Thread(target=lambda: first.append(next(results)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert [*first, *results] == [(job, job) for job in range(9)]


def _in_daemon() -> None:
    assert list(read_ahead(lambda job: [job], range(3), 1)) == [(0, 0), (1, 1), (2, 2)]


def test_in_a_daemon_process():
    """Such as a worker of a pool or of a DataLoader, which may start no process."""
    process = multiprocessing.get_context('fork').Process(target=_in_daemon, daemon=True)
    process.start()
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads memory from /proc')
def test_memory_is_flat(models, images):
    predictor = Predictor(*models('classifier'), device='cpu', batch_size=2)
    pages = []
    for prediction in predictor.predict_items(images[:2] * 150):
        assert prediction.error is None
        pages.append(int(Path('/proc/self/statm').read_text().split()[1]))
    assert len(pages) == 300
    assert (max(pages[250:]) - max(pages[:50])) * os.sysconf('SC_PAGE_SIZE') < 4 * 2**20


def test_tiles_cover_an_image_once():
    """Inner parts are a partition, and tiles overlap as they should."""
    for height, width, size, overlap in ((100, 130, 64, 0.2), (64, 65, 64, 0.5), (300, 20, 32, 0.0)):
        seen, tiles = np.zeros((height, width), int), list(tiles_of(height, width, size, overlap))
        for rows, columns, _ in tiles:
            seen[rows.first : rows.end, columns.first : columns.end] += 1
            for span, length in ((rows, height), (columns, width)):
                assert span.stop - span.start == min(size, length)
                assert span.start <= span.first < span.end <= span.stop
        assert (seen == 1).all()
        assert [tile.is_last for tile in tiles] == [False] * (len(tiles) - 1) + [True]
        for one, other in itertools.pairwise(sorted({tile.columns for tile in tiles})):
            assert one.stop - other.start >= int(size * overlap)


def test_encodings_are_those_of_pycocotools():
    """Also of masks that touch the sides, hold all pixels, or none."""
    from pycocotools import mask

    y, x = np.mgrid[:30, :40]
    conditions = [x > 35, y < 2, x < 3, (x + y) % 3 == 0, x > -1, x < 0, (x > 10) & (x < 20) & (y > 25), y == 29]
    masks = np.stack([*conditions, RNG.random((30, 40)) < 0.5])
    expected = [mask.encode(np.asfortranarray(one, dtype=np.uint8)) for one in masks]
    assert encode_masks(masks) == encode_masks(torch.from_numpy(masks)) == expected


@pytest.mark.parametrize('with_masks', [True, False])
def test_an_object_in_an_overlap_counts_once(with_masks):
    """Discs smaller than the overlap, cut by tiles, and the parts with higher scores than the whole."""
    pytest.importorskip('supervision')
    y, x = np.mgrid[:200, :260]
    discs = [
        ((x - column) ** 2 + (y - row) ** 2 <= 7.5**2)
        for row, column in itertools.product(range(10, 195, 18), range(9, 255, 18))
    ]
    pieces = []
    for tile in tiles_of(200, 260, 64, 0.35):
        boxes, scores, masks = [], [], []
        for number, disc in enumerate(discs):
            part = disc[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop]
            if part.any():
                rows, columns = np.nonzero(part)
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                scores.append(0.5 + number / 1000 if part.sum() == disc.sum() else 0.99)
                masks.append(part)
        found = dict(boxes=np.array(boxes, np.float32), scores=np.array(scores, np.float32))
        found['labels'] = np.zeros(len(boxes), np.int64)
        pieces.append((tile, dict(found, masks=encode_masks(np.array(masks)) if with_masks else None)))
    assert sum(len(piece['boxes']) for _, piece in pieces) > 1.5 * len(discs)
    merged = merge_detections(pieces, (200, 260))
    assert len(merged['boxes']) == len(discs)
    np.testing.assert_allclose(merged['scores'], 0.5 + np.arange(len(discs))[::-1] / 1000)
    for number, box in zip(range(len(discs))[::-1], merged['boxes'], strict=True):
        rows, columns = np.nonzero(discs[number])
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    if with_masks:
        assert (masks_of(Prediction(None, masks=merged['masks'])) == np.array(discs)[::-1]).all()


def test_label_maps_of_tiles_are_joined():
    whole = RNG.integers(0, 200, (100, 130), dtype=np.uint8)
    pieces = []
    for tile in tiles_of(100, 130, 64, 0.2):
        part = whole[tile.rows.start : tile.rows.stop, tile.columns.start : tile.columns.stop].copy()
        part[:, : 5 * (tile.columns.start > 0)] = 255  # what lies at the side of a tile is not taken
        pieces.append((tile, dict(label_map=part)))
    assert (merge_label_maps(pieces, (100, 130))['label_map'] == whole).all()


@pytest.mark.parametrize('name', ['detector', 'segmentor'])
def test_slicing(models, images, name):
    """An image of one tile gives what it gives unsliced, one of several tiles a result in its own pixels."""
    pytest.importorskip('supervision')
    options = dict(device='cpu', batch_size=3) | (dict(score_thr=0.0) if name == 'detector' else {})
    plain = Predictor(*models(name), **options)
    sliced = Predictor(*models(name), slice_size=64, **options)
    for one, other in zip(plain.predict_items(images), sliced.predict_items(images), strict=True):
        if name == 'detector':
            assert (one.boxes == other.boxes).all()
            assert one.masks == other.masks
        else:
            assert (one.label_map == other.label_map).all()
    array = RNG.integers(0, 256, (100, 130, 3), dtype=np.uint8)
    large, again = sliced([array, array])
    assert large.size == (100, 130)
    assert (large.image == array).all()
    if name == 'detector':
        assert len(large.boxes) > 10
        assert large.boxes[:, 2].max() > 100
        assert masks_of(large).shape == (len(large.boxes), 100, 130)
        assert (np.diff(large.scores) <= 0).all()
        assert len(again.boxes) == len(large.boxes)
    else:
        assert large.label_map.shape == (100, 130)


def test_chosen_classes(models, images):
    for name in ('detector', 'segmentor', 'classifier'):
        options = dict(device='cpu') | (dict(score_thr=0.0) if name == 'detector' else {})
        (everything,) = Predictor(*models(name), **options).predict_items(images[:1])
        (chosen,) = Predictor(*models(name), classes='b', **options).predict_items(images[:1])
        if name == 'detector':
            keep = everything.labels == 1
            assert 0 < keep.sum() < len(keep)
            assert (chosen.boxes == everything.boxes[keep]).all()
            assert chosen.masks == [mask for mask, kept in zip(everything.masks, keep, strict=True) if kept]
            threshold = float(np.median(everything.scores))
            (best,) = Predictor(*models(name), device='cpu', score_thr=threshold).predict_items(images[:1])
            assert len(best.scores) == (everything.scores >= threshold).sum() < len(everything.scores)
        elif name == 'segmentor':
            assert (chosen.label_map == np.where(everything.label_map == 1, 1, 255)).all()
        else:
            assert chosen.scores.tolist() == [0, everything.scores[1]]


@pytest.mark.parametrize('name', ['detector', 'segmentor', 'classifier'])
def test_tta_and_amp(models, images, name):
    """Both change the numbers a little, and take their options from the config and the device."""
    plain = next(Predictor(*models(name), device='cpu').predict_items(images[:1]))
    (found,) = Predictor(*models(name), device='cpu', tta=True).predict_items(images[:1])
    assert found.error is None
    if name == 'detector':
        with pytest.raises(ToolError, match='--amp on the CPU'):
            Predictor(*models(name), device='cpu', amp=True)
        return
    (rounded,) = Predictor(*models(name), device='cpu', amp=True).predict_items(images[:1])
    assert rounded.error is None
    if name == 'segmentor':
        assert found.label_map.shape == plain.label_map.shape
        assert (rounded.label_map == plain.label_map).mean() > 0.9
    else:
        assert 0 < abs(rounded.scores - plain.scores).max() < 0.05
        assert found.scores.sum() == pytest.approx(1, abs=1e-5)


def test_a_detector_without_masks(tmp_path, images):
    dims = 'neck=dict(in_channels=[16, 32, 64], out_channels=8), bbox_head=dict(in_channels=8, feat_channels=8, '
    files = write(tmp_path, 'detection/retinanet_vheat-t_fpn_1x_coco.py', f'{dims}num_classes=2)')
    found = next(Predictor(*files, device='cpu', score_thr=0.0).predict_items(images))
    assert found.masks is None
    assert found.error is None


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('detector', dict(batch_size=0), 'batch_size=0: expected a positive whole number'),
        ('detector', dict(slice_size=6.4), 'slice_size=6.4: expected a positive'),
        ('detector', dict(overlap=1.0), 'overlap=1.0: expected a share'),
        ('detector', dict(score_thr=30), 'score_thr=30: expected a score from 0 to 1'),
        ('detector', dict(overlap=0.3), r'overlap=0.3: there are no tiles without slice_size'),
        ('detector', dict(classes=['a', 'c']), r"classes=\['a', 'c'\]: the model knows no 'c'; it knows a, b"),
        ('detector', dict(amp=True, half=True), 'amp=True: half chooses the precision, too'),
        ('detector', dict(half=True), 'half=True: needs a GPU'),
        ('detector', dict(device='cuda:99'), "device='cuda:99': cannot be used.*'cpu' can be used on any machine"),
        ('detector', dict(device='gpu'), "device='gpu': cannot be used"),
        ('detector', {'cfg_options': {'modle.backbone.drop_path_rate': 0}}, "no 'modle'.*did you mean 'model'"),
        ('segmentor', dict(score_thr=0.5), 'score_thr=0.5: is for detections'),
        ('classifier', dict(slice_size=64), 'a class belongs to a whole image'),
    ],
)
def test_options_are_checked(models, name, options, message):
    with pytest.raises(ToolError, match=message):
        Predictor(*models(name), **(dict(device='cpu') | options))


def test_checkpoints_that_do_not_fit(models, tmp_path):
    """Of another config; with another number of class names; and panoptic models."""
    config, checkpoint = models('detector')
    with pytest.raises(CheckpointError, match=r'does not fit the model.*missing: decode_head'):
        Predictor(models('segmentor')[0], checkpoint, device='cpu')
    content = torch.load(checkpoint, weights_only=False)
    content['meta']['dataset_meta'] = dict(classes=('a', 'b', 'c'))
    torch.save(content, tmp_path / 'three.pth')
    with pytest.raises(ToolError, match=r"three.pth' names 3 classes, but model.roi_head.*num_classes=2"):
        Predictor(config, tmp_path / 'three.pth', device='cpu')
    del content['meta']['dataset_meta']
    torch.save(content, tmp_path / 'none.pth')
    with pytest.raises(ToolError, match=r'test_dataloader.dataset.* names 80 classes'):
        Predictor(config, tmp_path / 'none.pth', device='cpu')
    options = {'test_dataloader.dataset.metainfo': CLASSES}
    assert Predictor(config, tmp_path / 'none.pth', device='cpu', cfg_options=options).classes == ('a', 'b')
    with pytest.raises(ToolError, match='predicts panoptic maps'):
        Predictor('vheat_mm::detection/mask2former_vheat-t_8xb2-lsj-50e_coco-panoptic.py', checkpoint)
