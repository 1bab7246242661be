"""Every head of docs/recipes.md on vHeat, at width 8: its config, its optimizer, a step; and the page's options."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from config_models import CONFIGS, batch_of, build, groups_of, load, narrow, narrow_model, task, unscoped
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from test_configs import RECIPES
from torch import nn
from torch.utils.data import Dataset

from vheat_mm import VHeat
from vheat_mm.engine.hooks import CompileBackboneHook
from vheat_mm.engine.optimizers.layer_decay import LayerDecayOptimWrapperConstructor

DOCS = Path(__file__).parents[2] / 'docs' / 'recipes.md'
# config -> (learning rate, its factor in the backbone, weight decay, backbone parameters without decay)
AS_SWIN_DET = (1e-4, 1.0, 0.05, 'norm in name')
AS_SWIN_SEG = (6e-5, 1.0, 0.01, 'norm in name')
MASK2FORMER = (1e-4, 0.1, 0.05, 'norms')
FINETUNED = (1e-5, 1.0, 1e-8, '1-D')
HEADS = {
    'detection/cascade-mask-rcnn_vheat-t_fpn_1x_coco.py': AS_SWIN_DET,
    'detection/faster-rcnn_vheat-t_fpn_1x_coco.py': AS_SWIN_DET,
    'detection/retinanet_vheat-t_fpn_1x_coco.py': AS_SWIN_DET,
    'detection/atss_vheat-t_fpn_1x_coco.py': AS_SWIN_DET,
    'detection/dino-4scale_vheat-t_8xb2-12e_coco.py': (1e-4, 0.1, 1e-4, 'none'),
    'detection/mask2former_vheat-t_8xb2-lsj-50e_coco.py': MASK2FORMER,
    'detection/mask2former_vheat-t_8xb2-lsj-50e_coco-panoptic.py': MASK2FORMER,
    'segmentation/vheat-t_mask2former_8xb2-160k_ade20k-512x512.py': MASK2FORMER,
    'segmentation/vheat-t_segformer_8xb2-160k_ade20k-512x512.py': AS_SWIN_SEG,
    'segmentation/vheat-t_fpn_8xb2-160k_ade20k-512x512.py': AS_SWIN_SEG,
    'segmentation/vheat-t_deeplabv3plus_8xb2-160k_ade20k-512x512.py': AS_SWIN_SEG,
    'classification/vheat-t_16xb64_in1k-384px.py': FINETUNED,
    'classification/vheat-s_16xb64_in1k-384px.py': FINETUNED,
    'classification/vheat-b_16xb64_in1k-384px.py': FINETUNED,
}
DETECTOR = 'detection/mask-rcnn_vheat-t_fpn_1x_coco.py'
SEGMENTOR = 'segmentation/vheat-t_fpn_8xb2-160k_ade20k-512x512.py'
UPERNET = 'segmentation/vheat-t_upernet_8xb2-160k_ade20k-512x512.py'
CLASSIFIER = 'classification/vheat-t_16xb128_in1k.py'
SGD = dict(type='SGD', lr=0.1, weight_decay=0.0)  # in proportion to the gradient, unlike AdamW
TASKS = (DETECTOR, SEGMENTOR, CLASSIFIER)


pytestmark = pytest.mark.usefixtures('own_scope', 'one_thread')


# --- heads


@pytest.mark.parametrize('name', HEADS)
def test_config(name):
    cfg = load(name)
    assert len((CONFIGS / name).read_text().splitlines()) <= 22
    assert cfg.custom_imports == dict(imports=['vheat_mm'], allow_failed_imports=False)
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch) == ('VHeat', dict(t='tiny', s='small', b='base')[name.split('vheat-')[1][0]])
    left_over = re.findall(r'resnet\w*|swin\w*|open-mmlab|torchvision:|style|norm_eval|pretrained=.\w+', str(cfg.model))
    assert not left_over
    if task(name) == 'classification':
        assert backbone.img_size == 384
        assert cfg.load_from == f'vheat_{backbone.arch}'
        assert (cfg.param_scheduler, cfg.train_cfg.max_epochs) == (None, 30)
        sizes = re.findall(r"'(?:scale|crop_size)': (\d+)", str([cfg.train_dataloader, cfg.test_dataloader]))
        assert sizes == ['384', '384']
        assert cfg.val_dataloader.dataset.pipeline == cfg.test_dataloader.dataset.pipeline
    else:
        assert backbone.img_size == 512
    assert cfg.auto_scale_lr.base_batch_size == (1024 if task(name) == 'classification' else 16)
    assert cfg.train_dataloader.batch_size == (64 if task(name) == 'classification' else 2)
    if HEADS[name] in (AS_SWIN_DET, AS_SWIN_SEG):
        reference = load(DETECTOR if HEADS[name] == AS_SWIN_DET else UPERNET)
        for field in ('param_scheduler', 'train_cfg'):
            assert unscoped(cfg[field]) == unscoped(reference[field])


@pytest.mark.parametrize('name', HEADS)
def test_optimizer(name):
    """The full model; every parameter of the backbone has the rate and the decay that the table says."""
    cfg = load(name)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert type(model.backbone) is VHeat
    groups = groups_of(model, build_optim_wrapper(model, cfg.optim_wrapper))
    rate, factor, decay, free = HEADS[name]
    assert groups.keys() == {key for key, _ in model.named_parameters()}
    norms = {f'{key}.' for key, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    for key, parameter in model.named_parameters():
        group = groups[key]
        if not key.startswith('backbone.'):
            assert group['lr'] == pytest.approx(rate * 10 if 'segformer' in name else rate), key
            continue
        without = {
            'norm in name': 'norm' in key,
            'norms': key.rpartition('.')[0] + '.' in norms,
            '1-D': parameter.ndim == 1,
            'none': False,
        }[free]
        assert group['lr'] == pytest.approx(rate * factor), key
        assert group['weight_decay'] == (0 if without else decay), key


@pytest.mark.parametrize('name', [*RECIPES, *HEADS])
def test_takes_a_step(name):
    """No parameter without gradient, which would stop distributed training; all of vHeat's own parameters move."""
    torch.manual_seed(0)
    cfg = load(name)
    model, batch = narrow_model(cfg), batch_of(cfg)
    optim = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {key: value.clone() for key, value in model.named_parameters()}
    optim.zero_grad = lambda **_: None  # gradients are looked at below
    model.train()
    losses = model.train_step(copy.deepcopy(batch), optim)
    assert all(torch.isfinite(value).all() for value in losses.values())
    idle = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    for key in ('patch_embed.conv1.weight', 'freq_embed.0', 'layers.3.0.mlp.fc2.weight'):
        assert model.backbone.get_parameter(key).grad.abs().sum() > 0, key
    still = [key for key, p in model.named_parameters() if p.requires_grad and torch.equal(before[key], p)]
    assert not [key for key in still if key.startswith('backbone.freq_embed') or '.op.to_k.0.weight' in key]
    model.eval()
    assert len(model.val_step(batch)) == 2


