"""Training, resuming and testing through the tools."""

from __future__ import annotations

import os
import pickle
import re

import numpy as np
import pytest
import torch
from tool_runs import (
    SIZE,
    TOOLS,
    assert_same_weights,
    call,
    call_failing,
    kill_after,
    run,
    weights,
    write_config,
)

from vheat_mm.apis.train_test import run_testing, run_training

cv2 = pytest.importorskip('cv2')


def test_resumed_detector_equals_uninterrupted(detector):
    """Epoch-based, two processes, data-loader workers, no seed in the config."""
    killed = kill_after(detector / 'run', 'epoch_1.pth', detector / 'killed')
    done = run(TOOLS / 'dist_train.sh', 'detection.py', 2, '--work-dir', 'killed', '--resume', cwd=detector)
    assert 'resumed epoch: 1, iter: 2' in done.stdout + done.stderr
    assert_same_weights(killed / 'epoch_2.pth', detector / 'run' / 'epoch_2.pth')
    assert_same_weights(killed / 'epoch_2.pth', killed / 'epoch_1.pth', differs=True)


def test_resumed_segmentor_equals_uninterrupted(segmentor):
    """Iteration-based, no data-loader workers, from a named checkpoint; the weights of init_cfg are gone."""
    killed = kill_after(segmentor / 'run', 'iter_2.pth', segmentor / 'killed')
    options = ('--work-dir', 'again', '--resume', killed / 'iter_2.pth', '--auto-scale-lr')
    init_cfg = 'model.backbone.init_cfg=dict(type="Pretrained",checkpoint="gone.pth")'
    call(run_training, 'segmentation.py', *options, '--cfg-options', init_cfg, cwd=segmentor)
    assert 'has all weights: gone.pth' in next((segmentor / 'again').rglob('*.log')).read_text()
    assert_same_weights(segmentor / 'again' / 'iter_4.pth', segmentor / 'run' / 'iter_4.pth')


def test_resumed_classifier_equals_uninterrupted(classifier):
    """With a moving average of the weights."""
    killed = kill_after(classifier / 'work_dirs' / 'classification', 'epoch_1.pth', classifier / 'killed')
    call(run_training, 'classification.py', '--work-dir', 'killed', '--resume', cwd=classifier)
    finished = classifier / 'work_dirs' / 'classification' / 'epoch_2.pth'
    assert any(key.startswith('ema ') for key in weights(finished))
    assert_same_weights(killed / 'epoch_2.pth', finished)


def test_dist_test_draws_and_dumps_every_image(detector):
    """Two processes draw their images into one folder and write one file of predictions."""
    options = ('--work-dir', 'test', '--show-dir', 'pictures', '--out', 'predictions.pkl')
    done = run(TOOLS / 'dist_test.sh', 'detection.py', 'run/epoch_2.pth', 2, *options, cwd=detector)
    assert 'segm_mAP' in done.stdout + done.stderr
    pictures = sorted(path.name for path in (detector / 'pictures').iterdir())
    assert pictures == [f'{i}.png' for i in range(6)]
    assert cv2.imread(str(detector / 'pictures' / '5.png')).shape == (SIZE, 2 * SIZE, 3)  # truth, prediction
    predictions = pickle.loads((detector / 'predictions.pkl').read_bytes())
    assert sorted(p['img_id'] for p in predictions) == list(range(6))
    assert all('masks' in p['pred_instances'] for p in predictions)


def test_segmentor_test_with_and_without_tta(segmentor, capfd):
    """Label maps as files; test-time augmentation changes them. The first run is a command."""
    common = ('segmentation.py', 'run/iter_4.pth', '--work-dir', 'test')
    done = run(TOOLS / 'test.py', *common, '--out', 'plain', '--show-dir', 'pictures', cwd=segmentor)
    # Without the config's own views, those of the test pipeline.
    call(run_testing, *common, '--out', 'tta', '--tta', '--cfg-options', 'tta_pipeline=None', cwd=segmentor)
    maps = {}
    for name, output in (('plain', done.stdout), ('tta', capfd.readouterr().out)):
        assert 'mIoU' in output
        maps[name] = np.stack([cv2.imread(str(segmentor / name / f'{i}.png'), 0) for i in range(6)])
        assert maps[name].shape == (6, SIZE, SIZE)
        assert maps[name].max() <= 2
    assert (maps['plain'] != maps['tta']).any()
    assert len(list((segmentor / 'pictures').glob('*.png'))) == 6


