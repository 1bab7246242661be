"""Grad-CAM: exact where theory says what it must be, for every layout of a layer, without traces in the model."""

import numpy as np
import pytest
import torch
from config_models import load, narrow_model
from mmengine.dataset import pseudo_collate
from torch import nn

from vheat_mm.apis.heat.cam import enlarge, explain, grad_cam, to_nchw
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

ensure_torchvision()
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')
pytestmark = pytest.mark.usefixtures('own_scope')
CLASSES = ('brick', 'grass', 'gravel')


def image(height=96, width=64):
    return torch.randint(0, 255, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def data_of(sample_class, height=96, width=64):
    shape = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0), img_id=0)
    return pseudo_collate([dict(inputs=image(height, width), data_samples=sample_class(metainfo=shape))])


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    cfg = load('classification/vheat-t_16xb128_in1k.py')
    cfg.model.head.num_classes = cfg.data_preprocessor.num_classes = len(CLASSES)
    return narrow_model(cfg)


@pytest.fixture
def classifier_data():
    from mmpretrain.structures import DataSample

    return data_of(DataSample)


def explain_texture(model, data, **arguments):
    return explain(model, data, 'classification', CLASSES, **arguments)


@pytest.mark.parametrize('name', CLASSES)
def test_equals_cam_where_a_linear_layer_follows_the_average(classifier, classifier_data, name):
    """Zhou et al. 2016: the sum of the maps, each times the class's weight."""
    nn.init.normal_(classifier.head.fc.weight)
    batch = classifier.data_preprocessor(classifier_data, False)
    maps = classifier.eval().backbone(batch['inputs'])[0]
    weights = classifier.head.fc.weight[CLASSES.index(name)]
    expected = torch.einsum('c,chw->hw', weights, maps[0]).relu().detach().numpy()
    # Position i is centred at pixel 32 i, see test_positions_are_centred_where_gradients_are.
    rows = np.array([np.interp(np.arange(64) / 32, range(2), row) for row in expected])
    expected = np.array([np.interp(np.arange(96) / 32, range(3), column) for column in rows.T]).T
    cam = explain_texture(classifier, classifier_data, target=name)
    assert cam.grid == (3, 2)
    assert cam.target.startswith(name)
    np.testing.assert_allclose(cam.heat, expected / expected.max(), atol=1e-5)
    np.testing.assert_array_equal(cam.image[..., ::-1], image().permute(1, 2, 0))


def test_positions_are_centred_where_gradients_are(classifier):
    """Without heat conduction, a position of the patch embedding depends on the pixels around stride * i."""
    pixels = torch.rand(1, 64, 64, 3, requires_grad=True)
    found = classifier.backbone.patch_embed(pixels)[0, 5, 9]
    (found * torch.arange(len(found))).sum().backward()
    rows, columns = pixels.grad[0].abs().sum(-1).nonzero().T
    centre = ((rows.min() + rows.max()) / 2, (columns.min() + columns.max()) / 2)
    heat = torch.zeros(1, 1, 16, 16)
    heat[..., 5, 9] = 1
    (peak,) = (enlarge(heat, (64, 64), is_vheat=True)[0, 0] == 1).nonzero().tolist()
    assert [float(place) for place in centre] == peak == [20, 36]


def test_channels_last_block_equals_the_backbones_map(classifier, classifier_data):
    """Between last block and pooling stands a norm per position, so only a model without it has equal pictures."""
    nn.init.normal_(classifier.head.fc.weight)
    classifier.backbone.outnorm3 = nn.Identity()
    block = explain_texture(classifier, classifier_data, target='grass', layer='backbone.layers.3.0')
    whole = explain_texture(classifier, classifier_data, target='grass')
    assert block.heat.max() == 1
    np.testing.assert_allclose(block.heat, whole.heat, atol=1e-5)


def test_model_is_left_as_it_was(classifier, classifier_data):
    classifier.train()
    classifier.backbone.layers[0].eval()
    classifier.backbone.patch_embed.requires_grad_(False)
    before = [(m.training, len(m._forward_hooks)) for m in classifier.modules()]
    frozen = [p.requires_grad for p in classifier.parameters()]
    for layer in (None, 'backbone.patch_embed', 'head.fc'):
        with torch.no_grad():
            try:
                explain_texture(classifier, classifier_data, layer=layer)
            except ToolError:
                assert layer == 'head.fc'  # no map
        assert [(m.training, len(m._forward_hooks)) for m in classifier.modules()] == before
        assert [p.requires_grad for p in classifier.parameters()] == frozen
        assert all(p.grad is None for p in classifier.parameters())


def test_layouts():
    maps = torch.randn(1, 16, 3, 2)
    tokens = maps.flatten(2).transpose(1, 2)
    with_class_token = torch.cat([torch.full((1, 1, 16), 9.0), tokens], 1)
    for given in (maps, maps.permute(0, 2, 3, 1), tokens, with_class_token):
        assert torch.equal(to_nchw(given, (96, 64)), maps)
    assert torch.equal(to_nchw(torch.ones(1, 4, 4, 4), (64, 64), 'NHWC'), torch.ones(1, 4, 4, 4))
    assert to_nchw(torch.ones(1, 5, 4, 7), (96, 64), 'NHWC').shape == (1, 7, 5, 4)  # as told, whatever the stride
    for bad, words in (
        (torch.ones(1, 4, 4, 4), 'may have two layouts'),
        (torch.ones(1, 16), 'is no map'),
        (torch.ones(1, 16, 3, 3), 'is no map'),
        (torch.ones(6, 3, 2, 16), 'is no map'),  # windows
        (torch.ones(1, 11, 16), 'is no map'),
    ):
        with pytest.raises(ToolError, match=words):
            to_nchw(bad, (96, 64) if 'two' not in words else (64, 64))


