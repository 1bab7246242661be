"""Pictures of heat: exact where mathematics says what the numbers are."""

import math

import numpy as np
import pytest
import torch
from config_models import load
from mmengine.model import ImgDataPreprocessor
from PIL import Image, ImageSequence
from torch import nn

from vheat_mm import VHeat
from vheat_mm.apis.heat.command import run_heat
from vheat_mm.apis.heat.diffusivity import Diffusivity, diffusivities, diffusivity_figure, warn_of
from vheat_mm.apis.heat.embeddings import resizings
from vheat_mm.apis.heat.erf import area_ratios, measure, peak
from vheat_mm.apis.heat.networks import UNTRAINED, Network, load_network, vheat_of
from vheat_mm.apis.heat.spread import conduct, crop_to_patches, patch_map, responses
from vheat_mm.ops.reference import fit_freq_embed, heat_conduction
from vheat_mm.utils.errors import ToolError
from vheat_mm.utils.torchvision import ensure_torchvision

pytest.importorskip('matplotlib')
ARCH = dict(embed_dims=8, depths=(1, 1, 2, 1))


@pytest.fixture
def vheat():
    torch.manual_seed(0)
    return VHeat(ARCH, img_size=64).eval()


def images(count=3, side=64):
    return np.random.default_rng(0).integers(0, 255, (count, side, side, 3), np.uint8)


def network_of(layers):
    return Network(layers, 'it', ImgDataPreprocessor())


def test_field_of_a_convolution_is_its_kernel():
    conv = nn.Conv2d(3, 2, 5, padding=2)
    nn.init.constant_(conv.bias, 1e4)  # positive outputs, whatever the sign of the weights
    field = measure(network_of(conv), images())
    expected = np.zeros((64, 64))
    expected[30:35, 30:35] = conv.weight.detach().sum(0).abs().sum(0).numpy()
    np.testing.assert_allclose(field.values, expected, rtol=1e-5)
    assert field.images == 3


class AverageEverywhere(nn.Conv2d):
    """The mean over the image, at every position of a channels-last map."""

    def forward(self, x):
        mean = super().forward(x).mean((2, 3), keepdim=True)
        return mean.expand(-1, -1, 8, 8).permute(0, 2, 3, 1)


def test_field_of_an_average_is_uniform():
    layer = AverageEverywhere(3, 2, 1, bias=False)
    nn.init.ones_(layer.weight)
    field = measure(network_of(layer), images()).values
    np.testing.assert_allclose(field, 6 / 64**2, rtol=1e-5)
    assert peak(field) == (31.5, 31.5)
    for share, ratio in zip((0.2, 0.3, 0.5, 0.99), area_ratios(field), strict=True):
        side = math.ceil(64 * math.sqrt(share) / 2) * 2  # of squares in the middle of an even number of pixels
        assert ratio == (side / 64) ** 2


def test_area_is_around_the_peak():
    field = np.zeros((64, 64))
    field[20:23, 40:43] = 1
    assert peak(field) == (21, 41)
    assert area_ratios(field, (0.1, 0.5, 1.0)) == [1 / 64**2, 9 / 64**2, 9 / 64**2]


def test_networks_of_timm_take_their_own_checkpoints_only(tmp_path):
    ensure_torchvision()
    timm = pytest.importorskip('timm')
    model, path = timm.create_model('resnet18', num_classes=10), str(tmp_path / 'resnet.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    image = images(1)[0]
    network = load_network('timm:resnet18', path, device='cpu')
    assert network.label == 'resnet18 (timm), resnet.pth'
    mean, std = np.array(model.default_cfg['mean']), np.array(model.default_cfg['std'])
    batch = network.prepare(image)
    np.testing.assert_allclose(batch[0].permute(1, 2, 0), (image / 255 - mean) / std, atol=1e-5)
    torch.testing.assert_close(network.last_map(batch), model.eval().forward_features(batch))
    with pytest.raises(ToolError, match=r"'.*resnet.pth' does not fit timm:resnet26: it lacks layer1.0.conv"):
        load_network('timm:resnet26', path, device='cpu')


def test_photographs_are_cut_and_not_distorted():
    columns = np.tile(np.arange(800) * 255 / 799, (600, 1)).astype(np.uint8)
    cut = crop_to_patches(np.stack([columns, columns.T[:600, :1].repeat(800, 1), columns], axis=2))
    assert cut.shape == (256, 320, 3)
    slopes = [np.diff(cut[128, 8:-8, 0].astype(float)).mean(), np.diff(cut[8:-8, 160, 1].astype(float)).mean()]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.02)


@pytest.mark.parametrize('kt', [1, 8, 512])
def test_heat_keeps_its_sum_and_its_range(kt):
    start = images(1)[0] / 255
    heat = conduct(start, kt)
    np.testing.assert_allclose(heat.sum((0, 1)), start.sum((0, 1)), rtol=1e-12)
    assert start.min() - 1e-3 <= heat.min() <= heat.max() <= start.max() + 1e-3
    assert heat.var() < start.var()


def test_heat_of_a_point_is_a_gaussian_of_variance_2kt():
    start = np.zeros((65, 65, 1))
    start[32, 32] = 1
    heat = conduct(start, 16.0)[..., 0]
    along = np.arange(65) - 32.0
    expected = np.exp(-(along[:, None] ** 2 + along**2) / (4 * 16)) / (4 * math.pi * 16)
    np.testing.assert_allclose(heat, expected, atol=1e-6)