def test_classifier_of_224_starts_at_384(tmp_path, monkeypatch):
    """All weights of the released one arrive by name, head included; new entries of the embeddings are zero."""
    small, large = (load(name) for name in (CLASSIFIER, 'classification/vheat-t_16xb64_in1k-384px.py'))
    trained = narrow_model(small).state_dict()
    spelled = {'backbone.outnorm3': 'classifier.0', 'head.fc': 'classifier.3', 'backbone.': ''}
    released = {re.sub('|'.join(spelled), lambda found: spelled[found[0]], key): trained[key] for key in trained}
    torch.save(dict(model=released), tmp_path / 'vHeat_tiny.pth')
    monkeypatch.setenv('VHEAT_WEIGHTS', str(tmp_path))
    narrow(large.model)
    large.model.backbone.img_size = 96
    large.custom_hooks.append(dict(type='CheckpointCheckHook'))
    _, weights = train(large, tmp_path / 'run', 1, load_from=large.load_from)
    for key, value in weights[0].items():
        grid = trained[key].shape
        torch.testing.assert_close(value[tuple(map(slice, grid))], trained[key], rtol=0, atol=0)
        if 'freq_embed' in key:
            assert value.shape[:2] == tuple(side * 3 // 2 for side in grid[:2])
            assert value[grid[0] :].count_nonzero() == value[:, grid[1] :].count_nonzero() == 0
        else:
            assert value.shape == grid


# --- docs/recipes.md


def test_page_lists_every_head():
    links = set(re.findall(r'\.\./configs/([\w/.-]+\.py)', DOCS.read_text()))
    assert all((CONFIGS / link).is_file() for link in links)
    assert {name for name in HEADS if 'vheat-t' in name} <= links


def snippet(title: str, number: int = 0) -> str:
    """Python block ``number`` of a section of the page."""
    section = DOCS.read_text().split(f'## {title}\n')[1].split('\n## ')[0]
    return re.findall(r'```python\n(.*?)```', section, flags=re.DOTALL)[number]


def load_with(name: str, title: str, number: int = 0) -> Config:
    """A config with the page's lines merged in, at width 8."""
    cfg = load(name)
    narrow(cfg.model)
    cfg.merge_from_dict(Config.fromstring(snippet(title, number), '.py').to_dict())
    return cfg


def test_page_on_another_size(tmp_path):
    path = tmp_path / 'base.py'
    path.write_text(snippet('Heads').replace('REPO/configs', str(CONFIGS)))
    cfg = Config.fromfile(path)
    assert cfg.model.backbone.arch == 'base'
    assert cfg.model.neck.in_channels == [128, 256, 512, 1024]


# --- partly frozen backbone


@pytest.mark.parametrize('name', TASKS)
def test_partly_frozen_backbone(name):
    cfg = load_with(name, 'Partly frozen backbone')
    model = build(cfg)
    optim = build_optim_wrapper(model, cfg.optim_wrapper)
    before = {key: value.clone() for key, value in model.named_parameters()}
    frozen = r'backbone\.(patch_embed|layers\.[01]|freq_embed\.[01]|outnorm[01])(\.|$)'
    learning = {key for key in before if not re.match(frozen, key)}
    assert groups_of(model, optim).keys() == learning
    model.train()
    assert not model.backbone.layers[1].training
    assert model.backbone.layers[2].training
    model.train_step(batch_of(cfg), optim)
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved <= learning
    assert {'backbone.layers.2.0.mlp.fc1.weight', 'backbone.freq_embed.2'} <= moved


# --- layer-wise learning-rate decay


def expected_scale(key: str) -> float:
    """For four stages of one block, six depths: stem, blocks with what leads to the next stage, everything else."""
    found = re.match(r'backbone\.(?:layers|freq_embed)\.(\d)', key)
    depth = 0 if key.startswith('backbone.patch_embed') else int(found.group(1)) + 1 if found else 5
    return 0.9 ** (5 - depth)


@pytest.mark.parametrize('name', [*TASKS, 'detection/dino-4scale_vheat-t_8xb2-12e_coco.py'])
def test_layer_decay(name):
    """Rates fall towards the stem, on top of the config's own factors; decay is what it was."""
    cfg = load_with(name, 'Layer-wise learning-rate decay')
    model = build(cfg)
    plain = load(name).optim_wrapper
    before = groups_of(model, build_optim_wrapper(model, plain))
    after = groups_of(model, build_optim_wrapper(model, cfg.optim_wrapper))
    assert after.keys() == before.keys()
    for key, group in after.items():
        assert group['lr'] == pytest.approx(before[key]['lr'] * expected_scale(key)), key
        assert group['weight_decay'] == before[key]['weight_decay'], key
    assert len({round(group['lr'] / before[key]['lr'], 6) for key, group in after.items()}) == 6


def test_layer_decay_of_mmpretrain_is_the_same():
    ours, theirs = (load_with(CLASSIFIER, 'Layer-wise learning-rate decay', number) for number in (0, 1))
    assert ours.optim_wrapper.constructor != theirs.optim_wrapper.constructor
    model = build(ours)
    ours, theirs = (groups_of(model, build_optim_wrapper(model, cfg.optim_wrapper)) for cfg in (ours, theirs))
    for key, group in ours.items():
        assert (group['lr'], group['weight_decay']) == pytest.approx((theirs[key]['lr'], theirs[key]['weight_decay']))


@pytest.mark.parametrize('rate', [None, 0, 1.5, '0.9'])
def test_layer_decay_refuses_rates(rate):
    with pytest.raises(ValueError, match=rf'layer_decay_rate must lie in \(0, 1\], got {rate!r}'):
        LayerDecayOptimWrapperConstructor(dict(optimizer=dict(type='SGD', lr=1)), dict(layer_decay_rate=rate))


def test_layer_decay_needs_a_backbone_and_a_rate():
    constructor = LayerDecayOptimWrapperConstructor(dict(optimizer=dict(type='SGD', lr=1)), dict(layer_decay_rate=0.5))
    model = nn.Module()
    model.backbone = nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r'Module\.backbone is Linear, which has no get_layer_depth'):
        constructor(model)
    with pytest.raises(ValueError, match=r'optimizer\.lr is not set'):
        LayerDecayOptimWrapperConstructor(dict(optimizer=dict(type='SGD')), dict(layer_decay_rate=0.5))


