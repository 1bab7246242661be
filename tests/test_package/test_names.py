"""From the wheel alone, OpenMMLab's libraries know our configs, models and published weights by name."""

import pytest
from stand_ins import write_release

DETECTOR, CLASSIFIER = 'mask-rcnn_vheat-t_fpn_1x_coco', 'vheat-t_16xb128_in1k'
CODE = f"""
import os, sys
import torch
from mmengine.config import Config
from mmengine.hub import get_config, get_model  # before this package, which they must know afterwards
for name in ('foreign', 'own'):
    cfg = Config.fromfile(name + '.py')
    assert cfg.model.backbone.type == 'VHeat'
from vheat_mm.utils.torchvision import ensure_torchvision
ensure_torchvision()
from mmdet.apis import DetInferencer
import mmpretrain
base, detector = os.environ['VHEAT_WEIGHTS'], 'vheat_mm::detection/{DETECTOR}.py'
published = torch.load(base + '/vheatdet/vHeat_tiny_det.pth')['state_dict']
models = [
    get_model(detector, pretrained=True),
    DetInferencer({DETECTOR!r}, device='cpu').model,
]
for model in models:
    assert all(torch.equal(value, published[key]) for key, value in model.state_dict().items())
assert get_config(detector, pretrained=True).model_path.endswith('vHeat_tiny_det.pth')
published = torch.load(base + '/vheatcls/vHeat_tiny.pth')['model']
model = mmpretrain.get_model({CLASSIFIER!r}, pretrained=True)
assert torch.equal(model.head.fc.weight, published['classifier.3.weight'])
import vheat_mm
print(vheat_mm.config_path('detection/{DETECTOR}.py'))
"""


def test_names(installed, tmp_path):
    for library in ('mmdet', 'mmpretrain'):
        pytest.importorskip(library)
    release = write_release(tmp_path / 'release', ['vheat_tiny', DETECTOR])
    path = f'detection/{DETECTOR}.py'
    (tmp_path / 'foreign.py').write_text(f"_base_ = __import__('vheat_mm').config_path({path!r})\n")
    (tmp_path / 'own.py').write_text(f"_base_ = 'vheat_mm::{path}'\n")
    done = installed.run('-c', CODE, cwd=tmp_path, VHEAT_WEIGHTS=str(release), PYTHONPATH='')
    assert done.stdout.splitlines()[-1] == str(installed.mim / 'configs' / path)
