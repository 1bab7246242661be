"""The tools as users run them: as commands, on tiny data made on the spot."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger

from vheat_mm.launch import run_testing, run_training, safe_io

cv2 = pytest.importorskip('cv2')
safe_io.install()  # lets torch.load read MMEngine's checkpoints
REPO = Path(__file__).resolve().parents[1]
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
    + 'default_hooks.update(checkpoint=dict(interval=2))'
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


def write_config(folder: Path, task: str, data: Path, extra: str = '') -> Path:
    path = folder / f'{task}.py'
    text = TASKS[task].replace('{repo!r}', repr(str(REPO))).replace('{data!r}', repr(str(data)))
    path.write_text(text + '\n' + extra)
    return path


def run(*command: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run a tool from ``cwd``, away from the repository, without the package on the path."""
    names = [str(part) for part in command]
    if names[0].endswith('.py'):
        names.insert(0, sys.executable)
    env = {key: value for key, value in os.environ.items() if not key.startswith(('OMP_', 'SLURM_', 'VHEAT_'))}
    env.update(PYTHON=sys.executable, **environment)
    done = subprocess.run(names, cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False)
    if check and done.returncode:
        pytest.fail(f'{" ".join(names)}\nended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}')
    return done


def assert_message(done: subprocess.CompletedProcess, *words: str) -> None:
    """The tool ended with one message on stderr that holds ``words``, and without a traceback."""
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
    """A work dir as a run leaves it that was killed right after writing ``checkpoint``."""
    target.mkdir()
    (target / checkpoint).write_bytes((work_dir / checkpoint).read_bytes())
    (target / 'last_checkpoint').write_text(str(target / checkpoint))
    return target


@pytest.fixture(scope='session')
def detector(tmp_path_factory, data) -> Path:
    """Folder of a Mask R-CNN trained for two epochs by two processes."""
    pytest.importorskip('mmdet')
    folder = tmp_path_factory.mktemp('detector')
    write_config(folder, 'detection', data)
    run(TOOLS / 'dist_train.sh', 'detection.py', 2, '--work-dir', 'run', cwd=folder)
    return folder


@pytest.fixture(scope='session')
def segmentor(tmp_path_factory, data) -> Path:
    """Folder of a UPerNet trained for four iterations by one process."""
    pytest.importorskip('mmseg')
    folder = tmp_path_factory.mktemp('segmentor')
    write_config(folder, 'segmentation', data)
    run(TOOLS / 'train.py', 'segmentation.py', '--work-dir', 'run', '--auto-scale-lr', cwd=folder)
    return folder


@pytest.fixture(scope='session')
def classifier(tmp_path_factory, data) -> Path:
    """Folder of a classifier with EMA trained for two epochs by one process, in the default work dir."""
    pytest.importorskip('mmpretrain')
    folder = tmp_path_factory.mktemp('classifier')
    write_config(folder, 'classification', data)
    run(TOOLS / 'train.py', 'classification.py', cwd=folder)
    return folder


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


def in_process(capfd, tool, *arguments: object) -> str:
    """Run a tool that must end during set-up, within this process; returns its one message."""
    MMLogger._instance_dict.clear()  # those of earlier calls write to streams that pytest has closed
    status = tool([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    assert_message(subprocess.CompletedProcess(arguments, status, captured.out, captured.err))
    return captured.err[captured.err.index('error: ') :]


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
    ],
)
def test_bad_settings(tmp_path, data, monkeypatch, capfd, options, words):
    pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, 'detection', data)
    message = in_process(capfd, run_training, 'detection.py', '--cfg-options', *options)
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
    message = in_process(capfd, run_training, 'detection.py', '--cfg-options', option)
    assert 'annotation 5 of image 2 has category_id=9' in message


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (None, ['bad.py', 'working directory']),
        ('model = dict(\n', ['bad.py', 'SyntaxError']),
        ("_base_ = 'nowhere.py'\n", ['bad.py', 'nowhere.py']),
        ("custom_imports = dict(imports=['no_such_module'])\n", ['bad.py', 'no_such_module']),
        ("default_scope = 'mmdet'\n", ['bad.py', 'model']),
    ],
)
def test_bad_config(tmp_path, monkeypatch, capfd, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / 'bad.py').write_text(text)
    message = in_process(capfd, run_training, 'bad.py')
    for word in words:
        assert word in message


