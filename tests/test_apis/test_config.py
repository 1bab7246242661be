"""Configs that hold classes where others hold names."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from vheat_mm import VHeat
from vheat_mm.apis.config import apply_amp, read_config
from vheat_mm.engine.runner.build import add_fault_tolerance_hooks
from vheat_mm.engine.runner.distributed import replace_sync_bn
from vheat_mm.utils.errors import ToolError

PURE = """
from mmengine.hooks import CheckpointHook
from mmengine.optim import {wrapper}
from mmpretrain.models import ImageClassifier
from torch.nn import SyncBatchNorm
from vheat_mm import VHeat
from vheat_mm.engine.hooks import StopSignalHook

model = dict(type=ImageClassifier, backbone=dict(type=VHeat), neck=[dict(norm_cfg=dict(type=SyncBatchNorm, eps=1e-3))])
optim_wrapper = dict(type={wrapper}, optimizer=dict(type='AdamW'))
default_hooks = dict(checkpoint=dict(type=CheckpointHook, interval=2))
custom_hooks = [dict(type=StopSignalHook, signals=('SIGTERM', 'SIGUSR1'))]
"""


def read(path: Path, text: str) -> Config:
    path.write_text(text)
    return read_config(Namespace(config=str(path), cfg_options=None, work_dir=None, launcher='none', local_rank=0))


@pytest.mark.usefixtures('own_scope')
def test_config_in_pure_python(tmp_path):
    """The scope is that of the model's class; flags and hooks find parts by class."""
    pytest.importorskip('mmpretrain')
    cfg = read(tmp_path / 'pure.py', PURE.format(wrapper='OptimWrapper'))
    assert cfg.default_scope == 'mmpretrain'
    apply_amp(cfg)
    assert cfg.optim_wrapper.type == ('AmpOptimWrapper' if torch.cuda.is_available() else 'CPUAmpOptimWrapper')
    assert replace_sync_bn(cfg.model) == 1
    assert cfg.model.neck[0].norm_cfg == dict(type='BN', eps=1e-3)
    add_fault_tolerance_hooks(cfg)
    assert cfg.default_hooks.checkpoint == dict(type='AtomicCheckpointHook', interval=2)
    assert sum('StopSignalHook' in str(hook['type']) for hook in cfg.custom_hooks) == 1
    with pytest.raises(ToolError, match='BaseOptimWrapper'):
        apply_amp(read(tmp_path / 'other.py', PURE.format(wrapper='BaseOptimWrapper')))


@pytest.mark.usefixtures('own_scope')
def test_classes_in_a_config_of_texts(tmp_path):
    """MMEngine writes the config into the work dir, which it cannot do with classes."""
    pytest.importorskip('mmpretrain')
    text = "_base_ = './base.py'\nfrom vheat_mm import VHeat\nmodel = dict(backbone=dict(type=VHeat))\n"
    (tmp_path / 'base.py').write_text("default_scope = 'mmpretrain'\nmodel = dict(type='ImageClassifier')\n")
    cfg = read(tmp_path / 'mixed.py', text)
    assert 'VHeat' not in cfg
    assert cfg.model.backbone.type == 'vheat_mm.models.vheat.VHeat'
    again = Config.fromstring(cfg.pretty_text, '.py')
    assert type(MODELS.build(dict(again.model.backbone, arch='tiny', img_size=32))) is VHeat
