"""Errors of the tools: one message, and no data is lost."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
from pathlib import Path

import pytest
import torch
from corrupt_data import make_corrupt_ade, make_corrupt_coco, make_corrupt_folder
from tool_runs import (
    TOOLS,
    assert_message,
    call,
    call_failing,
    kill_after,
    run,
    weights,
    write_config,
)

from vheat_mm.apis.train_test import run_testing, run_training


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['model.backbone.img_size=31'], ['img_size', '31', '32']),
        (['model.backbone.arch=huge'], ['huge', 'tiny']),
        (['model.backbone.window_size=7'], ['window_size']),
        (['model.backbone.out_indices=(0,1,2,4)'], ['out_indices', '4']),
        (['model.roi_head.bbox_head.num_classes=1'], ['2 classes', 'model.roi_head.bbox_head.num_classes=1']),
        (["val_dataloader.dataset.metainfo.classes=('disc','box')"], ['coco.json', 'order', '[box, disc]']),
        (["train_dataloader.dataset.metainfo.classes=('box','cone')"], ['coco.json', 'cone']),
        (['train_dataloader.dataset.ann_file=none.json'], ['none.json']),
        (['load_from=none.pth'], ["'none.pth'"]),
        (['default_scope=mmfoo'], ['mmfoo', 'mmdet']),
        (['optim_wrapper=None'], ['optim_wrapper']),
        (['default_hooks.logger=dict(_delete_=True,interval=50)'], ['default_hooks.logger: there is no type in']),
        (['optim_wrapper.optimizer.type=AdamX'], ['optim_wrapper.optimizer: ', "type='AdamX'", "'Adam"]),
        (['model.roi_head.bbox_head.num_clases=2'], ['model.roi_head.bbox_head: ', "did you mean 'num_classes'"]),
        (["custom_hooks=[dict(type='Foo')]"], ["custom_hooks.0: type='Foo'", 'custom_imports']),
        (['default_hooks.checkpoint.intervall=2'], ['default_hooks.checkpoint: ', "did you mean 'interval'"]),
        (['train_dataloader.num_workers=-1'], ['train_dataloader: num_workers']),
        (['train_dataloader.dataset.pipeline.3.probb=1'], ['train_dataloader.dataset.pipeline.3: ', "'prob'"]),
    ],
)
def test_bad_settings(tmp_path, data, monkeypatch, capfd, options, words):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, 'detection', data)
    message = call_failing(capfd, run_training, 'detection.py', '--cfg-options', *options)
    assert message.count('\n') <= 2  # one or two lines, the last on stderr
    for word in words:
        assert word in message


def test_bad_category_id(tmp_path, data, monkeypatch, capfd):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    content = json.loads((data / 'coco.json').read_text())
    content['annotations'][4]['category_id'] = 9
    (tmp_path / 'bad.json').write_text(json.dumps(content))
    write_config(tmp_path, 'detection', data)
    option = f'train_dataloader.dataset.ann_file={tmp_path}/bad.json'
    message = call_failing(capfd, run_training, 'detection.py', '--cfg-options', option)
    assert 'bad.json, image 2, annotation 5: category_id 9 ' in message


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (None, ['bad.py', 'working directory']),
        ('model = dict(\n', ['bad.py', 'SyntaxError']),
        ("_base_ = 'nowhere.py'\n", ['bad.py', 'nowhere.py']),
        (
            "custom_imports = dict(imports=['no_such_module'])\n",
            ["bad.py': ModuleNotFoundError: No module named 'no_such_", 'PYTHONPATH'],
        ),
        ("default_scope = 'mmdet'\n", ['bad.py', 'model']),
    ],
)
def test_bad_config(tmp_path, monkeypatch, capfd, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / 'bad.py').write_text(text)
    message = call_failing(capfd, run_training, 'bad.py')
    for word in words:
        assert word in message


def test_bad_checkpoint(detector, segmentor, monkeypatch, capfd):
    """Missing, truncated, with code, of another width, of another task, without training state; test and resume."""
    monkeypatch.chdir(detector)
    good = (detector / 'run' / 'epoch_2.pth').read_bytes()
    Path('truncated.pth').write_bytes(good[: len(good) // 2])
    Path('code.pth').write_bytes(pickle.dumps(dict(state_dict=Exploit())))
    torch.save(dict(state_dict=weights(Path('run/epoch_2.pth'))), 'weights.pth')
    uses = (run_testing, []), (run_training, ['--resume'])
    for name, word in (('none.pth', 'none.pth'), ('truncated.pth', 'truncated'), ('code.pth', 'touch')):
        for tool, flag in uses:
            message = call_failing(capfd, tool, 'detection.py', *flag, name)
            assert name in message
            assert word in message or 'code' in message
    assert not Path('touched').exists()
    assert 'training state' in call_failing(capfd, run_training, 'detection.py', '--resume', 'weights.pth')
    wider = ['--cfg-options', 'model.backbone.arch.embed_dims=16', 'model.neck.in_channels=[16,32,64,128]']
    message = call_failing(capfd, run_testing, 'detection.py', 'run/epoch_2.pth', *wider)
    assert 'embed_dims=8' in message
    assert 'embed_dims=16' in message
    other_task = segmentor / 'run' / 'iter_4.pth'
    assert 'decode_head' in call_failing(capfd, run_testing, 'detection.py', other_task)


class Exploit:
    def __reduce__(self):
        return os.system, ('touch touched',)


def test_flags_that_do_not_fit(detector, segmentor, monkeypatch, capfd):
    monkeypatch.chdir(detector)
    test = ('detection.py', 'run/epoch_2.pth')
    assert '.pkl' in call_failing(capfd, run_testing, *test, '--out', 'results.json')
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    assert '--show-dir' in call_failing(capfd, run_testing, *test, '--show')
    assert 'dist_' in call_failing(capfd, run_testing, *test, '--launcher', 'pytorch')
    no_base = ['--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None']
    assert 'base_batch_size' in call_failing(capfd, run_training, 'detection.py', *no_base)
    assert 'out_channels=1 twice' in call_failing(
        *(capfd, run_testing, segmentor / 'segmentation.py', segmentor / 'run' / 'iter_4.pth', '--tta'),
        *('--cfg-options', 'model.decode_head.out_channels=1'),
    )
    with pytest.raises(SystemExit, match='2'):
        run_training(['detection.py', '--cfg-options', 'model.backbone.img_size'])
    assert 'KEY=VALUE' in capfd.readouterr().err


def test_full_disk_keeps_earlier_checkpoints(classifier, capfd):
    """A limit on the file size stands for the full disk: the second checkpoint is larger."""
    killed = kill_after(classifier / 'work_dirs' / 'classification', 'epoch_1.pth', classifier / 'full')
    before = (killed / 'epoch_1.pth').read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        options = ('--work-dir', 'full', '--resume')
        message = call_failing(capfd, run_training, 'classification.py', *options, cwd=classifier)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'epoch_2.pth' in message
    assert 'too large' in message
    assert (killed / 'epoch_1.pth').read_bytes() == before
    assert [path.name for path in killed.glob('*epoch*')] == ['epoch_1.pth']


def test_error_of_all_processes_is_printed_once(tmp_path):
    done = run(TOOLS / 'dist_train.sh', 'none.py', 2, cwd=tmp_path, check=False)
    assert_message(done, 'none.py')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(('value', 'where', 'status'), [('7', '3.png', 0), ('-1', '.png', 2)])
def test_labels_outside_num_classes(tmp_path, data, value, where, status):
    """One image with such a label is skipped in all processes and workers; if all images have it, the run ends."""
    pytest.importorskip('mmdet')
    write_config(tmp_path, 'detection', data)
    code = f"""
