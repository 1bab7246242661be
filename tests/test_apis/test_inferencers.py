"""The libraries' own Python interfaces take our configs and the checkpoints that training writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.registry import MODELS, init_default_scope

from vheat_mm import VHeat
from vheat_mm.utils.torchvision import ensure_torchvision

ROOT = Path(__file__).parents[2] / 'configs'
CLASSES = dict(classes=('a', 'b'), palette=[[250, 0, 0], [0, 0, 250]])
IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
ensure_torchvision()


pytestmark = pytest.mark.usefixtures('own_scope')


def write(folder: Path, base: str, model: str) -> tuple[str, str]:
    """A small config, and a checkpoint as a training run leaves it, log history included."""
    config = folder / 'small.py'
    backbone = 'dict(arch=dict(_delete_=True, embed_dims=8, depths=(1, 1, 1, 1)), img_size=64, init_cfg=None)'
    config.write_text(f'_base_ = {str(ROOT / base)!r}\nmodel = dict(backbone={backbone}, {model})\n')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    checkpoint = folder / 'epoch_1.pth'
    history = dict(log_scalars={'train/loss': HistoryBuffer([1.0], [1])})
    meta = dict(dataset_meta=CLASSES, epoch=1)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), message_hub=history, meta=meta), checkpoint)
    return str(config), str(checkpoint)


def test_detector(tmp_path):
    apis = pytest.importorskip('mmdet.apis')
    heads = 'roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2))'
    dims = f'neck=dict(in_channels=[8, 16, 32, 64]), {heads}'
    files = write(tmp_path, 'detection/mask-rcnn_vheat-t_fpn_1x_coco.py', dims)
    model = apis.init_detector(*files, device='cpu')
    assert isinstance(model.backbone, VHeat)
    weights = torch.load(files[1], weights_only=True)['state_dict']
    assert torch.equal(model.backbone.freq_embed[0], weights['backbone.freq_embed.0'])
    assert apis.inference_detector(model, IMAGE).pred_instances.masks.shape[1:] == (48, 64)
    predictions = apis.DetInferencer(*files, device='cpu')(IMAGE)['predictions']
    assert set(predictions[0]) >= {'bboxes', 'labels', 'scores'}


def test_segmentor(tmp_path):
    apis = pytest.importorskip('mmseg.apis')
    dims = (
        'decode_head=dict(in_channels=[8, 16, 32, 64], channels=8, num_classes=2), '
        'auxiliary_head=dict(in_channels=32, channels=8, num_classes=2)'
    )
    files = write(tmp_path, 'segmentation/vheat-t_upernet_8xb2-160k_ade20k-512x512.py', dims)
    model = apis.init_model(*files, device='cpu')
    weights = torch.load(files[1], weights_only=True)['state_dict']
    assert torch.equal(model.backbone.freq_embed[0], weights['backbone.freq_embed.0'])
    expected = apis.inference_model(model, IMAGE).pred_sem_seg.data[0].numpy()
    assert (apis.MMSegInferencer(*files, device='cpu')(IMAGE)['predictions'] == expected).all()


def test_a_config_inside_a_checkpoint_is_not_executed(tmp_path, capfd):
    """MMEngine would, where only weights are given; the log says what to give instead."""
    apis = pytest.importorskip('mmdet.apis')
    path, proof = tmp_path / 'epoch_1.pth', tmp_path / 'ran'
    code = f'open({str(proof)!r}, "w").close()\nmodel = dict(type="X")'
    torch.save(dict(state_dict={}, meta=dict(cfg=code), message_hub=dict(runtime_info=dict(cfg=code))), path)
    MMLogger._instance_dict.clear()  # loggers of earlier tests write to streams that are closed
    with pytest.raises(ValueError, match='Cannot find the config'):
        apis.DetInferencer(weights=str(path), device='cpu')
    output = capfd.readouterr()
    assert 'model=CONFIG, weights=CHECKPOINT' in output.out + output.err
    assert not proof.exists()


def test_classifier(tmp_path):
    mmpretrain = pytest.importorskip('mmpretrain')
    base = 'classification/vheat-t_16xb128_in1k.py'
    config, checkpoint = write(tmp_path, base, 'head=dict(num_classes=2, in_channels=64)')
    model = mmpretrain.get_model(config, pretrained=checkpoint, device='cpu')
    weights = torch.load(checkpoint, weights_only=True)['state_dict']
    assert torch.equal(model.head.fc.weight, weights['head.fc.weight'])
    result = mmpretrain.ImageClassificationInferencer(model)(IMAGE)[0]
    assert sum(result['pred_scores']) == pytest.approx(1, abs=1e-5)
    assert model.get_layer_depth('backbone.outnorm3.weight') == (5, 6)
