"""``--tta`` of segmentors: views derived from the test pipeline, merged by mmseg."""

from pathlib import Path

import numpy as np
import pytest
import torch
from config_models import narrow
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from vheat_mm.apis.tta import RATIOS, apply_tta, segmentor_views
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()
pytest.importorskip('mmseg')
CONFIG = Path(__file__).parents[2] / 'configs/segmentation/vheat-t_upernet_8xb2-160k_ade20k-512x512.py'
LOAD, ANNOTATE, PACK = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')


@pytest.fixture(autouse=True)
def segmentation(own_scope):
    init_default_scope('mmseg')


def sample(folder: Path, height: int, width: int, flip: bool = False) -> dict:
    """A smooth picture and its label map as files, as a data set passes them to a pipeline."""
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))
    labels = Image.fromarray(generator.integers(0, 4, (8, 8), dtype=np.uint8)).resize((width, height), 0)
    paths = [str(folder / f'{kind}{flip}.png') for kind in ('image', 'map')]
    for image, path in zip((picture, labels), paths, strict=True):
        (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image).save(path)
    return dict(img_path=paths[0], seg_map_path=paths[1], reduce_zero_label=True, label_map=None, seg_fields=[])


def test_same_views_as_mmseg(tmp_path):
    """Of an image as large as the test pipeline makes it, mmseg's own views, which are relative to the image."""
    cfg = Config.fromfile(CONFIG)
    own, derived = (
        Compose(pipeline)(sample(tmp_path, 512, 601))
        for pipeline in (cfg.tta_pipeline, segmentor_views(cfg.test_dataloader.dataset.pipeline))
    )
    assert len(derived['inputs']) == 2 * len(RATIOS) == len(own['inputs'])
    for ours, theirs in zip(derived['inputs'], own['inputs'], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(derived['data_samples'], own['data_samples'], strict=True):
        assert ours.metainfo == theirs.metainfo
        assert torch.equal(ours.gt_sem_seg.data, theirs.gt_sem_seg.data)


def test_flipped_image_gives_flipped_label_map(tmp_path):
    """An image and its mirror image have the same views; the label map to compare with is that of the file."""
    cfg = Config.fromfile(CONFIG)
    cfg.tta_pipeline = cfg.tta_model = None
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline[1].scale = (96, 64)
    apply_tta(cfg)
    assert cfg.model.type == 'SegTTAModel'
    narrow(cfg.model.module)
    cfg.model.module.test_cfg = dict(mode='whole')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    torch.nn.init.normal_(model.module.decode_head.conv_seg.weight)
    data = [sample(tmp_path, 60, 80, flip) for flip in (False, True)]
    views = Compose(cfg.test_dataloader.dataset.pipeline)
    plain, mirrored = model.test_step(pseudo_collate([views(dict(entry)) for entry in data]))
    assert plain.pred_sem_seg.shape == (60, 80)
    assert len(plain.pred_sem_seg.data.unique()) > 2
    same = plain.pred_sem_seg.data == mirrored.pred_sem_seg.data.flip(-1)
    assert same.float().mean() > 0.995
    truth = np.asarray(Image.open(data[0]['seg_map_path'])).astype(int) - 1
    np.testing.assert_array_equal(plain.gt_sem_seg.data[0], np.where(truth < 0, 255, truth))


@pytest.mark.parametrize(
    ('resize', 'sizes'),
    [
        ([], [(r * 60, r * 80) for r in RATIOS]),
        ([dict(type='Resize', scale_factor=0.5)], [(r * 30, r * 40) for r in RATIOS]),
        ([dict(type='Resize', scale=(float('inf'), 120), keep_ratio=True)], [(r * 120, r * 160) for r in RATIOS]),
        ([dict(type='mmseg.Resize', scale=40, keep_ratio=False)], [(r * 40, r * 40) for r in RATIOS]),
        ([dict(type='ResizeShortestEdge', scale=30, max_size=36)], [(r * 27, r * 36) for r in RATIOS]),
    ],
)
@pytest.mark.parametrize('annotations_first', [False, True])
def test_kinds_of_pipelines(tmp_path, resize, sizes, annotations_first):
    """No resizing, by a factor, without a limit on one side, to a square, by the short side; few metadata packed."""
    pad = dict(type='Pad', size_divisor=32)
    pack = dict(PACK, meta_keys=('img_path',))
    steps = [ANNOTATE, *resize, pad] if annotations_first else [*resize, ANNOTATE, pad]
    pipeline = [LOAD, *steps, pack]
    packed = Compose(segmentor_views(pipeline))(sample(tmp_path, 60, 80))
    expected = [size for size in sizes for _ in range(2)]
    for image, meta, (height, width) in zip(packed['inputs'], packed['data_samples'], expected, strict=True):
        assert meta.ori_shape == (60, 80)
        factors = np.array(meta.scale_factor) * (80, 60)  # the size before padding
        np.testing.assert_allclose(factors, (width, height), atol=0.51)
        assert image.shape[1:] == tuple(-(-int(side + 0.5) // 32) * 32 for side in factors[::-1])
        assert meta.gt_sem_seg.shape == (60, 80)
    assert [meta.flip for meta in packed['data_samples']] == [False, True] * len(RATIOS)
    assert pack['meta_keys'] == ('img_path',)  # the config's own is untouched


def test_own_pipeline_wins_and_heads_of_one_channel_are_refused():
    cfg = Config.fromfile(CONFIG)
    own = cfg.tta_pipeline
    apply_tta(cfg)
    assert cfg.test_dataloader.dataset.pipeline == own
    cfg = Config.fromfile(CONFIG)
    cfg.model.decode_head.out_channels = 1
    with pytest.raises(ToolError, match='out_channels=1 twice'):
        apply_tta(cfg)