from mmengine.registry import TRANSFORMS
@TRANSFORMS.register_module()
class Mislabel:
    def __call__(self, results):
        if results['img_path'].endswith({where!r}):
            results['gt_bboxes_labels'][:] = {value}
        return results
"""
    (tmp_path / 'mislabel.py').write_text(code)
    text = (tmp_path / 'detection.py').read_text()
    text = text.replace("dict(type='PackDetInputs'),", "dict(type='mmengine.Mislabel'), dict(type='PackDetInputs'),")
    text += "\ncustom_imports = dict(imports=['vheat_mm', 'mislabel'], allow_failed_imports=False)\n"
    (tmp_path / 'detection.py').write_text(text)
    done = run(TOOLS / 'dist_train.sh', 'detection.py', 2, cwd=tmp_path, check=False, PYTHONPATH=str(tmp_path))
    if status:
        assert done.returncode == 2
        assert 'Traceback' not in done.stderr
        messages = re.findall(r'^error: .*$', done.stderr, flags=re.MULTILINE)
        assert messages  # of each process that left out too many before the other one ended it
        for word in ('samples were left out: ', f'label {value} ', 'num_classes=2', 'check_dataset.py'):
            assert all(word in message for message in messages)
        return
    assert done.returncode == 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if 'is left out' in line]
    assert len(lines) >= 2  # once per epoch, and where it is drawn to replace itself
    assert all(f'{where}) is left out' in line and f'label {value} ' in line for line in lines)


CORRUPT_CONFIG = {
    'detection': """
