"""Models of configs at width 8, and batches for them: shared by tests of configs, tools and test-time augmentation."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from torch import nn

CONFIGS = Path(__file__).parents[2] / 'configs'
TINY = dict(embed_dims=8, depths=(1, 1, 1, 1))
WIDTHS = {48: 8, 96: 8, 192: 16, 384: 32, 768: 64, 128: 16, 256: 32, 512: 32, 1024: 64, 2048: 64}
SMALLER = dict(num_layers=2, num_queries=20, size=(96, 96))


read_once = cache(Config.fromfile)


def load(name: str) -> Config:
    """A config by its path below configs/, with its library's scope as the default."""
    cfg = copy.deepcopy(read_once(CONFIGS / name))
    init_default_scope(cfg.default_scope)
    return cfg


def task(name: str) -> str:
    return name.split('/')[0]


def narrow(node, key: str = '', kept: tuple[int, ...] = ()):
    """The same model at width 8, with one block per stage and short transformers; changes dicts in place."""
    if isinstance(node, dict):
        if node.get('type') == 'DINO':  # mmdet's takes no other width: it encodes a box as 4 x 128 numbers
            kept = (128, 256)
        for name, value in node.items():
            node[name] = narrow(value, name, kept)
        if node.get('type') == 'VHeat':
            large = dict(post_norm=True, layer_scale=1e-5) if node['arch'] in ('small', 'base') else {}
            node.update(arch=TINY | large, img_size=64, drop_path_rate=0.0, init_cfg=None)
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
        return node
    if node == [128, 256, 512, 1024]:  # base's maps; alone, the same numbers are widths of heads
        return [8, 16, 32, 64]
    if key in SMALLER:
        return SMALLER[key]
    if isinstance(node, list | tuple):
        return type(node)(narrow(value, key, kept) for value in node)
    if re.search('channels|dims|num_feats', key) and node not in kept:
        return WIDTHS.get(node, node)
    return 112 if (key, node) == ('num_points', 12544) else node


def unscoped(node):
    """The same values without the library that MMEngine notes beside each dict."""
    if isinstance(node, dict):
        return {key: unscoped(value) for key, value in node.items() if key != '_scope_'}
    return [unscoped(value) for value in node] if isinstance(node, list | tuple) else node


def build(cfg: Config) -> nn.Module:
    """The config's model as it stands, with the data preprocessor that the Runner would give it."""
    model = copy.deepcopy(cfg.model)
    model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    built = MODELS.build(model)
    built.init_weights()
    return built


def narrow_model(cfg: Config) -> nn.Module:
    narrow(cfg.model)
    return build(cfg)


def batch_of(cfg: Config) -> dict:
    """Two random images with labels, as a data loader of the config's library collates them."""
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        batch = demo_mm_inputs(2, [[3, 64, 96], [3, 96, 64]], num_classes=80, with_mask=True)
        if cfg.model.get('panoptic_head', {}).get('num_stuff_classes'):
            for image, sample in zip(batch['inputs'], batch['data_samples'], strict=True):
                sample.gt_sem_seg = PixelData(sem_seg=torch.randint(80, 133, (1, *image.shape[1:])))
        return batch
    images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    if cfg.default_scope == 'mmseg':
        from mmseg.structures import SegDataSample

        meta = dict(img_shape=(64, 64), ori_shape=(64, 64))
        maps = [PixelData(data=torch.randint(0, 150, (1, 64, 64))) for _ in images]
        return dict(inputs=list(images), data_samples=[SegDataSample(gt_sem_seg=m, metainfo=meta) for m in maps])
    from mmpretrain.structures import DataSample

    return dict(inputs=images, data_samples=[DataSample().set_gt_label(label) for label in (3, 7)])


def groups_of(model: nn.Module, optim) -> dict[str, dict]:
    """The optimizer's group of each parameter, by name."""
    groups = {id(p): group for group in optim.optimizer.param_groups for p in group['params']}
    return {key: groups[id(p)] for key, p in model.named_parameters() if id(p) in groups}