def test_swin_and_tokens_give_the_picture_of_the_plain_map():
    """A network of one convolution whose map three layers pass on, each in its layout."""
    plain = nn.Conv2d(3, 8, 16, stride=16)
    maps = plain(torch.randn(1, 3, 96, 64))
    gradients = torch.randn_like(maps)
    expected = grad_cam(maps, gradients)
    weights = gradients.mean((2, 3))
    assert torch.allclose(expected, torch.einsum('bc,bchw->bhw', weights, maps).clamp(min=0), atol=1e-6)
    for move in (lambda x: x.permute(0, 2, 3, 1), lambda x: x.flatten(2).transpose(1, 2)):
        moved = [to_nchw(move(x), (96, 64)) for x in (maps, gradients)]
        assert torch.equal(grad_cam(*moved), expected)


def test_segmentor_equals_the_logits_of_the_class_before_the_last_layer():
    """A 1x1 convolution follows: a channel's mean gradient is its weight, but for a factor of all channels."""
    from mmseg.structures import SegDataSample

    torch.manual_seed(0)
    cfg = load('segmentation/vheat-t_upernet_8xb2-160k_ade20k-512x512.py')
    cfg.model.decode_head.num_classes = cfg.model.auxiliary_head.num_classes = 4
    model = narrow_model(cfg)
    data, classes = data_of(SegDataSample), ('brick', 'grass', 'gravel', 'coin')
    last = model.decode_head.conv_seg
    last.weight.data.normal_()
    name = explain(model, data, 'segmentation', classes).target.split(',')[0]
    cam = explain(model, data, 'segmentation', classes, target=name, layer='decode_head.fpn_bottleneck')
    last.bias.data.zero_()
    logits = model.eval()(model.data_preprocessor(data, False)['inputs'], mode='tensor')
    expected = logits[:, [classes.index(name)]].relu().detach()
    assert expected.shape[2:] == cam.grid == (24, 16)
    expected = nn.functional.interpolate(expected, (96, 64), mode='bilinear')[0, 0]
    np.testing.assert_allclose(cam.heat, expected / expected.max(), atol=1e-5)
    explain(model, data, 'segmentation', classes, layer='decode_head.fpn_bottleneck.bn')  # a ReLU in place follows
    # The largest share is explained by default, and what is predicted nowhere is an error.
    last.bias.data[:] = torch.tensor([9e3, 0, 0, 0])
    assert explain(model, data, 'segmentation', classes).target == 'brick, 100% of the image'
    with pytest.raises(ToolError, match="no pixel of the image is predicted as 'coin', only as brick"):
        explain(model, data, 'segmentation', classes, target='coin')


def test_segmentor_of_one_logit_predicts_by_its_threshold():
    from mmseg.structures import SegDataSample

    cfg = load('segmentation/vheat-t_upernet_8xb2-160k_ade20k-512x512.py')
    cfg.model.decode_head |= dict(num_classes=2, out_channels=1, threshold=0.3)
    cfg.model.auxiliary_head.num_classes = 2
    model = narrow_model(cfg)
    nn.init.zeros_(model.decode_head.conv_seg.weight)
    for logit, name in ((-0.5, 'coin'), (-1.0, 'brick')):  # sigmoids of 0.38 and 0.27
        nn.init.constant_(model.decode_head.conv_seg.bias, logit)
        cam = explain(model, data_of(SegDataSample), 'segmentation', ('brick', 'coin'))
        assert cam.target == f'{name}, 100% of the image'


@pytest.mark.parametrize('head', ['mask-rcnn', 'atss'])  # a softmax over all classes; a sigmoid for each
def test_detector_explains_a_detection_and_a_class(head):
    from mmdet.structures import DetDataSample

    torch.manual_seed(0)
    cfg, classes = load(f'detection/{head}_vheat-t_fpn_1x_coco.py'), [f'c{i}' for i in range(80)]
    (cfg.model.test_cfg.get('rcnn') or cfg.model.test_cfg).score_thr = 0.0
    model = narrow_model(cfg)
    data = data_of(DetDataSample, 250, 190)  # padded to 256 x 192
    batch = model.data_preprocessor(data, False)
    found = model.eval().predict(batch['inputs'], batch['data_samples'], rescale=False)[0].pred_instances
    best = int(found.scores.argmax())
    name, score = classes[found.labels[best]], float(found.scores[best].detach())
    one = explain(model, data, 'detection', classes, target='#1', score_thr=0.0)
    assert one.target == f'#1 {name} {score:.2f}'
    whole = explain(model, data, 'detection', classes, target=name, score_thr=0.0)
    alone = int((found.labels == found.labels[best]).sum()) == 1
    assert np.allclose(one.heat, whole.heat, atol=1e-4) == alone
    assert one.heat.shape == one.image.shape[:2] == (250, 190)
    assert one.heat.max() == 1
    with pytest.raises(ToolError, match=r'score_thr=1.0: no detection reaches it, the highest score is 0'):
        explain(model, data, 'detection', classes, score_thr=1.0)


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (dict(target='sand'), "no class 'sand'; the model has brick, grass, gravel"),
        (dict(target='3'), "no class '3'"),
        (dict(target='#1'), 'means a detection'),
        (dict(layer='backbone.layer4'), "no layer 'backbone.layer4' in the model; beside it are backbone.freq_embed"),
        (dict(layer='banana'), "no layer 'banana' in the model; beside it are backbone, "),
        (dict(layer='backbone.layers'), 'runs 0 times'),
        (dict(layer='head.fc'), 'does not depend|is no map'),
    ],
)
def test_errors(classifier, classifier_data, arguments, words):
    with pytest.raises(ToolError, match=words):
        explain_texture(classifier, classifier_data, **arguments)