bad = dict(data_root={root!r}, ann_file='annotations/images.json', data_prefix=dict(img='images/'))
train_cfg = dict(max_epochs=3, val_interval=3)
""",
    'segmentation': """
bad = dict(
    data_root={root!r}, ann_file='splits/all.txt', img_suffix='.jpg',
    data_prefix=dict(img_path='images', seg_map_path='annotations'))
train_cfg = dict(max_iters=40, val_interval=40)
""",
    'classification': """
bad = dict(data_root={root!r}, ann_file='meta/all.txt', data_prefix='train', classes=('box', 'disc'))
train_cfg = dict(max_epochs=3, val_interval=3)
""",
}


@pytest.mark.parametrize('task', CORRUPT_CONFIG)
def test_broken_samples_are_skipped_in_training(tmp_path, data, task, capfd):
    """All kinds of corrupt images and label maps at once; the log names their paths."""
    pytest.importorskip(dict(detection='mmdet', segmentation='mmseg', classification='mmpretrain')[task])
    make = dict(detection=make_corrupt_coco, segmentation=make_corrupt_ade, classification=make_corrupt_folder)[task]
    make(tmp_path / 'bad')
    extra = CORRUPT_CONFIG[task].replace('{root!r}', repr(str(tmp_path / 'bad')))
    extra += "train_dataloader['dataset'] = dict(train_dataloader['dataset'], **bad)\n"
    extra += "custom_hooks = [dict(type='SkipBrokenSamplesHook', max_share=1)]\n"
    if task == 'segmentation':
        extra += "train_pipeline.insert(2, dict(type='Resize', scale=(64, 64)))\n"
        extra += "test_pipeline.insert(1, dict(type='Resize', scale=(64, 64)))\n"
    if task == 'classification':
        extra += "pipeline[1:1] = [dict(type='Resize', scale=64), dict(type='CenterCrop', crop_size=64)]\n"
    write_config(tmp_path, task, data, extra)
    call(run_training, f'{task}.py', '--work-dir', 'run', cwd=tmp_path)
    lines = [line for line in capfd.readouterr().out.splitlines() if 'is left out, another takes its place' in line]
    named = {Path(found.group(1)).stem for line in lines if (found := re.search(r'\((/.*?)\) is left out', line))}
    always = {'missing', 'zero_bytes', 'no_image', 'truncated_png', 'damaged_png', 'bomb'}
    if task == 'segmentation':
        always |= {
            'map_missing',
            'map_zero_bytes',
            'map_no_image',
            'map_truncated',
            'map_value_too_high',
        }
    assert always <= named
    assert not named & {'good_0', 'good_1', 'good_2', 'good_3', 'cmyk', 'grayscale', 'sixteen_bit', 'palette', 'alpha'}
    assert lines
    assert all(len(line) < 800 for line in lines)


def test_validation_replaces_nothing(tmp_path, data, capfd):
    """A score over other images than the set holds is none: the first broken one ends the run, in training and test."""
    pytest.importorskip('mmseg')
    make_corrupt_ade(tmp_path / 'bad')
    extra = CORRUPT_CONFIG['segmentation'].replace('{root!r}', repr(str(tmp_path / 'bad')))
    extra = extra.replace('all.txt', 'map_no_image.txt').replace('=40', '=1')
    extra += "val_dataloader['dataset'].update(bad)\nmodel['data_preprocessor'].update(test_cfg=dict(size=(64, 64)))\n"
    write_config(tmp_path, 'segmentation', data, extra)
    message = call_failing(capfd, run_training, 'segmentation.py', '--work-dir', 'run', cwd=tmp_path)
    assert 'images/map_no_image.jpg) of the data set to test on cannot be used: UnidentifiedImageError' in message
    checkpoint = tmp_path / 'run' / 'iter_1.pth'
    message = call_failing(capfd, run_testing, 'segmentation.py', checkpoint, '--work-dir', 'test', cwd=tmp_path)
    assert 'sample 4 (' in message