def test_bad_checkpoint(detector, segmentor, monkeypatch, capfd):
    """Missing, truncated, of code, of another width, of another task, without training state; for all uses."""
    monkeypatch.chdir(detector)
    good = (detector / 'run' / 'epoch_2.pth').read_bytes()
    Path('truncated.pth').write_bytes(good[: len(good) // 2])
    Path('code.pth').write_bytes(pickle.dumps(dict(state_dict=Exploit())))
    torch.save(dict(state_dict=weights(Path('run/epoch_2.pth'))), 'weights.pth')
    uses = (run_testing, []), (run_training, ['--resume'])
    for name, word in (('none.pth', 'none.pth'), ('truncated.pth', 'truncated'), ('code.pth', 'touch')):
        for tool, flag in uses:
            message = in_process(capfd, tool, 'detection.py', *flag, name)
            assert name in message
            assert word in message or 'code' in message
    assert not Path('touched').exists()
    assert 'training state' in in_process(capfd, run_training, 'detection.py', '--resume', 'weights.pth')
    wider = ['--cfg-options', 'model.backbone.arch.embed_dims=16', 'model.neck.in_channels=[16,32,64,128]']
    message = in_process(capfd, run_testing, 'detection.py', 'run/epoch_2.pth', *wider)
    assert 'width 8' in message
    assert 'width 16' in message
    other_task = segmentor / 'run' / 'iter_4.pth'
    assert 'decode_head' in in_process(capfd, run_testing, 'detection.py', other_task)


class Exploit:
    def __reduce__(self):
        return os.system, ('touch touched',)


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


def test_flags_that_do_not_fit(detector, segmentor, monkeypatch, capfd):
    monkeypatch.chdir(detector)
    test = ('detection.py', 'run/epoch_2.pth')
    assert '.pkl' in in_process(capfd, run_testing, *test, '--out', 'results.json')
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    assert '--show-dir' in in_process(capfd, run_testing, *test, '--show')
    assert 'dist_' in in_process(capfd, run_testing, *test, '--launcher', 'pytorch')
    no_base = ['--auto-scale-lr', '--cfg-options', 'auto_scale_lr=None']
    assert 'base_batch_size' in in_process(capfd, run_training, 'detection.py', *no_base)
    assert 'no tta_pipeline' in in_process(
        *(capfd, run_testing, segmentor / 'segmentation.py', segmentor / 'run' / 'iter_4.pth', '--tta'),
        *('--cfg-options', 'tta_pipeline=None'),
    )
    with pytest.raises(SystemExit, match='2'):
        run_training(['detection.py', '--cfg-options', 'model.backbone.img_size'])
    assert 'KEY=VALUE' in capfd.readouterr().err


def test_full_disk_leaves_earlier_checkpoints(classifier):
    """A file limit stands for the full disk: the first checkpoint fits, the larger second one does not."""
    killed = kill_after(classifier / 'work_dirs' / 'classification', 'epoch_1.pth', classifier / 'full')
    before = (killed / 'epoch_1.pth').read_bytes()
    limit = len(before) // 2048  # ulimit counts KiB
    command = f'ulimit -f {limit} && "$PYTHON" "{TOOLS}/train.py" classification.py --work-dir full --resume'
    done = run('bash', '-c', command, cwd=classifier, check=False)
    assert_message(done, 'epoch_2.pth', 'too large')
    assert (killed / 'epoch_1.pth').read_bytes() == before
    assert [path.name for path in killed.glob('*epoch*')] == ['epoch_1.pth']


def test_failure_of_many_processes_is_told_once(tmp_path):
    done = run(TOOLS / 'dist_train.sh', 'none.py', 3, cwd=tmp_path, check=False)
    assert_message(done, 'none.py')
    assert list(tmp_path.iterdir()) == []


def test_amp_on_the_cpu(segmentor, detector, tmp_path, monkeypatch, capfd):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    done = run(TOOLS / 'train.py', 'segmentation.py', '--amp', '--work-dir', tmp_path, cwd=segmentor)
    assert "type='CPUAmpOptimWrapper'" in done.stdout
    assert_same_weights(tmp_path / 'iter_4.pth', segmentor / 'run' / 'iter_4.pth', differs=True)
    monkeypatch.chdir(detector)
    assert 'bfloat16' in in_process(capfd, run_training, 'detection.py', '--amp')


@pytest.mark.parametrize(
    ('script', 'arguments'),
    [
        ('dist_train.sh', ['a.py']),
        ('dist_train.sh', ['a.py', 'two']),
        ('dist_test.sh', ['a.py', 'a.pth']),
        ('slurm_train.sh', ['gpu', 'job']),
        ('slurm_test.sh', ['gpu', 'job', 'a.py']),
    ],
)
def test_scripts_explain_their_use(tmp_path, script, arguments):
    done = run(TOOLS / script, *arguments, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('usage: ')


@pytest.mark.parametrize(
    ('environment', 'word'),
    [(dict(NNODES='2'), 'MASTER_ADDR'), (dict(NODE_RANK='1'), 'NODE_RANK'), (dict(PORT='http'), 'PORT')],
)
def test_bad_description_of_machines(tmp_path, environment, word):
    done = run(TOOLS / 'dist_train.sh', 'a.py', 1, cwd=tmp_path, check=False, **environment)
    assert_message(done, word)


def test_two_nodes_on_one_machine(segmentor, tmp_path):
    """Each start stands for a machine; together they are two processes."""
    port = subprocess.run(
        [
            sys.executable,
            '-c',
            f'import sys; sys.path.insert(0, {str(TOOLS)!r}); import dist_run as d; print(d.free_port())',
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    env = {**os.environ, 'PYTHON': sys.executable, 'NNODES': '2', 'MASTER_ADDR': '127.0.0.1', 'PORT': port}
    command = [TOOLS / 'dist_test.sh', 'segmentation.py', 'run/iter_4.pth', '1', '--work-dir', tmp_path]
    nodes = [
        subprocess.Popen(command, cwd=segmentor, env={**env, 'NODE_RANK': str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert '2 processes joined by gloo' in outputs[0]


FAKE_SRUN = """#!/usr/bin/env bash
# Stands for Slurm: notes its options, then starts the tasks that they ask for.
printf '%s\n' "$@" > srun_arguments
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    shift
done
export SLURM_NTASKS=$tasks SLURM_NODELIST=localhost MASTER_ADDR=127.0.0.1
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
"""


def test_slurm_scripts(segmentor, tmp_path):
    (tmp_path / 'srun').write_text(FAKE_SRUN)
    (tmp_path / 'srun').chmod(0o755)
    slurm = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', GPUS='2', SRUN_ARGS='--gres=none --quiet')
    script = (TOOLS / 'slurm_test.sh', 'part', 'job', segmentor / 'segmentation.py', segmentor / 'run' / 'iter_4.pth')
    done = run(*script, '--work-dir', 'test', cwd=tmp_path, **slurm)
    assert '2 processes joined by gloo' in done.stdout
    assert 'mIoU' in done.stdout
    options = (tmp_path / 'srun_arguments').read_text().split('\n')
    for option in ('--partition=part', '--job-name=job', '--ntasks=2', '--ntasks-per-node=2', '--quiet'):
        assert option in options
    once = ['train_cfg.max_iters=1', 'train_cfg.val_interval=1']
    script = (TOOLS / 'slurm_train.sh', 'part', 'job', segmentor / 'segmentation.py', '--work-dir', 'train')
    run(*script, '--cfg-options', *once, cwd=tmp_path, **slurm)
    assert (tmp_path / 'train' / 'iter_1.pth').is_file()


@pytest.mark.parametrize('value', ['7', '-1'])
def test_label_outside_num_classes_is_named(tmp_path, data, value):
    """Found in the first batch, by a process that is not the first, while the other one waits for its gradients."""
    pytest.importorskip('mmdet')
    write_config(tmp_path, 'detection', data)
    code = f"""
from mmengine.registry import TRANSFORMS
@TRANSFORMS.register_module()
class Mislabel:
    def __call__(self, results):
        if results['img_path'].endswith('3.png'):
            results['gt_bboxes_labels'][:] = {value}
        return results
"""
    (tmp_path / 'mislabel.py').write_text(code)
    text = (tmp_path / 'detection.py').read_text()
    text = text.replace("dict(type='PackDetInputs'),", "dict(type='mmengine.Mislabel'), dict(type='PackDetInputs'),")
    text += "\ncustom_imports = dict(imports=['vheat_mm', 'mislabel'], allow_failed_imports=False)\n"
    (tmp_path / 'detection.py').write_text(text)
    done = run(TOOLS / 'dist_train.sh', 'detection.py', 2, cwd=tmp_path, check=False, PYTHONPATH=str(tmp_path))
    assert_message(done, '3.png', f'label {value} ', 'num_classes=2')


def test_leaving_after_gloo_runs_what_is_registered(tmp_path):
    code = """
import atexit
from vheat_mm.launch import distributed
atexit.register(print, 'registered')
distributed._gloo_used = True
distributed.leave(3)
"""
    done = run(sys.executable, '-c', code, cwd=tmp_path, check=False, PYTHONPATH=str(REPO))
    assert done.returncode == 3
    assert done.stdout == 'registered\n'


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import dist_run

    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(9)), raising=False)
    monkeypatch.setattr(os, 'environ', {})
    dist_run.share_cores(2)
    assert os.environ == dict(OMP_NUM_THREADS='4', MKL_NUM_THREADS='4')
    monkeypatch.setattr(os, 'environ', dict(OMP_NUM_THREADS='3'))
    dist_run.share_cores(2)
    assert os.environ['OMP_NUM_THREADS'] == '3'
