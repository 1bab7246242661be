"""Training, resuming and testing through the tools."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tool_runs import (
    SIZE,
    TOOLS,
    assert_same_weights,
    in_process,
    kill_after,
    run,
    weights,
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
    """Iteration-based, one process that loads its own data, checkpoint named."""
    killed = kill_after(segmentor / 'run', 'iter_2.pth', segmentor / 'killed')
    options = ('--work-dir', 'again', '--resume', killed / 'iter_2.pth', '--auto-scale-lr')
    run(TOOLS / 'train.py', 'segmentation.py', *options, cwd=segmentor)
    assert_same_weights(segmentor / 'again' / 'iter_4.pth', segmentor / 'run' / 'iter_4.pth')


def test_resumed_classifier_equals_uninterrupted(classifier):
    """With a moving average of the weights."""
    killed = kill_after(classifier / 'work_dirs' / 'classification', 'epoch_1.pth', classifier / 'killed')
    run(TOOLS / 'train.py', 'classification.py', '--work-dir', 'killed', '--resume', cwd=classifier)
    finished = classifier / 'work_dirs' / 'classification' / 'epoch_2.pth'
    assert any(key.startswith('ema ') for key in weights(finished))
    assert_same_weights(killed / 'epoch_2.pth', finished)


def test_dist_test_paints_and_dumps_every_image(detector):
    """Two processes: the pictures of both, exactly in the folder; one file with all predictions."""
    options = ('--work-dir', 'test', '--show-dir', 'pictures', '--out', 'predictions.pkl')
    done = run(TOOLS / 'dist_test.sh', 'detection.py', 'run/epoch_2.pth', 2, *options, cwd=detector)
    assert 'segm_mAP' in done.stdout + done.stderr
    pictures = sorted(path.name for path in (detector / 'pictures').iterdir())
    assert pictures == [f'{i}.png' for i in range(6)]
    assert cv2.imread(str(detector / 'pictures' / '5.png')).shape == (SIZE, 2 * SIZE, 3)  # truth, prediction
    predictions = pickle.loads((detector / 'predictions.pkl').read_bytes())
    assert sorted(p['img_id'] for p in predictions) == list(range(6))
    assert all('masks' in p['pred_instances'] for p in predictions)


def test_segmentor_test_with_and_without_tta(segmentor):
    """Label maps as files; test-time augmentation gives other ones."""
    maps = {}
    for name, flags in (('plain', ['--show-dir', 'pictures']), ('tta', ['--tta'])):
        done = run(
            *(TOOLS / 'test.py', 'segmentation.py', 'run/iter_4.pth', '--work-dir', 'test', '--out', name, *flags),
            cwd=segmentor,
        )
        assert 'mIoU' in done.stdout + done.stderr
        maps[name] = np.stack([cv2.imread(str(segmentor / name / f'{i}.png'), 0) for i in range(6)])
        assert maps[name].shape == (6, SIZE, SIZE)
        assert maps[name].max() <= 2
    assert (maps['plain'] != maps['tta']).any()
    assert len(list((segmentor / 'pictures').glob('*.png'))) == 6


def test_classifier_test(classifier):
    checkpoint = 'work_dirs/classification/epoch_2.pth'
    run(TOOLS / 'test.py', 'classification.py', checkpoint, '--out', 'plain.pkl', '--show-dir', 'pic', cwd=classifier)
    run(TOOLS / 'test.py', 'classification.py', checkpoint, '--out', 'tta.pkl', '--tta', cwd=classifier)
    plain, tta = (pickle.loads((classifier / f'{name}.pkl').read_bytes()) for name in ('plain', 'tta'))
    assert len(plain) == len(tta) == 6
    assert len(list((classifier / 'pic').iterdir())) == 6
    # the config's EMAHook, made for training, must not replace the weights
    bare = (checkpoint, '--out', 'bare.pkl', '--tta', '--cfg-options', 'custom_hooks=[]')
    run(TOOLS / 'test.py', 'classification.py', *bare, cwd=classifier)
    for ours, expected in zip(tta, pickle.loads((classifier / 'bare.pkl').read_bytes()), strict=True):
        assert torch.equal(ours['pred_score'], expected['pred_score'])


def test_fine_tuning_takes_the_backbone_of_another_task(detector, segmentor, tmp_path):
    """Heads differ, the backbone is complete, and its embeddings are of another grid."""
    load = f'load_from={segmentor}/run/iter_4.pth'
    size = 'model.backbone.img_size=96'
    once = ['train_cfg.max_epochs=1', 'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']
    done = run(
        *(TOOLS / 'train.py', 'detection.py', '--work-dir', tmp_path, '--cfg-options', load, size, *once), cwd=detector
    )
    log = done.stdout + done.stderr
    assert 'resized: backbone.freq_embed.0 16x16x8 instead of 24x24x8' in log
    assert 'not of this model, dropped: decode_head' in log


def test_tta_of_masks(detector):
    """Without a word of it in the config: flips and scales, masks in the predictions and in the score."""
    flags = ('--tta', '--out', 'tta.pkl', '--show-dir', 'tta_painted')
    log = run(TOOLS / 'test.py', 'detection.py', detector / 'run' / 'epoch_2.pth', *flags, cwd=detector).stdout
    assert 'segm_mAP' in log
    results = pickle.loads((detector / 'tta.pkl').read_bytes())
    assert any(len(result['pred_instances']['masks']) for result in results)
    assert len(list((detector / 'tta_painted').iterdir())) == len(results)


def test_tta_of_views_without_metadata(detector, monkeypatch, capfd):
    monkeypatch.chdir(detector)
    pack = "dict(type='PackDetInputs',meta_keys=('img_id','img_path','ori_shape','img_shape','scale_factor'))"
    config = f"""_base_ = ['detection.py']
tta_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(type='TestTimeAug', transforms=[[dict(type='RandomFlip', prob=1.0)], [{pack}]])]
"""
    Path('no_flip.py').write_text(config)
    message = in_process(capfd, run_testing, 'no_flip.py', 'run/epoch_2.pth', '--tta')
    assert 'comes without flip' in message
    assert 'meta_keys' in message


def test_tta_of_boxes(detector, tmp_path):
    """A detector without masks, whose config says nothing of test-time augmentation."""
    box_only = ['model.roi_head.mask_head=None', 'model.roi_head.mask_roi_extractor=None', 'model.type=FasterRCNN']
    state = weights(detector / 'run' / 'epoch_2.pth')
    torch.save(dict(state_dict={k: v for k, v in state.items() if 'mask_head' not in k}), tmp_path / 'boxes.pth')
    options = ['--tta', '--cfg-options', *box_only, 'test_evaluator.metric=bbox']
    command = (TOOLS / 'test.py', 'detection.py', tmp_path / 'boxes.pth', '--work-dir', tmp_path, *options)
    assert 'bbox_mAP' in run(*command, cwd=detector).stdout


def test_amp_on_the_cpu(segmentor, detector, tmp_path, monkeypatch, capfd):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    done = run(TOOLS / 'train.py', 'segmentation.py', '--amp', '--work-dir', tmp_path, cwd=segmentor)
    assert "type='CPUAmpOptimWrapper'" in done.stdout
    assert_same_weights(tmp_path / 'iter_4.pth', segmentor / 'run' / 'iter_4.pth', differs=True)
    monkeypatch.chdir(detector)
    assert 'bfloat16' in in_process(capfd, run_training, 'detection.py', '--amp')
