"""Running the tools on generated data: as commands, or in this process."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer

from vheat_mm.apis.train_test import run_training
from vheat_mm.engine import fileio

fileio.install()  # lets torch.load read MMEngine's checkpoints
REPO = Path(__file__).resolve().parents[2]
TOOLS = REPO / 'tools'
SIZE = 64

BACKBONE = """
    backbone=dict(
        _delete_=True, type='VHeat', arch=dict(embed_dims=8, depths=(1, 1, 1, 1)), img_size=64, drop_path_rate=0.2,
        out_indices={out_indices}),
"""
SCHEDULE = """
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4)]
default_hooks = dict(logger=dict(interval=1))
"""
DETECTION = (
    """
_base_ = {repo!r} + '/configs/detection/mask-rcnn_vheat-t_fpn_1x_coco.py'
metainfo = dict(classes=('box', 'disc'))
model = dict("""
    + BACKBONE.format(out_indices='(0, 1, 2, 3)')
    + """
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=16, num_classes=2),
        mask_roi_extractor=dict(out_channels=8),
        mask_head=dict(num_convs=1, in_channels=8, conv_out_channels=8, num_classes=2)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=(64, 64), ratio_range=(0.7, 1.3), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
dataset = dict(metainfo=metainfo, data_root={data!r}, ann_file='coco.json', data_prefix=dict(img='images/'))
train_dataloader = dict(batch_size=2, num_workers=2, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(num_workers=0, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={data!r} + '/coco.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2, val_interval=2)
"""
    + SCHEDULE
)
SEGMENTATION = (
    """
_base_ = {repo!r} + '/configs/segmentation/vheat-t_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(data_preprocessor=dict(size=(64, 64)),"""
    + BACKBONE.format(out_indices='(0, 1, 2, 3)')
    + """
    decode_head=dict(in_channels=[8, 16, 32, 64], channels=8, num_classes=3),
    auxiliary_head=dict(in_channels=32, channels=8, num_classes=3),
    test_cfg=dict(_delete_=True, mode='whole'),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
dataset = dict(
    _delete_=True, type='BaseSegDataset', img_suffix='.png', data_root={data!r},
    data_prefix=dict(img_path='images', seg_map_path='maps'),
    metainfo=dict(classes=('ground', 'box', 'disc'), palette=[[0, 0, 0], [255, 0, 0], [0, 255, 0]]))
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(num_workers=0, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=4)
"""
    + SCHEDULE
    + 'default_hooks.update(checkpoint=dict(interval=2))\nrandomness = dict(seed=1)'
)
CLASSIFICATION = (
    """
_base_ = {repo!r} + '/configs/classification/vheat-t_16xb128_in1k.py'
data_preprocessor = dict(num_classes=2)
model = dict("""
    + BACKBONE.format(out_indices='(3,)')
    + """
    head=dict(num_classes=2, in_channels=64, topk=(1,)), train_cfg=dict(augments=None))
pipeline = [dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')]
dataset = dict(
    _delete_=True, type='CustomDataset', data_root={data!r} + '/folders', with_label=True, pipeline=pipeline)
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dataset)
val_dataloader = dict(batch_size=2, num_workers=0, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2, val_interval=2)
"""
    + SCHEDULE
)
TASKS = dict(detection=DETECTION, segmentation=SEGMENTATION, classification=CLASSIFICATION)


@pytest.fixture(scope='session')
def data(tmp_path_factory) -> Path:
    """Six 64x64 images of one box and one disc each, annotated for all three tasks."""
    cv2 = pytest.importorskip('cv2')
    root = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for folder in ('images', 'maps', 'folders/box', 'folders/disc'):
        (root / folder).mkdir(parents=True)
    for i in range(6):
        image = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
        label_map = np.zeros((SIZE, SIZE), np.uint8)
        x, y = (int(v) for v in rng.integers(2, 12, 2))
        cv2.rectangle(image, (x, y), (x + 20, y + 16), (40, 40, 230), -1)
        cv2.rectangle(label_map, (x, y), (x + 20, y + 16), 1, -1)
        cv2.circle(image, (x + 36, y + 38), 9, (40, 230, 40), -1)
        cv2.circle(label_map, (x + 36, y + 38), 9, 2, -1)
        name = f'{i}.png'
        cv2.imwrite(str(root / 'images' / name), image)
        cv2.imwrite(str(root / 'maps' / name), label_map)
        cv2.imwrite(str(root / 'folders' / ('box', 'disc')[i % 2] / name), image)
        images.append(dict(id=i, file_name=name, width=SIZE, height=SIZE))
        for category, (left, top, width, height) in ((1, (x, y, 21, 17)), (2, (x + 27, y + 29, 19, 19))):
            corners = [left, top, left + width, top, left + width, top + height, left, top + height]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i,
                    category_id=category,
                    bbox=[left, top, width, height],
                    area=width * height,
                    segmentation=[corners],
                    iscrowd=0,
                )
            )
    categories = [dict(id=1, name='box'), dict(id=2, name='disc')]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / 'coco.json').write_text(json.dumps(content))
    return root


