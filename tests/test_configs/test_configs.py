"""Every published config parses, builds, has the release's keys and the recipe's settings, and takes a step."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from config_models import CONFIGS, load, task
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from stand_ins import released_state, write_release

import interpolate4downstream
from vheat_mm.utils.torchvision import ensure_torchvision

mmdet = pytest.importorskip('mmdet')
mmseg = pytest.importorskip('mmseg')
ensure_torchvision()
mmpretrain = pytest.importorskip('mmpretrain')

DATA = Path(__file__).parents[1] / 'data'
# config -> (arch, drop path, images per GPU), as in the published recipes
RECIPES = {
    'detection/mask-rcnn_vheat-t_fpn_1x_coco.py': ('tiny', 0.1, 2),
    'detection/mask-rcnn_vheat-s_fpn_1x_coco.py': ('small', 0.3, 2),
    'detection/mask-rcnn_vheat-b_fpn_1x_coco.py': ('base', 0.5, 2),
    'detection/mask-rcnn_vheat-t_fpn_ms-crop-3x_coco.py': ('tiny', 0.2, 2),
    'detection/mask-rcnn_vheat-s_fpn_ms-crop-3x_coco.py': ('small', 0.4, 2),
    'segmentation/vheat-t_upernet_8xb2-160k_ade20k-512x512.py': ('tiny', 0.3, 2),
    'segmentation/vheat-s_upernet_8xb2-160k_ade20k-512x512.py': ('small', 0.4, 2),
    'segmentation/vheat-b_upernet_8xb2-160k_ade20k-512x512.py': ('base', 0.5, 2),
    'classification/vheat-t_16xb128_in1k.py': ('tiny', 0.1, 128),
    'classification/vheat-s_16xb128_in1k.py': ('small', 0.3, 128),
    'classification/vheat-b_16xb128_in1k.py': ('base', 0.5, 128),
}
# Swin's configs, each with the vHeat config from which it differs in the backbone only
BASELINES = {
    f'{task}/{name.format(f"swin-{size}")}.py': f'{task}/{name.format(f"vheat-{size}")}.py'
    for task, name, sizes in (
        ('detection', 'mask-rcnn_{}_fpn_1x_coco', 'tsb'),
        ('detection', 'mask-rcnn_{}_fpn_ms-crop-3x_coco', 'ts'),
        ('segmentation', '{}_upernet_8xb2-160k_ade20k-512x512', 'tsb'),
    )
    for size in sizes
}
# mmpretrain's own, whose recipe is not vHeat's
SWIN_CLASSIFIERS = {f'classification/swin-{size}_16xb64_in1k.py' for size in 'tsb'}
# Plain variables that came with the bases: once a config is read, nothing looks at them.
VARIABLES = {'vheat', 'pretrained', 'checkpoint', 'checkpoint_file'}
# Swin's rules in the paramwise_cfg that ours inherit; vHeat has no such parameters.
RULES_OF_SWIN = {'absolute_pos_embed', 'relative_position_bias_table'}
SWIN = {
    'detection': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'segmentation': 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'classification': 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
}


pytestmark = pytest.mark.usefixtures('own_scope')


def test_every_leaf_config_is_in_the_table():
    leaves = {str(p.relative_to(CONFIGS)) for t in SWIN for p in (CONFIGS / t).glob('*.py')}
    from test_heads import HEADS

    assert leaves == set(RECIPES) | set(BASELINES) | set(HEADS) | SWIN_CLASSIFIERS


@pytest.mark.parametrize('name', sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob('[!_d]*/*vheat*.py')))
def test_starts_from_the_released_classifier_of_its_size(name):
    cfg = load(name)
    backbone = cfg.model.backbone
    given = [cfg.get('load_from'), backbone.get('init_cfg')]
    initial = dict(type='Pretrained', checkpoint=f'vheat_{backbone.arch}')
    if task(name) == 'classification':
        assert given == [f'vheat_{backbone.arch}' if '384px' in name else None, None]
    else:
        assert given == [None, initial]


@pytest.mark.parametrize(
    'name',
    ['detection/mask-rcnn_vheat-t_fpn_1x_coco.py', 'segmentation/vheat-b_upernet_8xb2-160k_ade20k-512x512.py'],
)
def test_loading_by_name_equals_the_resize_tool(name, tmp_path, monkeypatch):
    cfg = load(name).model.backbone
    released = cfg.init_cfg.checkpoint
    monkeypatch.setenv('VHEAT_WEIGHTS', str(write_release(tmp_path, [released])))
    resized = str(tmp_path / 'resized.pth')
    assert interpolate4downstream.main(['--pt_pth', released, '--tg_pth', resized, '--tg_size', '512']) == 0
    by_name, by_hand = MODELS.build(cfg), MODELS.build(cfg | dict(init_cfg=dict(type='Pretrained', checkpoint=resized)))
    for model in (by_name, by_hand):
        model.init_weights()
    given = released_state(released)
    for key, value in by_name.state_dict().items():
        assert torch.equal(value, by_hand.state_dict()[key]), key
        if key.startswith('freq_embed'):
            height, width, _ = given[key].shape
            assert value.shape[:2] == (-(-height * 512 // 224), -(-width * 512 // 224))
            assert torch.equal(value[:height, :width], given[key])
            assert value[height:].count_nonzero() == value[:, width:].count_nonzero() == 0


@pytest.mark.parametrize('name', BASELINES)
def test_baseline_differs_in_the_backbone_only(name):
    baseline, ours = (load(config).to_dict() for config in (name, BASELINES[name]))
    swin, vheat = (cfg['model'].pop('backbone') for cfg in (baseline, ours))
    assert (swin['type'], vheat['type']) == ('SwinTransformer', 'VHeat')
    for cfg in (baseline, ours):
        for variable in VARIABLES:
            cfg.pop(variable, None)
    assert baseline.keys() == ours.keys()
    for key, value in baseline.items():
        assert value == ours[key], key


@pytest.mark.parametrize('name', BASELINES)
def test_baseline_is_swin_as_published(name):
    """Size, weights and stochastic depth; outputs as wide as the head expects."""
    cfg = load(name)
    assert len((CONFIGS / name).read_text().splitlines()) <= 15
    backbone = cfg.model.backbone
    size = dict(tiny=('tiny', 96, 6), small=('small', 96, 18), base=('base', 128, 18))[RECIPES[BASELINES[name]][0]]
    assert f'swin_{size[0]}_patch4_window7_224' in backbone.init_cfg.checkpoint
    assert (backbone.embed_dims, backbone.depths, backbone.window_size) == (size[1], [2, 2, size[2], 2], 7)
    assert backbone.drop_path_rate == (0.3 if task(name) == 'segmentation' or size[0] == 'base' else 0.2)
    head = cfg.model.neck if task(name) == 'detection' else cfg.model.decode_head
    assert head.in_channels == MODELS.build(backbone).num_features


def grid(name: str) -> int:
    """Image size of the frequency value embeddings in the released checkpoint."""
    return 224 if Path(name).stem == 'mask-rcnn_vheat-t_fpn_ms-crop-3x_coco' else 512


@pytest.mark.parametrize('name', RECIPES)
def test_recipe(name):
    arch, drop_path, batch = RECIPES[name]
    cfg = load(name)
    assert len((CONFIGS / name).read_text().splitlines()) <= 25
    assert cfg.custom_imports == dict(imports=['vheat_mm'], allow_failed_imports=False)
    assert (cfg.model.backbone.type, cfg.model.backbone.arch) == ('VHeat', arch)
    assert cfg.model.backbone.drop_path_rate == drop_path
    assert cfg.train_dataloader.batch_size == batch
    optimizer = cfg.optim_wrapper.optimizer
    if task(name) == 'detection':
        epochs = 36 if '3x' in name else 12
        milestones = [27, 33] if '3x' in name else [8, 11]
        assert cfg.train_cfg.max_epochs == epochs
        assert cfg.param_scheduler[0].end == 1000
        assert cfg.param_scheduler[1].milestones == milestones
        assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-4, 0.05)
        assert cfg.model.backbone.img_size == grid(name)
        assert ('RandomCrop' in str(cfg.train_dataloader)) == ('3x' in name)
        assert cfg.auto_scale_lr.base_batch_size == 16
    elif task(name) == 'segmentation':
        assert cfg.train_cfg.max_iters == 160000
        assert [s.type for s in cfg.param_scheduler] == ['LinearLR', 'PolyLR']
        assert cfg.param_scheduler[0].end == 1500
        assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 6e-5, 0.01)
        assert cfg.model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
        assert cfg.model.backbone.img_size == 512
        assert cfg.tta_model.type == 'SegTTAModel'
    else:
        assert cfg.train_cfg.max_epochs == 300
        assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 2e-3, 0.08)
        warmup, cosine = cfg.param_scheduler
        assert (warmup.end, cosine.type, cosine.eta_min) == (20, 'CosineAnnealingLR', pytest.approx(2e-5))
        assert cfg.optim_wrapper.clip_grad.max_norm == 5.0
        assert cfg.model.head.loss.label_smooth_val == 0.1
        assert {a.type: a.alpha for a in cfg.model.train_cfg.augments} == dict(Mixup=0.8, CutMix=1.0)
        ema = [hook for hook in cfg.custom_hooks if hook.type == 'EMAHook']
        assert len(ema) == 1
        assert ema[0].momentum == pytest.approx(1e-4)
        assert cfg.auto_scale_lr.base_batch_size == 16 * 128


@cache
def swin_head_keys(task_name: str) -> set[str]:
    keys = MODELS.build(get_config(SWIN[task_name]).model).state_dict()
    return {key for key in keys if not key.startswith('backbone.')}


@pytest.mark.parametrize('name', RECIPES)
def test_state_dict_and_weight_decay_groups(name):
    """Keys and shapes are the release's, which had the Swin baseline's heads; each rule of ours finds parameters."""
    cfg = load(name)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    released = json.loads((DATA / f'state_dict_{RECIPES[name][0]}.json').read_text())
    if task(name) == 'classification':
        spelled = {'outnorm3': 'classifier.0', 'head.fc': 'classifier.3'}
        ours = {key.removeprefix('backbone.'): value for key, value in shapes.items()}
        for mine, theirs in spelled.items():
            ours = {key.replace(mine, theirs): value for key, value in ours.items()}
        assert ours == released['classifier_224']
    else:
        backbone = {k.removeprefix('backbone.'): v for k, v in shapes.items() if k.startswith('backbone.')}
        for i in range(4):
            released['backbone_512'][f'freq_embed.{i}'][:2] = 2 * [grid(name) // 4 >> i]
        assert backbone == released['backbone_512']
    heads = {key for key in shapes if not key.startswith('backbone.')}
    assert heads == swin_head_keys(task(name))

    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decays = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    default = cfg.optim_wrapper.optimizer.weight_decay
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        free = parameter.ndim == 1 if task(name) == 'classification' else 'norm' in key
        assert decays[id(parameter)] == (0 if free else default), key
    rules = cfg.optim_wrapper.paramwise_cfg.get('custom_keys', {})
    unused = {key for key in rules if not any(key in parameter for parameter, _ in model.named_parameters())}
    assert unused == (set() if task(name) == 'classification' else RULES_OF_SWIN)
