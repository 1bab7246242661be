"""Weights of whole models and heads through ``init_cfg``: what does not fit is an error, as for the backbone."""

from __future__ import annotations

import pytest
import torch
from mmengine.model import BaseModule, PretrainedInit, initialize
from torch import nn

from vheat_mm.engine import fileio
from vheat_mm.models.find_weights import find_weights
from vheat_mm.models.pretrained_init import replace_pretrained_init, to_mmengine
from vheat_mm.models.resize_weights import resize_checkpoint
from vheat_mm.models.weights import load_pretrained
from vheat_mm.utils.errors import CheckpointError


class Model(BaseModule):
    """A backbone and a head; mmpretrain's classifier gives ``pretrained`` to ``init_cfg`` in the same way."""

    def __init__(self, backbone, classes=5, init_cfg=None):
        super().__init__(init_cfg)
        self.backbone, self.head = backbone, nn.Linear(32, classes)


@pytest.fixture(autouse=True)
def _install():
    fileio.install()


@pytest.fixture(params=['Pretrained', 'mmengine.Pretrained', PretrainedInit], ids=str)
def kind(request):
    return request.param


def full(value, module):
    return {key: torch.full_like(v, value) for key, v in module.state_dict().items()}


@pytest.mark.parametrize('form', ['release', 'mmengine', 'backbone and other head'])
def test_a_model_loads_what_its_backbone_loads(tmp_path, make_vheat, kind, form):
    state = full(3, make_vheat(img_size=96))
    content = dict(model=state)
    if form != 'release':
        content = dict(state_dict={f'backbone.{key}': value for key, value in state.items()})
        content['state_dict']['head.weight'] = torch.full((5 if form == 'mmengine' else 7, 32), 3.0)
    torch.save(content, tmp_path / 'x.pth')
    model = Model(make_vheat(), init_cfg=dict(type=kind, checkpoint=str(tmp_path / 'x.pth')))
    model.init_weights()
    assert all((value == 3).all() for key, value in model.backbone.named_parameters() if 'freq_embed' not in key)
    assert bool((model.head.weight == 3).all()) == (form == 'mmengine')


def test_a_model_for_five_bands_takes_weights_of_three(tmp_path, make_vheat):
    torch.save(dict(model=full(3, make_vheat())), tmp_path / 'x.pth')
    model = Model(make_vheat(in_channels=5))
    initialize(model, dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))
    assert torch.allclose(model.backbone.patch_embed.conv1.weight, torch.tensor(3 * 3 / 5))


@pytest.mark.parametrize('place', ['model', 'backbone', 'head'])
@pytest.mark.parametrize('form', ['other', 'wider', 'empty', 'no names', 'no dict'])
def test_what_does_not_fit_is_an_error(tmp_path, make_vheat, place, form, kind):
    wider = make_vheat(arch=dict(embed_dims=8, depths=(1, 1, 2, 1), post_norm=False))
    content = {
        'other': dict(state_dict={'something.else': torch.ones(3)}),
        'wider': dict(state_dict={f'backbone.{key}': value for key, value in wider.state_dict().items()}),
        'empty': dict(state_dict={}),
        'no names': dict(state_dict={1: torch.ones(2)}),
        'no dict': dict(state_dict=torch.ones(2)),
    }[form]
    torch.save(content, tmp_path / 'x.pth')
    module = dict(model=Model(make_vheat()), backbone=make_vheat(), head=nn.Linear(32, 5))[place]
    with pytest.raises(CheckpointError, match=r"x\.pth'"):
        initialize(module, dict(type=kind, checkpoint=str(tmp_path / 'x.pth')))


def test_a_head_takes_a_prefix(tmp_path, make_vheat, kind):
    torch.save(dict(state_dict=full(3, Model(make_vheat()))), tmp_path / 'x.pth')
    init = dict(type=kind, checkpoint=str(tmp_path / 'x.pth'))
    head = nn.Linear(32, 5)
    with pytest.raises(CheckpointError, match=r"does not fit Linear: .*; with prefix='head.' keys would fit"):
        initialize(head, init)
    initialize(head, init | dict(prefix='head'))
    assert (head.weight == 3).all()
    with pytest.raises(CheckpointError, match=r"no key that starts with 'neck\.'"):
        initialize(head, init | dict(prefix='neck'))
    with pytest.raises(CheckpointError, match=r'does not fit Linear: size mismatch for weight'):
        initialize(nn.Linear(32, 7), init | dict(prefix='head'))


