"""The libraries' own Python interfaces take our configs and the checkpoints that training writes."""

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from trained_models import CLASSIFIER, DETECTOR, SEGMENTOR, write

from vheat_mm import VHeat
from vheat_mm.utils.torchvision import ensure_torchvision

IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
ensure_torchvision()


pytestmark = pytest.mark.usefixtures('own_scope')


def test_detector(tmp_path):
    apis = pytest.importorskip('mmdet.apis')
    files = write(tmp_path, *DETECTOR)
    model = apis.init_detector(*files, device='cpu')
    assert isinstance(model.backbone, VHeat)
    weights = torch.load(files[1], weights_only=True)['state_dict']
    assert torch.equal(model.backbone.freq_embed[0], weights['backbone.freq_embed.0'])
    assert apis.inference_detector(model, IMAGE).pred_instances.masks.shape[1:] == (48, 64)
    predictions = apis.DetInferencer(*files, device='cpu')(IMAGE)['predictions']
    assert set(predictions[0]) >= {'bboxes', 'labels', 'scores'}


def test_segmentor(tmp_path):
    apis = pytest.importorskip('mmseg.apis')
    files = write(tmp_path, *SEGMENTOR)
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
    config, checkpoint = write(tmp_path, *CLASSIFIER)
    model = mmpretrain.get_model(config, pretrained=checkpoint, device='cpu')
    weights = torch.load(checkpoint, weights_only=True)['state_dict']
    assert torch.equal(model.head.fc.weight, weights['head.fc.weight'])
    result = mmpretrain.ImageClassificationInferencer(model)(IMAGE)[0]
    assert sum(result['pred_scores']) == pytest.approx(1, abs=1e-5)
    assert model.get_layer_depth('backbone.outnorm3.weight') == (5, 6)
