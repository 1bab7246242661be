"""Hooks, on models and data made of a few numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import nn

from vheat_mm import VHeat
from vheat_mm.engine.hooks.annotation_check_hook import check_batch, check_classes, class_heads
from vheat_mm.engine.hooks.checkpoint_check_hook import check_fit
from vheat_mm.utils.errors import AnnotationError, CheckpointError
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()  # MMEngine's runner imports it to report its version


# --- checkpoints


def backbone_state(**kwargs) -> dict[str, torch.Tensor]:
    arch = dict(embed_dims=8, depths=(1, 1, 1, 1)) | kwargs.pop('arch', {})
    model = VHeat(arch=arch, **dict(img_size=32) | kwargs)
    return {f'backbone.{key}': value for key, value in model.state_dict().items()}


HEAD = {'head.fc.weight': torch.zeros(2, 64), 'head.fc.bias': torch.zeros(2)}


def test_complete_checkpoint_fits():
    own = backbone_state() | HEAD
    report = check_fit(dict(own), own, 'x.pth', finetune=False)
    assert report == f'Weights from x.pth: {len(own)} of {len(own)} tensors'
    other_grid = backbone_state(img_size=64) | HEAD
    assert 'resized: backbone.freq_embed.0 16x16x8 instead of 8x8x8' in check_fit(other_grid, own, 'x.pth', False)


@pytest.mark.parametrize(
    ('change', 'word'),
    [
        (lambda s: s.pop('head.fc.bias'), 'Missing: head.fc.bias'),
        (lambda s: s.pop('backbone.outnorm0.bias'), 'Missing: backbone.outnorm0.bias'),
        (lambda s: s.update(extra=torch.zeros(1)), 'Left over: extra'),
        (lambda s: s.update({'head.fc.bias': torch.zeros(5)}), 'head.fc.bias 5 instead of 2'),
        (lambda s: s.update({'backbone.freq_embed.0': torch.zeros(8, 8, 9)}), '8x8x9 instead of 8x8x8'),
    ],
)
def test_testing_takes_complete_checkpoints_only(change, word):
    own = backbone_state() | HEAD
    state = dict(own)
    change(state)
    with pytest.raises(CheckpointError, match=word):
        check_fit(state, own, 'x.pth', finetune=False)


def test_fine_tuning_takes_other_heads_but_a_complete_backbone():
    own = backbone_state() | HEAD
    state = {k: v for k, v in own.items() if 'outnorm' not in k and k != 'head.fc.weight'}
    state |= {'head.fc.bias': torch.zeros(9), 'decode_head.w': torch.zeros(1)}
    report = check_fit(state, own, 'x.pth', finetune=True)
    assert 'not loaded: head.fc.bias 9 instead of 2' in report
    assert 'left as initialised: ' in report
    assert 'dropped: decode_head.w' in report
    for key in ('backbone.freq_embed.0', 'backbone.layers.0.0.mlp.fc1.bias'):
        with pytest.raises(CheckpointError, match=f'Missing: {key}'):
            check_fit({k: v for k, v in state.items() if k != key}, own, 'x.pth', finetune=True)
    with pytest.raises(CheckpointError, match='does not fit'):  # a model without backbone, and nothing in common
        check_fit({'a': torch.zeros(1)}, {'b': torch.zeros(1)}, 'x.pth', finetune=True)


def test_other_variant_is_named():
    deeper = backbone_state(arch=dict(depths=(1, 1, 2, 1)))
    with pytest.raises(CheckpointError, match=r'depths \(1, 1, 2, 1\), the model has .* depths \(1, 1, 1, 1\)'):
        check_fit(deeper, backbone_state(), 'x.pth', finetune=True)


def test_stages_that_are_not_built_may_be_left_over():
    report = check_fit(backbone_state(), backbone_state(out_indices=(0, 1)), 'x.pth', finetune=True)
    assert 'dropped: backbone.outnorm2.weight' in report


class Classifier(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = VHeat(arch=dict(embed_dims=8, depths=(1, 1, 1, 1)), img_size=32, out_indices=(3,))
        self.head = nn.Module()
        self.head.fc = nn.Linear(64, 2)

    def forward(self, inputs, mode='tensor'):
        return inputs


@pytest.mark.parametrize('ema', [False, True])
def test_released_checkpoint_is_translated(tmp_path, ema):
    """``model`` or ``model_ema`` of the release, keys without prefix, classifier in its spelling."""
    source, average = Classifier(), Classifier()
    released = {}
    for name, model in (('model', source), ('model_ema', average)):
        released[name] = {
            key.removeprefix('backbone.').replace('outnorm3.', 'classifier.0.').replace('head.fc.', 'classifier.3.'): v
            for key, v in model.state_dict().items()
        }
    torch.save(released, tmp_path / 'released.pth')
    runner = Runner(
        model=Classifier(),
        work_dir=str(tmp_path / 'work'),
        custom_hooks=[dict(type='CheckpointCheckHook', ema=ema)],
        load_from=str(tmp_path / 'released.pth'),
        experiment_name=f'released-{ema}',
    )
    runner.load_or_resume()
    for key, value in (average if ema else source).state_dict().items():
        torch.testing.assert_close(runner.model.state_dict()[key], value, rtol=0, atol=0)


# --- annotations


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.rpn_head = self.head_of(1)
        self.roi_head = nn.Module()
        self.roi_head.bbox_head = nn.ModuleList([self.head_of(3), self.head_of(4)])
        self.decode_head = self.head_of(5)
        self.auxiliary_head = self.head_of(6)
        self.head = self.head_of(2)

    @staticmethod
    def head_of(num_classes):
        head = nn.Identity()
        head.num_classes = num_classes
        return head


def test_heads_are_found():
    found = {kind: (head.name, head.num_classes) for kind, head in class_heads(Heads()).items()}
    assert found == dict(gt_instances=('roi_head.bbox_head.0', 3), gt_sem_seg=('decode_head', 5), gt_label=('head', 2))


def samples(**fields):
    sample = BaseDataElement(metainfo=dict(img_path='pictures/a.png'))
    for name, value in fields.items():
        sample.set_data({name: value})
    return dict(data_samples=[sample])


@pytest.mark.parametrize(
    ('batch', 'word'),
    [
        (samples(gt_instances=InstanceData(labels=torch.tensor([0, 2]))), None),
        (samples(gt_instances=InstanceData(labels=torch.tensor([0, 3]))), 'label 3 .*bbox_head.0.num_classes=3'),
        (samples(gt_instances=InstanceData(labels=torch.zeros(0, dtype=torch.long))), None),
        (samples(gt_sem_seg=PixelData(data=torch.tensor([[[0, 4, 255]]]))), None),
        (samples(gt_sem_seg=PixelData(data=torch.tensor([[[0, 5, 255]]]))), 'label 5 .*0 .. 4'),
        (samples(gt_label=torch.tensor([1])), None),
        (samples(gt_label=torch.tensor([-1])), 'label -1 '),
        (dict(inputs=1), None),
        ((1, 2), None),
    ],
)
def test_labels_of_a_batch(batch, word):
    if word is None:
        check_batch(batch, class_heads(Heads()))
    else:
        with pytest.raises(AnnotationError, match=f'pictures/a.png: {word}'):
            check_batch(batch, class_heads(Heads()))


def test_number_of_class_names():
    warnings = []
    runner = SimpleNamespace(logger=SimpleNamespace(warning=warnings.append))
    heads = dict(gt_label=class_heads(Heads())['gt_label'])
    for classes, count in ((('a', 'b'), 0), (('a',), 1)):
        check_classes(SimpleNamespace(metainfo=dict(classes=classes)), heads, runner)
        assert len(warnings) == count
    with pytest.raises(AnnotationError, match=r'3 classes, but model.head.num_classes=2'):
        check_classes(SimpleNamespace(metainfo=dict(classes=('a', 'b', 'c'))), heads, runner)
    with pytest.raises(AnnotationError, match=r"classes=\('nut',\)"):
        check_classes(SimpleNamespace(metainfo=dict(classes='nut')), heads, runner)
