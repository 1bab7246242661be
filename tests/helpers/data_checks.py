"""Data sets of the tests of data checks, and the check itself on them."""

from __future__ import annotations

from pathlib import Path

import corrupt_data
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

from vheat_mm.datasets.checks.check import check_datasets
from vheat_mm.datasets.checks.report import Report

pytest.importorskip('mmcv')

DETECTION = dict(
    type='CocoDataset',
    metainfo=dict(classes=corrupt_data.CLASSES),
    data_prefix=dict(img='images/'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)],
)
SEGMENTATION = dict(
    type='BaseSegDataset',
    metainfo=dict(classes=('ground', 'box')),
    data_prefix=dict(img_path='images', seg_map_path='annotations'),
    reduce_zero_label=True,
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')],
)
CLASSIFICATION = dict(
    type='CustomDataset',
    data_prefix='train',
    with_label=True,
    pipeline=[dict(type='LoadImageFromFile')],
)


def dataset(base: dict, ann_file: Path | None, root: Path | None = None, **fields) -> dict:
    named = dict(ann_file=str(ann_file)) if ann_file else {}
    return {**base, 'data_root': str(root or ann_file.parent.parent), **named, **fields}


def check(scope: str, splits: tuple[str, ...] = ('train',), model: dict | None = None, **datasets) -> Report:
    pytest.importorskip(scope)
    init_default_scope(scope)
    loaders = {f'{split}_dataloader': dict(dataset=value) for split, value in datasets.items()}
    return check_datasets(Config(dict(model=model or {}, **loaders)), splits, workers=2)