def write_config(folder: Path, task: str, data: Path, extra: str = '', root: Path = REPO) -> Path:
    path = folder / f'{task}.py'
    text = TASKS[task].replace('{repo!r}', repr(str(root))).replace('{data!r}', repr(str(data)))
    path.write_text(text + '\n' + extra)
    return path


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment variables without those that change how the tools run, and with ``variables``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('OMP_', 'SLURM_', 'VHEAT_'))}
    return kept | dict(PYTHON=sys.executable) | variables


def run(*command: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run a tool as a command from ``cwd``, outside of the repository."""
    names = [str(part) for part in command]
    if names[0].endswith('.py'):
        names.insert(0, sys.executable)
        environment['OMP_NUM_THREADS'] = '1'
    options = dict(cwd=cwd, env=clean_environment(**environment), capture_output=True, text=True, timeout=280)
    done = subprocess.run(names, **options, check=False)
    if check and done.returncode:
        pytest.fail(f'{" ".join(names)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    return done


def call(tool: Callable[[list[str]], int], *arguments: object, cwd: Path) -> None:
    """Run a tool in this process from ``cwd``, which takes a fraction of the time of a command; it must succeed."""
    assert _call(tool, arguments, cwd) == 0


def call_failing(capfd, tool: Callable[[list[str]], int], *arguments: object, cwd: Path | None = None) -> str:
    """Run a tool that must fail in this process; returns its one message."""
    status = _call(tool, arguments, cwd or Path.cwd())
    captured = capfd.readouterr()
    assert_message(subprocess.CompletedProcess(arguments, status, captured.out, captured.err))
    return captured.err[captured.err.index('error: ') :]


def _call(tool: Callable[[list[str]], int], arguments: tuple, cwd: Path) -> int:
    for manager in (MMLogger, MessageHub, Visualizer):
        manager._instance_dict.clear()  # those of earlier runs have closed files
    before = Path.cwd()
    os.chdir(cwd)
    try:
        # MMEngine formats the config six times in a run, which takes a third of a second.
        with mock.patch('mmengine.config.config.FormatCode', lambda text, **_: (text, True), create=True):
            return tool([str(argument) for argument in arguments])
    finally:
        os.chdir(before)
        logging.raiseExceptions = True


def assert_message(done: subprocess.CompletedProcess, *words: str) -> None:
    """The tool failed with one message on stderr that contains ``words``, and no traceback."""
    text = done.stdout + done.stderr
    assert done.returncode == 2, text[-3000:]
    assert 'Traceback' not in text
    messages = re.findall(r'^error: .*$', done.stderr, flags=re.MULTILINE)
    assert len(messages) == 1, done.stderr
    for word in words:
        assert word in messages[0]


def weights(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    averaged = {f'ema {key}': value for key, value in checkpoint.get('ema_state_dict', {}).items()}
    return checkpoint['state_dict'] | averaged


def assert_same_weights(first: Path, second: Path, differs: bool = False) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    worst = max(float((ours[key].double() - theirs[key].double()).abs().max()) for key in ours)
    assert worst > 1e-6 if differs else worst <= 1e-6


def kill_after(work_dir: Path, checkpoint: str, target: Path) -> Path:
    """The work dir of a run that was killed right after writing ``checkpoint``."""
    target.mkdir()
    (target / checkpoint).write_bytes((work_dir / checkpoint).read_bytes())
    (target / 'last_checkpoint').write_text(str(target / checkpoint))
    return target


def folder_with_config(factory: pytest.TempPathFactory, library: str, task: str, data: Path) -> Path:
    pytest.importorskip(library)
    folder = factory.mktemp(task)
    write_config(folder, task, data)
    return folder


@pytest.fixture(scope='session')
def detector(tmp_path_factory, data) -> Path:
    """Folder of a Mask R-CNN trained for two epochs by two processes."""
    folder = folder_with_config(tmp_path_factory, 'mmdet', 'detection', data)
    run(TOOLS / 'dist_train.sh', 'detection.py', 2, '--work-dir', 'run', cwd=folder)
    return folder


@pytest.fixture(scope='session')
def segmentor(tmp_path_factory, data) -> Path:
    """Folder of a UPerNet trained for four iterations by the command."""
    folder = folder_with_config(tmp_path_factory, 'mmseg', 'segmentation', data)
    run(TOOLS / 'train.py', 'segmentation.py', '--work-dir', 'run', '--auto-scale-lr', cwd=folder)
    return folder


@pytest.fixture(scope='session')
def classifier(tmp_path_factory, data) -> Path:
    """Folder of a classifier with EMA trained for two epochs, in the default work dir."""
    folder = folder_with_config(tmp_path_factory, 'mmpretrain', 'classification', data)
    call(run_training, 'classification.py', cwd=folder)
    return folder