# --- gradient accumulation


def test_accumulated_gradients_are_those_of_the_whole_batch():
    cfg = load_with(CLASSIFIER, 'Gradient accumulation')
    cfg.model.train_cfg = None  # mixing images would tie the parts of a batch together
    cfg.optim_wrapper.optimizer = SGD
    cfg.optim_wrapper.clip_grad = None
    torch.manual_seed(0)
    whole = build(cfg)
    parts = copy.deepcopy(whole)
    images, labels = torch.randint(0, 255, (8, 3, 64, 64), dtype=torch.uint8), batch_of(cfg)['data_samples'] * 4
    whole.train_step(dict(inputs=images, data_samples=labels), plain_optimizer(whole, cfg))
    optim = build_optim_wrapper(parts, cfg.optim_wrapper)
    optim.initialize_count_status(parts, 0, 8)
    start = copy.deepcopy(parts.state_dict())
    for i in range(4):
        for key, value in parts.state_dict().items():
            torch.testing.assert_close(value, start[key], rtol=0, atol=0)
        parts.train_step(dict(inputs=images[2 * i : 2 * i + 2], data_samples=labels[2 * i : 2 * i + 2]), optim)
    assert not torch.equal(parts.head.fc.weight, start['head.fc.weight'])
    for key, value in parts.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[key], rtol=1e-4, atol=1e-6, msg=key)