def test_stages_keep_the_heat_of_patches(vheat):
    found = responses(vheat, [(0.1, 0.1), (0.9, 0.6)], (64, 96))
    assert [response.heat.shape for response in found] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    for response in found:
        assert response.start.sum() == 2 * (32 // response.stride) ** 2
        assert response.heat.sum() == pytest.approx(response.start.sum(), rel=1e-5)
    starts = torch.from_numpy(found[2].start)[None, ..., None]
    decays = [block.op.decay(fit_freq_embed(vheat.freq_embed[2], (4, 6))).detach() for block in vheat.layers[2].blocks]
    each = [heat_conduction(starts.float().expand(-1, -1, -1, decay.shape[2]), decay).mean(-1)[0] for decay in decays]
    np.testing.assert_allclose(found[2].heat, sum(each) / 2, atol=1e-6)
    assert patch_map([(1.0, 1.0)], (64, 96))[32:, 64:].all()
    assert patch_map([(0.9, 0.1)], (64, 96))[:32, 64:].all()


def test_diffusivity_is_that_of_the_network_and_random_values_are_told(vheat):
    assert vheat_of(vheat, 'it') == (vheat, f'it\n{UNTRAINED}')
    found = diffusivities(vheat, (64, 64))
    assert [(one.stage, one.block) for one in found] == [(1, 1), (2, 1), (3, 1), (3, 2), (4, 1)]
    one, block = found[3], vheat.layers[2][1]
    decay = block.op.decay(vheat.freq_embed[2]).detach()
    np.testing.assert_allclose(one.decay, decay.mean(-1), rtol=1e-6)
    assert found[0].doubt().startswith('as random')
    nn.init.ones_(block.op.to_k[0].bias)
    assert vheat_of(vheat, 'it') == (vheat, 'it')
    changed = diffusivities(vheat, (64, 64))
    assert changed[3].doubt().startswith('nearly constant')
    heading = diffusivity_figure(changed, 'it').get_suptitle().splitlines()
    assert heading[1:] == ['it', warn_of(changed, 'it')]
    assert 'random or nearly constant over the modes in 5 of 5 blocks' in heading[2]
    assert not warn_of(changed, UNTRAINED)  # said once


def test_smooth_diffusivity_is_not_doubted():
    k = np.linspace(1, 3, 16)[:, None] + np.linspace(0, 1, 16)
    one = Diffusivity(1, 1, k, np.exp(-k), stride=4)
    assert not one.doubt()
    assert one.reach == pytest.approx(4 * math.sqrt(5))


def test_what_modes_of_resizing_keep():
    ramp = torch.arange(32.0)[:, None, None].expand(32, 32, 3) + 1
    learnt, pad, bicubic, bilinear = resizings(ramp, (64, 64))
    assert (learnt.half_waves, learnt.frequency, learnt.empty) == (0, 0, 0)
    assert (pad.half_waves, pad.empty) == (0, 0.75)
    assert pad.frequency == pytest.approx(float((ramp[:8, 0, 0] - 1).norm() / ramp[:8, 0, 0].norm()))
    pad = resizings(ramp, (40, 40), ['pad'])[1]  # mode n of 32 is as fast as mode 1.25 n of 40
    near = ramp[[0, 1, 2, 4, 5, 6, 8, 9], 0, 0]
    assert pad.frequency == pytest.approx(float((near - ramp[:8, 0, 0]).norm() / ramp[:8, 0, 0].norm()))
    assert max(bicubic.frequency, bilinear.frequency) < 0.06 < 0.4 < min(bicubic.half_waves, bilinear.half_waves)


@pytest.mark.usefixtures('own_scope')
def test_command_draws_every_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip('mmpretrain')
    for number, image in enumerate(images(2, 80)):
        Image.fromarray(image).save(f'{number}.png')
    cfg = load('demo/vheat-demo_textures.py')
    cfg.model.backbone |= dict(arch=ARCH, img_size=64)
    cfg.dump('narrow.py')
    assert run_heat(['erf', 'narrow.py', '--images', '.', '--size', '64']) == 0
    assert run_heat(['spread', 'narrow.py', '--image', '0.png', '--size', '64', '--gif', 'spread.gif']) == 0
    assert run_heat(['diffusivity', 'narrow.py']) == 0
    assert run_heat(['embeddings', 'narrow.py', '--to', '128', '--stage', '2']) == 0
    said = capsys.readouterr().out
    assert 'narrow, untrained: ' in said
    assert 'UNTRAINED' in said
    for name in ('erf', 'spread', 'diffusivity', 'embeddings'):
        assert Image.open(f'{name}.png').width == 1280
    frames = [np.array(frame.convert('L')) for frame in ImageSequence.Iterator(Image.open('spread.gif'))]
    contrasts = [frame[20:].std() for frame in frames]  # below the text
    assert len(frames) == 14
    assert np.diff(contrasts).max() < 0.1 < 30 < contrasts[0]
    (tmp_path / 'text.jpg').write_text('no image')
    capsys.readouterr()
    for arguments, words in (
        (['erf', 'narrow.py', '--images', '.', '--size', '65'], 'multiple of 32'),
        (['erf', 'narrow.py', '--images', '.', '--before'], '--before compares with a CHECKPOINT'),
        (['spread', 'narrow.py', '--image', 'text.jpg'], 'text.jpg: no image that can be read'),
        (['spread', 'narrow.py', '--image', '.'], 'images, give one'),
        (['embeddings', 'narrow.py', '--to', '8'], '--to must be at least 32'),
        (['diffusivity', 'vheat_tin'], "no config 'vheat_tin'"),
    ):
        assert run_heat([*arguments, '--out', 'other.png']) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'other.png').exists()
