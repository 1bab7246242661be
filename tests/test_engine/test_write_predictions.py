"""Predictions as files: no image replaces another, whatever its bands."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, PixelData

from vheat_mm.engine.hooks import WritePredictionsHook


def make_runner(root: Path, image: np.ndarray, backend: str) -> SimpleNamespace:
    """A runner whose test set has the parts ``a`` and ``b``; its visualizer writes the image that it gets."""

    def load(results: dict) -> dict:
        return dict(results, img=image)

    def draw(name, image, data_sample, show, wait_time, out_file, **options):
        Path(out_file).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(out_file, image[..., ::-1])

    load.imdecode_backend = backend
    pipeline = SimpleNamespace(transforms=[load])
    parts = [SimpleNamespace(data_prefix=dict(img_path=str(root / name)), pipeline=pipeline) for name in 'ab']
    dataset = SimpleNamespace(datasets=parts, metainfo={})
    return SimpleNamespace(
        test_dataloader=SimpleNamespace(dataset=dataset),
        visualizer=SimpleNamespace(add_datasample=draw, dataset_meta={}),
        logger=SimpleNamespace(info=print),
    )


def sample(path: object, label: int, **meta: object) -> BaseDataElement:
    labels = PixelData(data=torch.full((1, 2, 3), label))
    return BaseDataElement(metainfo=dict(img_path=str(path), **meta), pred_sem_seg=labels)


def test_equal_names_in_other_folders(tmp_path):
    image = np.zeros((2, 3, 3), np.uint8)
    hook = WritePredictionsHook(image_dir=str(tmp_path / 'drawn'), map_dir=str(tmp_path / 'maps'))
    runner = make_runner(tmp_path / 'data', image, 'cv2')
    hook.before_test(runner)
    paths = [tmp_path / 'data' / name for name in ('a/0.jpg', 'b/0.jpg', 'b/c/0.jpg')] + [tmp_path / 'elsewhere/0.jpg']
    hook.after_test_iter(runner, 0, outputs=[sample(path, i) for i, path in enumerate(paths)])
    for i, path in enumerate(paths):
        name = path.relative_to(tmp_path / 'data' if i < 3 else '/')
        assert (tmp_path / 'drawn' / name).is_file()
        assert (cv2.imread(str((tmp_path / 'maps' / name).with_suffix('.png')), -1) == i).all()


def test_label_maps(tmp_path):
    """Numbers of the annotations with reduce_zero_label; more than 256 classes."""
    hook = WritePredictionsHook(map_dir=str(tmp_path))
    runner = make_runner(tmp_path / 'data', np.zeros((2, 3), np.uint8), 'cv2')
    hook.before_test(runner)
    outputs = [
        sample(tmp_path / 'data/a/0.jpg', 7, reduce_zero_label=True),
        sample(tmp_path / 'data/a/1.jpg', 299),
    ]
    hook.after_test_iter(runner, 0, outputs=outputs)
    assert [cv2.imread(str(tmp_path / f'a/{i}.png'), -1).max() for i in range(2)] == [8, 299]


@pytest.mark.parametrize(
    ('bands', 'dtype', 'top', 'backend', 'expected'),
    [
        ((), np.uint8, 200, 'cv2', [200, 200, 200]),
        ((1,), np.float32, 200, 'cv2', [200, 200, 200]),
        ((3,), np.uint8, 200, 'cv2', [198, 199, 200]),  # stored as BGR
        ((4,), np.uint8, 200, 'cv2', [198, 199, 200]),
        ((5,), np.uint16, 40000, 'tifffile', [255, 255, 255]),
        ((5,), np.float32, 200, 'tifffile', [200, 199, 198]),
    ],
)
def test_bands(tmp_path, capsys, bands, dtype, top, backend, expected):
    """The first three bands are drawn, which the log says once."""
    image = np.zeros((2, 3, *bands), dtype)
    image[1, 1] = top - np.arange(bands[0]) if bands else top
    hook = WritePredictionsHook(image_dir=str(tmp_path / 'drawn'))
    runner = make_runner(tmp_path / 'data', image, backend)
    hook.before_test(runner)
    hook.after_test_iter(runner, 0, outputs=[sample(tmp_path / f'data/a/{i}.tif', 0) for i in range(2)])
    for i in range(2):
        drawn = cv2.imread(str(tmp_path / 'drawn' / 'a' / f'{i}.tif.png'))[..., ::-1]
        np.testing.assert_allclose(drawn[1, 1].astype(int), expected, atol=1)
        assert drawn[0, 0].max() == 0
    assert capsys.readouterr().out.count('the first three are drawn') == (bands in ((4,), (5,)))