def test_without_the_tools_models_with_a_vheat_are_strict_and_others_as_mmengines(tmp_path, make_vheat, kind):
    replace_pretrained_init(everywhere=False)  # as importing vheat_mm does
    torch.save(dict(state_dict={'something.else': torch.ones(3)}), tmp_path / 'x.pth')
    init = dict(type=kind, checkpoint=str(tmp_path / 'x.pth'))
    initialize(nn.Linear(32, 5), init)
    with pytest.raises(CheckpointError, match=r"x\.pth'"):
        initialize(Model(make_vheat()), init)


def test_models_of_other_libraries_still_load(tmp_path):
    """A classifier left over, a layer that the file lacks, a position embedding that a load hook resizes."""

    class Resnet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.offset = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Parameter(torch.zeros(2))
            self.embed = nn.Parameter(torch.zeros(5))
            self._register_load_state_dict_pre_hook(self.resize)

        def resize(self, state, prefix, *_):
            state[f'{prefix}embed'] = state[f'{prefix}embed'][:5]

    state = full(3, Resnet()) | {'embed': torch.ones(9), 'fc.weight': torch.ones(2, 4)}
    del state['offset'], state['bn.num_batches_tracked']
    torch.save(state, tmp_path / 'x.pth')
    module = Resnet()
    initialize(module, dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))
    assert (module.conv.weight == 3).all()
    assert (module.embed == 1).all()
    del state['conv.weight'], state['bn.weight'], state['bn.running_mean'], state['bn.bias']
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'missing are offset, conv.weight, .*, 5 of 8; left over are fc.weight'):
        initialize(module, dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))


def test_the_argument_of_mmsegs_models(tmp_path, make_vheat):
    torch.save(full(3, make_vheat()), tmp_path / 'x.pth')
    model = make_vheat(pretrained=str(tmp_path / 'x.pth'))
    model.init_weights()
    assert (model.layers[0][0].op.linear.weight == 3).all()
    with pytest.raises(ValueError, match='keep one'):
        make_vheat(pretrained='x.pth', init_cfg=dict(type='Pretrained', checkpoint='y.pth'))


# --- damaged and ambiguous weights


@pytest.mark.parametrize(('first', 'second'), [('outnorm3', 'classifier.0'), ('classifier.3', 'head.fc')])
def test_two_keys_of_one_weight(make_vheat, first, second):
    state = {f'backbone.{key}': value for key, value in make_vheat().state_dict().items() if 'outnorm3' not in key}
    prefix = '' if second == 'head.fc' else 'backbone.'
    state |= {f'backbone.{first}.bias': torch.ones(32), f'{prefix}{second}.bias': torch.ones(32)}
    with pytest.raises(CheckpointError, match=f'holds both backbone.{first}.bias and {prefix}{second}.bias'):
        find_weights(state)


def test_nan_in_eight_bits_is_found(make_vheat, monkeypatch):
    messages = []
    monkeypatch.setattr('vheat_mm.models.find_weights.print_log', lambda text, **_: messages.append(text))
    state = make_vheat().state_dict()
    state['outnorm0.bias'] = torch.tensor([1.0, float('nan')]).to(torch.float8_e4m3fn)
    find_weights(state)
    assert messages == ["'checkpoint' holds NaN or infinity in outnorm0.bias"]


def no_stem(state):
    state['patch_embed.conv2.weight'] = torch.tensor(1.0)


def no_anchor(state):
    state['patch_embed.conv1.weight'] = torch.tensor(1.0)


def whole_numbers(state):
    state['freq_embed.1'] = torch.ones(9, 9, 8, dtype=torch.int32)


def complex_numbers(state):
    state['freq_embed.1'] = torch.ones(9, 9, 8, dtype=torch.complex64)


def eight_bits(state):
    state['freq_embed.1'] = torch.ones(9, 9, 8).to(torch.float8_e4m3fn)


def flat(state):
    state['freq_embed.1'] = torch.ones(8)


def deployed(state):
    for key in [key for key in state if 'freq_embed' in key or 'to_k' in key]:
        del state[key]
    state['layers.0.0.op.k_exp'] = torch.ones(16)


@pytest.mark.parametrize('damage', [no_stem, no_anchor, whole_numbers, complex_numbers, eight_bits, flat, deployed])
def test_damaged_weights_give_no_other_error(tmp_path, make_vheat, damage):
    state = make_vheat().state_dict()
    damage(state)
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in state.items()}), tmp_path / 'x.pth')
    path, model = str(tmp_path / 'x.pth'), Model(make_vheat())
    roads = [
        lambda: load_pretrained(make_vheat(), path),
        lambda: initialize(model, dict(type='Pretrained', checkpoint=path)),
        lambda: resize_checkpoint(path, (64, 64), (96, 96)),
        lambda: to_mmengine(torch.load(path), model.state_dict(), path),
    ]
    refused = 0
    for road in roads:
        try:
            road()
        except CheckpointError:
            refused += 1
    assert refused >= 1 + (damage is not eight_bits)
