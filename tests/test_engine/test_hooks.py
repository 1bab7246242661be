"""Hooks, on models and data made of a few numbers."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import nn

from vheat_mm import VHeat
from vheat_mm.engine.hooks import StopSignalHook
from vheat_mm.engine.hooks.annotation_check_hook import check_batch, check_classes, class_heads
from vheat_mm.utils.errors import AnnotationError
from vheat_mm.utils.process import handle_signals
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()  # MMEngine's runner imports it to report its version


# --- checkpoints


class Classifier(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = VHeat(arch=dict(embed_dims=8, depths=(1, 1, 1, 1)), img_size=32, out_indices=(3,))
        self.head = nn.Module()
        self.head.fc = nn.Linear(64, 2)

    def forward(self, inputs, mode='tensor'):
        return inputs


@pytest.mark.parametrize('ema', [False, True, None])
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
    for classes, count in ((('a', 'b'), 0), (np.array(['a', 'b']), 0), (None, 0), (('a',), 1)):
        check_classes(SimpleNamespace(metainfo=dict(classes=classes)), heads, runner)
        assert len(warnings) == count
    with pytest.raises(AnnotationError, match=r'3 classes, but model.head.num_classes=2'):
        check_classes(SimpleNamespace(metainfo=dict(classes=('a', 'b', 'c'))), heads, runner)
    with pytest.raises(AnnotationError, match=r"classes=\('nut',\)"):
        check_classes(SimpleNamespace(metainfo=dict(classes='nut')), heads, runner)


# --- signals


def test_forked_processes_end_on_the_signal():
    """mmdet's VOCMetric ends its pool by SIGTERM and waits for it, also where a process has only just been forked."""
    previous = handle_signals([signal.SIGTERM], StopSignalHook()._receive)
    try:
        for _ in range(20):
            if not (child := os.fork()):
                time.sleep(20)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, previous[signal.SIGTERM])