def plain_optimizer(model: nn.Module, cfg: Config):
    return build_optim_wrapper(model, {k: v for k, v in cfg.optim_wrapper.items() if k != 'accumulative_counts'})


@pytest.mark.parametrize('name', [DETECTOR, SEGMENTOR])
def test_accumulation_steps_every_fourth_iteration(tmp_path, name):
    weights = train(load_with(name, 'Gradient accumulation'), tmp_path, 5)[1]
    changed = [not equal(a, b) for a, b in pairwise(weights)]
    assert changed == [False, False, False, True, True]  # the fourth, and the last of all


# --- moving average


@pytest.mark.parametrize('name', [DETECTOR, SEGMENTOR])
def test_moving_average(tmp_path, name):
    """The checkpoint's weights are the average, its ``ema_state_dict`` the trained ones."""
    cfg = load_with(name, 'Moving average of the weights')
    momentum = cfg.custom_hooks[0].momentum = 0.3
    runner, weights = train(cfg, tmp_path, 3)
    saved = torch.load(tmp_path / 'iter_3.pth', weights_only=False)
    for key, _ in runner.model.named_parameters():
        average = weights[1][key]
        for step in (2, 3):
            average = torch.lerp(average, weights[step][key], momentum)
        torch.testing.assert_close(saved['state_dict'][key], average)
        torch.testing.assert_close(saved['ema_state_dict'][f'module.{key}'], weights[3][key])
    assert not equal(weights[3], saved['state_dict'])
    build(cfg).load_state_dict(saved['state_dict'], strict=True)


# --- compiled backbone