def test_classifier_test(classifier):
    checkpoint = 'work_dirs/classification/epoch_2.pth'
    test = (run_testing, 'classification.py', checkpoint)
    call(*test, '--out', 'plain.pkl', '--show-dir', 'pic', cwd=classifier)
    call(*test, '--out', 'tta.pkl', '--tta', '--show-dir', 'tta_pic', cwd=classifier)
    assert len(list((classifier / 'tta_pic').rglob('*.png'))) == 6
    plain, tta = (pickle.loads((classifier / f'{name}.pkl').read_bytes()) for name in ('plain', 'tta'))
    assert len(plain) == len(tta) == 6
    names = sorted(str(path.relative_to(classifier / 'pic')) for path in (classifier / 'pic').rglob('*.png'))
    assert names == ['box/0.png', 'box/2.png', 'box/4.png', 'disc/1.png', 'disc/3.png', 'disc/5.png']
    # the EMAHook of the config must not replace the weights in a test
    call(*test, '--out', 'bare.pkl', '--tta', '--cfg-options', 'custom_hooks=[]', cwd=classifier)
    for ours, expected in zip(tta, pickle.loads((classifier / 'bare.pkl').read_bytes()), strict=True):
        assert torch.equal(ours['pred_score'], expected['pred_score'])


def test_fine_tuning_takes_the_backbone_of_another_task(detector, segmentor, tmp_path, capfd):
    """Other heads, a complete backbone, and frequency embeddings of another grid."""
    load = f'load_from={segmentor}/run/iter_4.pth'
    size = 'model.backbone.img_size=96'
    once = ['train_cfg.max_epochs=1', 'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
    options = ('--work-dir', tmp_path, '--cfg-options', load, size, *once, 'train_dataloader.num_workers=0')
    call(run_training, 'detection.py', *options, cwd=detector)
    log = capfd.readouterr().out
    assert 'resized, pad (4): backbone.freq_embed.0 16x16x8 -> 24x24x8' in log
    assert re.search(r'not of this model, dropped \(\d+\): decode_head', log)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ('ran',)


@pytest.mark.parametrize('way', ['test', 'load_from', 'resume'])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, data, capfd, way):
    """Also by loaders of MMEngine's forks, which load without restrictions what the safe loader refuses."""
    write_config(tmp_path, 'segmentation', data)
    torch.save(dict(state_dict={'x': torch.ones(2)}, meta=Hostile()), tmp_path / 'bad.pth')
    options = dict(test=['bad.pth'], load_from=['--cfg-options', 'load_from=bad.pth'], resume=['--resume', 'bad.pth'])
    tool = run_testing if way == 'test' else run_training
    message = call_failing(capfd, tool, 'segmentation.py', *options[way], cwd=tmp_path)
    assert 'bad.pth' in message
    assert 'mkdir' in message
    assert not (tmp_path / 'ran').exists()


def test_tta_of_masks(detector, capfd):
    """The default views, with a config that defines none: masks in the predictions and in the score."""
    flags = ('--tta', '--out', 'tta.pkl', '--show-dir', 'tta_images')
    call(run_testing, 'detection.py', 'run/epoch_2.pth', *flags, cwd=detector)
    assert 'segm_mAP' in capfd.readouterr().out
    results = pickle.loads((detector / 'tta.pkl').read_bytes())
    assert any(len(result['pred_instances']['masks']) for result in results)
    assert len(list((detector / 'tta_images').iterdir())) == len(results)


def test_tta_of_views_without_metadata(detector, capfd):
    pack = "dict(type='PackDetInputs',meta_keys=('img_id','img_path','ori_shape','img_shape','scale_factor'))"
    config = f"""_base_ = ['detection.py']
tta_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='TestTimeAug', transforms=[[dict(type='RandomFlip', prob=1.0)], [{pack}]])]
"""
    (detector / 'no_flip.py').write_text(config)
    message = call_failing(capfd, run_testing, 'no_flip.py', 'run/epoch_2.pth', '--tta', cwd=detector)
    assert 'lacks flip' in message
    assert 'meta_keys' in message


def test_tta_of_boxes(detector, tmp_path, capfd):
    """The default views, for a detector without masks."""
    box_only = ['model.roi_head.mask_head=None', 'model.roi_head.mask_roi_extractor=None', 'model.type=FasterRCNN']
    state = weights(detector / 'run' / 'epoch_2.pth')
    torch.save(dict(state_dict={k: v for k, v in state.items() if 'mask_head' not in k}), tmp_path / 'boxes.pth')
    options = ['--work-dir', tmp_path, '--tta', '--cfg-options', *box_only, 'test_evaluator.metric=bbox']
    call(run_testing, 'detection.py', tmp_path / 'boxes.pth', *options, cwd=detector)
    assert 'bbox_mAP' in capfd.readouterr().out


def test_amp_on_the_cpu(segmentor, detector, tmp_path, capfd):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    call(run_training, 'segmentation.py', '--amp', '--work-dir', tmp_path, cwd=segmentor)
    assert "type='CPUAmpOptimWrapper'" in capfd.readouterr().out
    assert_same_weights(tmp_path / 'iter_4.pth', segmentor / 'run' / 'iter_4.pth', differs=True)
    assert 'bfloat16' in call_failing(capfd, run_training, 'detection.py', '--amp', cwd=detector)