@pytest.mark.parametrize('name', TASKS)
def test_compiled_backbone(tmp_path, name):
    """One graph, the backbone's; the outputs and the checkpoint's keys are those of the model as it was."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    cfg = load_with(name, 'Compiled backbone')
    cfg.custom_hooks[0].backend = backend
    cfg.custom_hooks.append(dict(type='EMAHook'))  # copies the model
    runner, weights = train(cfg, tmp_path, 2)
    assert len(graphs) == 1  # for both iterations
    assert any('conv' in str(node.target) for node in graphs[0].graph.nodes)
    assert not equal(weights[0], weights[-1])
    saved = torch.load(tmp_path / 'iter_2.pth', weights_only=False)['state_dict']
    build(cfg).load_state_dict(saved, strict=True)

    hook = next(hook for hook in runner.hooks if isinstance(hook, CompileBackboneHook))
    backbone = runner.model.backbone.eval()
    wrapped = backbone._compiled_call_impl
    for stage in ('before_val', 'before_test'):
        getattr(hook, stage)(runner)
    assert backbone._compiled_call_impl is wrapped
    plain, image = copy.deepcopy(backbone), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain(image)
        assert len(graphs) == 1
        for found, value in zip(backbone(image), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2


def test_compiled_backbone_needs_one(tmp_path):
    class Headless(BaseModel):
        def forward(self, inputs, mode='tensor'):
            return inputs

    runner = Runner(model=Headless(), work_dir=str(tmp_path), experiment_name='headless')
    with pytest.raises(TypeError, match='Headless has no backbone to compile'):
        CompileBackboneHook().before_test(runner)


# --- tools of this file


class Items(Dataset):
    """The images of one batch."""

    metainfo: dict = {}  # noqa: RUF012

    def __init__(self, batch: dict) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch['inputs'])

    def __getitem__(self, index: int) -> dict:
        return copy.deepcopy({key: value[index] for key, value in self.batch.items()})


class Record(Hook):
    """Parameters before training and after every iteration."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.weights: list[dict] = []

    def before_train(self, runner: Runner) -> None:
        self.weights.append({key: p.detach().clone() for key, p in runner.model.named_parameters()})

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.weights.append({key: p.detach().clone() for key, p in runner.model.named_parameters()})


def train(cfg: Config, work_dir: Path, iterations: int, load_from: str | None = None) -> tuple[Runner, list[dict]]:
    """Train on one batch; returns the runner, and the weights before and after every iteration."""
    torch.manual_seed(0)
    record = Record()
    collate = dict(type='default_collate' if cfg.default_scope == 'mmpretrain' else 'pseudo_collate')
    runner = Runner(
        model=build(cfg),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            dataset=Items(batch_of(cfg)),
            sampler=dict(type='InfiniteSampler', shuffle=False),
            collate_fn=collate,
        ),
        train_cfg=dict(by_epoch=False, max_iters=iterations),
        optim_wrapper=cfg.optim_wrapper,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=iterations)),
        custom_hooks=[*cfg.get('custom_hooks', []), record],
        default_scope=cfg.default_scope,
        load_from=load_from,
        experiment_name=str(work_dir),
        randomness=dict(seed=0),
        log_level='WARNING',
    )
    runner.train()
    return runner, record.weights


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(value, b[key]) for key, value in a.items())


# --- sliding windows


def test_mask2former_on_sliding_windows():
    """The mean of the windows' predictions, in the size of the image; with the padding of the base there is none."""
    from mmseg.structures import SegDataSample

    cfg = load_with('segmentation/vheat-t_mask2former_8xb2-160k_ade20k-512x512.py', 'Mask2Former on sliding windows')
    cfg.model.test_cfg.update(crop_size=(64, 64), stride=(32, 32))
    image = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)
    meta = dict(img_shape=(64, 96), ori_shape=(64, 96))

    def predict(model: nn.Module, image: torch.Tensor, meta: dict) -> torch.Tensor:
        batch = dict(inputs=[image], data_samples=[SegDataSample(metainfo=meta)])
        return model.eval().test_step(batch)[0].seg_logits.data

    model = build(cfg)
    with torch.no_grad():
        scores = predict(model, image, meta)
        window = dict(img_shape=(64, 64), ori_shape=(64, 64))
        left, right = (predict(model, image[:, :, x : x + 64], window) for x in (0, 32))
    torch.testing.assert_close(scores[..., :32], left[..., :32])
    torch.testing.assert_close(scores[..., 64:], right[..., 32:])
    torch.testing.assert_close(scores[..., 32:64], (left[..., 32:] + right[..., :32]) / 2)
    cfg.model.data_preprocessor.test_cfg = dict(size_divisor=32)
    with torch.no_grad(), pytest.raises(RuntimeError, match='must match the size'):
        predict(build(cfg), image, meta)
